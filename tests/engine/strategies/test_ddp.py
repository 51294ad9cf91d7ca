"""DDP on two gloo processes: the numbers of one process, and checkpoints that either resumes."""

import math

import pytest
import torch
from mmengine.hooks import Hook
from safetensors.torch import load_file

from tests.engine.strategies.same_run import (
    assert_same,
    assert_same_weights,
    rows,
    saved_weights,
    train,
)
from tests.ranks import run_ranks
from tests.tiny import tiny_tokenizer
from xtuner_lite.data.dataset import ChatDataset
from xtuner_lite.engine.checkpoint import list_checkpoints

DDP = dict(type="DDP")
EIGHT_A_STEP = dict(
    optim_wrapper=dict(optimizer=dict(type="AdamW", lr=1e-2), dtype="fp32", accumulative_counts=4)
)


@pytest.mark.parametrize("lora", [False, True])
def test_two_ranks_equal_one_process(tmp_path, lora):
    alone = train(tmp_path / "one", None, lora=lora)
    both = run_ranks(_train, tmp_path / "two", DDP, dict(lora=lora))
    assert both[0] == both[1]
    assert_same(alone, both[0])
    assert_same_weights(tmp_path / "one", tmp_path / "two")


def _train(work_dir, strategy, options):
    return train(work_dir, strategy, world_size=2, **options)


def test_resume_on_two_one_and_two_ranks(tmp_path):
    whole = run_ranks(_train, tmp_path / "whole", DDP, {})[0]
    folder = tmp_path / "moved"
    first = run_ranks(_train, folder, DDP, dict(stop_after=3))[0]
    alone = train(folder, None, resume=True, stop_after=5)
    last = run_ranks(_train, folder, DDP, dict(resume=True))[0]
    assert first["losses"] == whole["losses"][:3]
    joined = {key: first[key] + alone[key] + last[key] for key in whole}
    assert len(joined["losses"]) == 7
    assert_same(joined, whole)


def test_another_number_of_ranks_with_the_same_accumulation_is_told_what_to_change(tmp_path):
    train(tmp_path, None, stop_after=3)
    with pytest.raises(
        AssertionError, match=r"by 1 process\(es\), this run has 2: change optim_wr"
    ):
        run_ranks(_train, tmp_path, DDP, dict(resume=True, **EIGHT_A_STEP))


def test_a_stopped_run_on_two_ranks_goes_on_bit_for_bit(tmp_path):
    whole = run_ranks(_train, tmp_path / "whole", DDP, {})[0]
    first = run_ranks(_train, tmp_path / "cut", DDP, dict(stop_after=3))[0]
    rest = run_ranks(_train, tmp_path / "cut", DDP, dict(resume=True))[0]
    assert first["losses"] + rest["losses"] == whole["losses"]
    mine, theirs = saved_weights(tmp_path / "cut"), saved_weights(tmp_path / "whole")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def _unequal(work_dir):
    import os

    rank = int(os.environ["RANK"])
    data = ChatDataset(rows(22 + rank), tokenizer=tiny_tokenizer(), max_length=64)
    with pytest.raises(ValueError, match="read other data than rank 0") as caught:
        train(work_dir, DDP, world_size=2, train_dataloader=dict(dataset=data, batch_size=1))
    return str(caught.value)


def test_ranks_with_other_data_are_refused(tmp_path):
    first, second = run_ranks(_unequal, tmp_path)
    assert first == second
    assert "ranks [1]" in first


class Poison(Hook):
    """An infinite gradient on one rank, in one step."""

    priority = "HIGHEST"

    def __init__(self, step, rank):
        self.step, self.rank = step, rank

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter + 1 == self.step and runner.rank == self.rank:
            parameter = next(p for p in runner.model.parameters() if p.requires_grad)
            handle = parameter.register_hook(lambda grad: (handle.remove(), grad * float("inf"))[1])


def _poisoned(work_dir):
    return train(
        work_dir, DDP, world_size=2, custom_hooks=[Poison(step=4, rank=1)],
        default_hooks=dict(
            dataset_preview=None, loss_curve=None, trainability=None,
            nan_guard=dict(policy="skip"), checkpoint=dict(interval=1),
        ),
    )  # fmt: skip


def test_a_bad_gradient_on_one_rank_costs_one_step_on_all(tmp_path):
    first, second = run_ranks(_poisoned, tmp_path)
    assert str(first) == str(second)  # as text: NaN is not equal to itself
    assert len(first["losses"]) == 7
    assert not math.isfinite(first["grad_norms"][3])
    weights = {
        path.name: load_file(path / "model.safetensors") for path in list_checkpoints(tmp_path)
    }
    assert all(torch.equal(weights["iter_3"][k], v) for k, v in weights["iter_4"].items())
    assert not all(torch.equal(weights["iter_5"][k], v) for k, v in weights["iter_4"].items())
