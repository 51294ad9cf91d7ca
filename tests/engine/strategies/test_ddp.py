"""DDP on two gloo processes: the numbers of one process, and checkpoints that either resumes."""

import pytest
import torch

from tests.engine.strategies.same_run import assert_same, assert_same_weights, saved_weights, train
from tests.ranks import run_ranks

DDP = dict(type="DDP")


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


def test_a_stopped_run_on_two_ranks_goes_on_bit_for_bit(tmp_path):
    whole = run_ranks(_train, tmp_path / "whole", DDP, {})[0]
    first = run_ranks(_train, tmp_path / "cut", DDP, dict(stop_after=3))[0]
    rest = run_ranks(_train, tmp_path / "cut", DDP, dict(resume=True))[0]
    assert first["losses"] + rest["losses"] == whole["losses"]
    mine, theirs = saved_weights(tmp_path / "cut"), saved_weights(tmp_path / "whole")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
