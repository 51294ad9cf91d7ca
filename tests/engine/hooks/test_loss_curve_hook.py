import pytest

from tests.engine.hooks.toy_run import log_text, toy_loader, train
from xtuner_lite.engine.hooks.loss_curve_hook import _points, draw_loss_curve
from xtuner_lite.engine.hooks.metrics_log import smooth

HOOKS = {
    "logger": {"type": "LoggerHook", "progress_bar": False},
    "loss_curve": {"type": "LossCurveHook"},
}
PNG = b"\x89PNG\r\n\x1a\n"


def test_a_run_leaves_a_picture(tmp_path):
    runner, _ = train(tmp_path, HOOKS, val_dataloader=toy_loader(size=4))
    assert (tmp_path / "loss_curve.png").read_bytes().startswith(PNG)
    assert f"loss curve: {tmp_path / 'loss_curve.png'}" in log_text(runner)
    assert not list(tmp_path.glob("*.tmp"))


def test_without_a_metrics_file_it_says_why(tmp_path):
    runner, _ = train(tmp_path, {"loss_curve": HOOKS["loss_curve"]})
    assert "no loss_curve.png: LoggerHook wrote no" in log_text(runner)


def test_a_picture_that_fails_does_not_fail_the_run(tmp_path, monkeypatch):
    import xtuner_lite.engine.hooks.loss_curve_hook as module

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(module, "draw_loss_curve", fail)
    runner, outputs = train(tmp_path, HOOKS)
    assert len(outputs.steps) == 6
    assert "was not drawn: OSError: no space left" in log_text(runner)


def test_only_finite_losses_are_drawn():
    records = [
        {"mode": "train", "step": 2, "loss": 1.0},
        {"mode": "train", "step": 1, "loss": 2.0},
        {"mode": "train", "step": 3, "loss": None, "nonfinite": {"loss": "nan"}},
        {"mode": "val", "step": 2, "loss": 1.5},
    ]
    assert _points(records, "train") == [(1, 2.0), (2, 1.0)]
    assert _points(records, "val") == [(2, 1.5)]


def test_smooth_is_a_mean_of_what_came_before():
    assert smooth((4.0, 2.0, 0.0, 2.0), 2) == [4.0, 3.0, 1.0, 1.0]


def test_no_records_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no training loss among 0 records"):
        draw_loss_curve([], tmp_path / "x.png")
