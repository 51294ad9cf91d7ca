import io
import logging
import sys

import pytest

from xtuner_lite.engine.hooks.console import (
    SHOWN_IN_BAR,
    ProgressBar,
    format_bytes,
    format_duration,
    format_number,
    train_line,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.53125, "0.5312"),
        (12.4, "12.4"),
        (1234.5, "1234"),
        (123456.7, "123457"),
        (3.1e-7, "3.10e-07"),
        (0.0, "0"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
    ],
)
def test_format_number(value, text):
    assert format_number(value) == text


def test_format_duration():
    assert format_duration(6.6) == "0:00:07"
    assert format_duration(12300) == "3:25:00"
    assert format_duration(86400 + 61) == "1 day 0:01:01"
    assert format_duration(3 * 86400) == "3 days 0:00:00"
    assert format_duration(-1) == "0:00:00"


def test_format_bytes():
    assert format_bytes(812 * 2**20) == "812 MiB"
    assert format_bytes(1.43 * 2**30) == "1.43 GiB"


def test_a_line_a_person_can_read():
    record = {
        "step": 20,
        "epoch": 0,
        "loss": 1.23456,
        "lr": 2e-4,
        "grad_norm": 0.531,
        "extra": {"accuracy": 0.5},
        "tokens_per_s": 1234.5,
        "units_per_s": 600.0,
        "unit_name": "supervised tokens",
        "data_share": 0.01,
        "peak_memory_bytes": 1.5 * 2**30,
        "eta_s": 75,
    }
    assert train_line(record, max_iters=120, max_epochs=3) == (
        "step  20/120  epoch 1/3  loss 1.2346  lr 2.000e-04  grad_norm 0.531  accuracy 0.5  "
        "1234 tokens/s  600 supervised tokens/s  memory 1.50 GiB  eta 0:01:15"
    )


def test_a_line_tells_what_is_unusual():
    record = {"step": 1, "loss": float("nan"), "num_nonfinite_steps": 2, "data_share": 0.4}
    line = train_line(record, max_iters=9, max_epochs=None)
    assert line == (
        "step 1/9  loss nan  waiting for data 40%  (2 steps not finite, left out of the loss)"
    )


def test_the_bar_takes_the_console_and_leaves_the_file_plain(tmp_path, monkeypatch):
    console = io.StringIO()
    monkeypatch.setattr(sys, "stdout", console)
    logger = logging.Logger("test")
    stream = logging.StreamHandler(console)
    file = logging.FileHandler(tmp_path / "run.log", encoding="utf-8")
    logger.addHandler(stream)
    logger.addHandler(file)

    bar = ProgressBar(total=4, initial=0, logger=logger)
    bar.advance(1, {"loss": "2.5"})
    logger.info("step 1/4", extra={SHOWN_IN_BAR: True})
    logger.info("saved")
    bar.advance(4, {"loss": "1.5"})
    bar.close()
    logger.info("after")

    shown = console.getvalue()
    assert "step 1/4" not in shown
    assert "saved\n" in shown
    assert "4/4" in shown
    assert "loss 1.5" in shown
    assert shown.endswith("after\n")
    assert stream.stream is console
    assert (tmp_path / "run.log").read_text() == "step 1/4\nsaved\nafter\n"
