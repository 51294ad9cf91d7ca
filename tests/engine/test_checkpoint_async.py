"""Saving while training goes on: the same folder, and an error that is told."""

import threading

import pytest
import torch
from mmengine.hooks import Hook

from tests.ranks import run_ranks
from tests.toy import QUIET, toy_config
from xtuner_lite.engine.checkpoint import (
    CheckpointError,
    checkpoints_dir,
    list_checkpoints,
    verify_checkpoint,
)
from xtuner_lite.engine.checkpoint_async import AsyncWriter
from xtuner_lite.engine.distributed import PeerError, Ranks, init_distributed
from xtuner_lite.runner.runner import Runner


def train(work_dir, asynchronous, **changes):
    saving = dict(interval=1, max_keep_ckpts=2, asynchronous=asynchronous)
    config = toy_config(work_dir, default_hooks={**QUIET, "checkpoint": saving}, **changes)
    return Runner.from_cfg(config).train()


def contents(path):
    return {
        file.name: file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.suffix == ".safetensors" or file.name == "state.json"
    }


def test_the_same_bytes_as_a_save_that_waits(tmp_path):
    train(tmp_path / "waiting", False)
    train(tmp_path / "meanwhile", True)
    one, other = list_checkpoints(tmp_path / "waiting"), list_checkpoints(tmp_path / "meanwhile")
    assert [path.name for path in one] == [path.name for path in other] == ["iter_5", "iter_6"]
    for first, second in zip(one, other, strict=True):
        verify_checkpoint(second)
        assert contents(first) == contents(second)


class WaitForTraining(Hook):
    """Holds the first asynchronous save back until the next step has changed the weights."""

    def __init__(self):
        self.go_on = threading.Event()
        self.weights = {}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.weights[runner.iter + 1] = runner.model.linear.weight.detach().clone()
        if runner.iter == 1:
            assert list_checkpoints(runner.work_dir) == []  # iter_1 is still being written
            self.go_on.set()


def test_what_is_saved_is_the_state_of_its_own_step(tmp_path, monkeypatch):
    from xtuner_lite.runner import persistence

    hook, written = WaitForTraining(), persistence.write_pieces

    def write_late(folder, rank, pieces):
        assert hook.go_on.wait(20)
        written(folder, rank, pieces)

    monkeypatch.setattr(persistence, "write_pieces", write_late)
    train(tmp_path, True, custom_hooks=[hook], train_cfg=dict(max_iters=2))
    from safetensors.torch import load_file

    saved = load_file(checkpoints_dir(tmp_path) / "iter_1" / "model.safetensors")
    assert torch.equal(saved["linear.weight"], hook.weights[1])
    assert not torch.equal(hook.weights[1], hook.weights[2])


def test_an_error_of_the_writer_is_raised_when_it_is_waited_for(tmp_path):
    def write(folder):
        raise OSError(28, "No space left on device")

    writer = AsyncWriter(tmp_path / "checkpoints" / "iter_1", write, Ranks())
    with pytest.raises(CheckpointError, match="no space left on the disk"):
        writer.finish()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def two_writers(folder):
    ranks = init_distributed("pytorch")

    def write(aside):
        if ranks.rank == 1 and aside.name.startswith(".writing-iter_2"):
            raise ValueError("rank 1 cannot")
        (aside / f"part_{ranks.rank}").write_text("x")

    AsyncWriter(folder / "iter_1", write, ranks).finish()
    writer = AsyncWriter(folder / "iter_2", write, ranks)
    try:
        writer.finish()
    except (ValueError, CheckpointError, PeerError) as error:
        return type(error).__name__, str(error)


def test_all_ranks_or_none(tmp_path):
    first, second = run_ranks(two_writers, tmp_path / "checkpoints")
    assert second == ("ValueError", "rank 1 cannot")
    assert first[0] == "CheckpointError"
    assert "rank 1 could not write its part" in first[1]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["iter_1"]
    verify_checkpoint(tmp_path / "checkpoints" / "iter_1")
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
