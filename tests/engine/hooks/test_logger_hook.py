import json
import re

import pytest

from tests.engine.hooks.toy_run import log_text, toy_loader, train
from xtuner_lite.engine.hooks.logger_hook import IntervalMeans, LoggerHook
from xtuner_lite.engine.hooks.metrics_log import read_metrics

LOGGER = {"type": "LoggerHook", "interval": 4, "progress_bar": False}


def test_the_loss_of_an_interval_is_weighted_by_units():
    means = IntervalMeans()
    # 3 tokens of loss 2 and 1 token of loss 6: (3 * 2 + 1 * 6) / 4 = 3, not (2 + 6) / 2 = 4.
    means.add({"loss": 2.0, "accuracy": 1.0, "num_units": 3.0, "num_tokens": 5, "grad_norm": 1.0})
    means.add({"loss": 6.0, "accuracy": 0.0, "num_units": 1.0, "num_tokens": 7, "grad_norm": 3.0})
    assert means.take() == {
        "loss": 3.0,
        "accuracy": 0.75,
        "grad_norm": 2.0,
        "num_units": 4.0,
        "num_tokens": 12,
    }
    assert means.take() == {}


def test_speeds_are_sums_over_sums():
    means = IntervalMeans()
    for tokens, seconds in ((100, 1.0), (100, 4.0)):
        means.add(
            {"loss": 1.0, "num_units": tokens / 2, "num_tokens": tokens, "step_time_s": seconds}
            | {"data_time_s": 1.0, "tokens_per_s": 0.0, "data_share": 0.0, "peak_memory_bytes": 7}
        )
    values = means.take()
    assert values["tokens_per_s"] == 40.0  # 200 tokens in 5 s
    assert values["units_per_s"] == 20.0
    assert values["data_share"] == 0.4
    assert values["peak_memory_bytes"] == 7


def test_steps_that_are_not_finite_are_left_out_and_counted():
    means = IntervalMeans()
    means.add({"loss": float("nan"), "num_units": 5.0, "grad_norm": float("inf")})
    means.add({"loss": 2.0, "num_units": 1.0, "grad_norm": 1.0})
    values = means.take()
    assert (values["loss"], values["grad_norm"], values["num_nonfinite_steps"]) == (2.0, 1.0, 1)


def test_lines_and_json(tmp_path):
    runner, outputs = train(
        tmp_path,
        {"logger": LOGGER, "throughput": {"type": "ThroughputHook"}},
        val_dataloader=toy_loader(size=4),
    )
    lines = [line for line in log_text(runner).splitlines() if "INFO - step" in line]
    # The first step, the fourth, the last of six; the loss is that of the steps in between.
    assert [re.search(r"step (\d)/6", line)[1] for line in lines] == ["1", "4", "6"]
    losses = [step["loss"] for step in outputs.steps]
    assert f"loss {sum(losses[1:4]) / 3:.4f}" in lines[1]
    assert "epoch 2/2" in lines[1]
    for word in ("lr 5.000e-02", "grad_norm", "tokens/s", "memory", "eta 0:00:0", "abs_error"):
        assert word in lines[2], word
    assert "val after step 3: loss" in log_text(runner)
    assert "\x1b" not in log_text(runner)

    records, num_bad = read_metrics(tmp_path / "metrics.jsonl")
    assert num_bad == 0
    assert [(r["mode"], r["step"]) for r in records] == [
        ("train", 1), ("train", 2), ("train", 3), ("val", 3),
        ("train", 4), ("train", 5), ("train", 6), ("val", 6),
    ]  # fmt: skip
    assert [r["loss"] for r in records if r["mode"] == "train"] == pytest.approx(losses)
    assert {"epoch", "lr", "grad_norm", "num_units", "tokens_per_s"} <= set(records[0])


def test_a_resumed_run_writes_each_step_once(tmp_path):
    hooks = {"logger": LOGGER, "checkpoint": {"type": "CheckpointHook", "interval": 4}}
    train(tmp_path, hooks)
    runner, _ = train(tmp_path, hooks, resume=str(tmp_path / "checkpoints" / "iter_4"))
    records, _ = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert "2 lines after step 4 were cut" in log_text(runner)


def test_scalars_reach_the_visualizer_at_optimizer_steps(tmp_path):
    runner, _ = train(
        tmp_path,
        {"logger": LOGGER},
        val_dataloader=toy_loader(size=4),
        visualizer={"vis_backends": [{"type": "LocalVisBackend"}]},
    )
    path = next(runner.log_dir.rglob("scalars.json"))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 3, 4, 6, 6]
    assert {"train/loss", "train/lr", "train/grad_norm"} <= set(records[0])
    assert set(records[1]) == {"val/loss", "val/abs_error", "step"}


def test_a_full_disk_warns_once_and_training_goes_on(tmp_path, monkeypatch):
    from xtuner_lite.engine.hooks.metrics_log import MetricsLog

    def fail(self, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MetricsLog, "write", fail)
    runner, outputs = train(tmp_path, {"logger": LOGGER})
    assert len(outputs.steps) == 6
    assert log_text(runner).count("No space left on device") == 1


def test_every_group_with_a_rate_of_its_own_is_logged(tmp_path):
    train(
        tmp_path,
        {"logger": LOGGER},
        optim_wrapper={
            "optimizer": {"type": "SGD", "lr": 0.1},
            "dtype": "fp32",
            "paramwise_cfg": {"custom_keys": {"bias": {"lr_mult": 0.5}}},
        },
    )
    rates = {k: v for k, v in read_metrics(tmp_path / "metrics.jsonl")[0][0].items() if "lr" in k}
    assert sorted(rates.values()) == [0.05, 0.1]


@pytest.mark.parametrize("options", [{"interval": 0}, {"interval": 2.5}, {"jsonl_interval": -1}])
def test_bad_intervals_are_refused(options):
    with pytest.raises(ValueError, match="use a number of steps from 1 on"):
        LoggerHook(**options)
