"""Every hook that mmengine.hooks exports: run under our Runner, or left out for a reason."""

import inspect
import json
import re

import mmengine.hooks
import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from safetensors.torch import load_file

from tests.engine.hooks.toy_run import log_text, toy_loader, train
from xtuner_lite.data.sampler import EpochSampler
from xtuner_lite.engine.hooks import DEFAULT_HOOKS

#: Hooks that make no sense here, with the reason.
LEFT_OUT = {
    "Hook": "the base class, without work of its own; every hook of ours stands on it",
    "CheckpointHook": "writes pickles in place and deletes the old file before the new one is "
    "written; ours of the same name replaces it",
    "NaiveVisualizationHook": "draws images with boxes; its own source says that it does not work",
    "PrepareTTAHook": "wraps an image model for test-time augmentation",
    "NPUProfilerHook": "needs an Ascend NPU and torch_npu",
}


def stock(name, **options):
    return {"stock": {"type": getattr(mmengine.hooks, name), **options}}


def test_iter_timer(tmp_path):
    runner, _ = train(tmp_path, stock("IterTimerHook"), val_dataloader=toy_loader(size=4))
    for name, count in (("train/time", 6), ("train/data_time", 6), ("val/time", 4)):
        times, _ = runner.message_hub.get_scalar(name).data
        assert len(times) == count
        assert (times >= 0).all()
    assert runner.message_hub.get_info("eta") == 0


class RecordingSampler(EpochSampler):
    seen: list[int] = []

    def set_epoch(self, epoch):
        self.seen.append(epoch)


def test_dist_sampler_seed(tmp_path):
    RecordingSampler.seen.clear()
    loader = {**toy_loader(), "sampler": {"type": RecordingSampler}}
    train(tmp_path, stock("DistSamplerSeedHook"), train_dataloader=loader)
    assert RecordingSampler.seen == [0, 1]
    # Ours needs no such call: its order is a function of seed and epoch.
    train(tmp_path / "own", stock("DistSamplerSeedHook"))


def test_param_scheduler(tmp_path):
    scheduler = {"type": "LinearLR", "start_factor": 0.2, "by_epoch": False, "end": 4}
    runner, _ = train(
        tmp_path,
        {**stock("ParamSchedulerHook"), "info": {"type": "RunInfoHook"}},
        param_scheduler=scheduler,
    )
    rates, _ = runner.message_hub.get_scalar("train/lr").data
    # lr 0.05; the factor goes from 0.2 to 1 in the 3 moves between the 4 steps before `end`.
    np.testing.assert_allclose(rates, 0.05 * np.array([0.2, 0.2 + 0.8 / 3, 0.2 + 1.6 / 3, 1, 1, 1]))


def test_sync_buffers(tmp_path, monkeypatch):
    from mmengine.hooks import sync_buffer_hook

    synced = []
    monkeypatch.setattr(
        sync_buffer_hook, "all_reduce_params", lambda buffers, op: synced.append(op)
    )
    train(tmp_path / "one", stock("SyncBuffersHook"))
    assert synced == []  # one process: nothing to do
    monkeypatch.setattr(sync_buffer_hook, "is_distributed", lambda: True)
    train(tmp_path / "many", stock("SyncBuffersHook"), val_dataloader=toy_loader(size=4))
    assert synced == ["mean", "mean"]  # after each epoch, not again before its validation


def test_empty_cache(tmp_path, monkeypatch):
    from mmengine.hooks import empty_cache_hook

    calls = []
    monkeypatch.setattr(empty_cache_hook, "is_cuda_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(1))
    train(tmp_path, stock("EmptyCacheHook", before_epoch=True, after_iter=True))
    assert len(calls) == 2 + 6 + 2  # before each epoch, after each step, after each epoch


def test_logger(tmp_path):
    hooks = {"info": {"type": "RunInfoHook"}, "timer": {"type": "IterTimerHook"}}
    runner, outputs = train(
        tmp_path,
        {**hooks, **stock("LoggerHook", interval=1, log_metric_by_epoch=False)},
        val_dataloader=toy_loader(size=4),
        visualizer={"vis_backends": [{"type": "LocalVisBackend"}]},
    )
    assert log_text(runner).count("Iter(train)") == 6
    assert log_text(runner).count("Iter(val)") >= 2
    path = next(runner.log_dir.rglob("scalars.json"))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    losses = [r["loss"] for r in records if "lr" in r]
    assert losses[0] == pytest.approx(outputs.steps[0]["loss"])
    assert len(losses) == 6


def test_ema(tmp_path):
    class Weights(Hook):
        priority = "VERY_HIGH"
        seen: list[float] = []
        in_validation: list[float] = []

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            self.seen.append(runner.model.linear.bias.item())

        def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            self.in_validation.append(runner.model.linear.bias.item())

    runner, _ = train(
        tmp_path,
        {**stock("EMAHook", momentum=0.5), "checkpoint": {"type": "CheckpointHook"}},
        custom_hooks=[Weights()],
        val_dataloader=toy_loader(size=2),
        train_cfg={"max_epochs": 1},
    )
    average = Weights.seen[0]  # mmengine's EMA starts as a copy at its first update
    for value in Weights.seen[1:]:
        average = 0.5 * average + 0.5 * value
    assert Weights.in_validation[-1] == pytest.approx(average)
    assert runner.model.linear.bias.item() == Weights.seen[-1]  # swapped back
    saved = load_file(tmp_path / "checkpoints" / "iter_3" / "model.safetensors")
    assert saved["linear.bias"].item() == pytest.approx(average)


def test_runtime_info(tmp_path):
    from mmengine.config import Config

    runner, _ = train(tmp_path, stock("RuntimeInfoHook"), cfg=Config({"a": 1}))
    assert runner.message_hub.get_info("cfg").strip() == "a = 1"
    assert runner.message_hub.get_info("max_iters") == 6
    assert len(runner.message_hub.get_scalar("train/loss").data[0]) == 6


def test_profiler(tmp_path):
    trace = tmp_path / "trace.json"
    train(
        tmp_path,
        stock(
            "ProfilerHook",
            by_epoch=False,
            profile_times=2,
            activity_with_cuda=False,
            json_trace_path=str(trace),
        ),
    )
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::linear" in names


def test_early_stopping(tmp_path):
    runner, outputs = train(
        tmp_path,
        stock("EarlyStoppingHook", monitor="loss", patience=1, min_delta=1000.0),
        val_dataloader=toy_loader(size=4),
        train_cfg={"max_epochs": 5, "val_interval": 1},
    )
    # No validation improves by 1000: the first sets the best score, the second stops the run.
    assert len(outputs.steps) == 2
    assert "did not improve" in log_text(runner)


def test_no_exported_hook_is_forgotten():
    tests = "".join(inspect.getsource(f) for n, f in globals().items() if n.startswith("test_"))
    tested = {name for name in mmengine.hooks.__all__ if re.search(rf'stock\(\s*"{name}"', tests)}
    assert tested | set(LEFT_OUT) == set(mmengine.hooks.__all__)
    assert tested & set(LEFT_OUT) == set()
    assert (len(tested), len(LEFT_OUT)) == (10, 5)


def test_those_in_the_defaults_are_tested():
    ours = [cfg["type"] for cfg in DEFAULT_HOOKS.values()]
    assert {"IterTimerHook", "ParamSchedulerHook"} <= set(ours)
