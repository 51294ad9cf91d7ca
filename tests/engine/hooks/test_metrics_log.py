import json

import pytest

from xtuner_lite.engine.hooks.metrics_log import MetricsLog, read_metrics, to_strict_json


def test_numbers_that_are_not_finite_become_null_with_a_flag():
    line = to_strict_json({"step": 3, "loss": float("nan"), "grad_norm": float("-inf"), "lr": 0.1})
    assert json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} is no JSON")) == {
        "step": 3,
        "loss": None,
        "grad_norm": None,
        "lr": 0.1,
        "nonfinite": {"loss": "nan", "grad_norm": "-inf"},
    }


def write(path, steps, start_step=0):
    log = MetricsLog(path, start_step)
    for step in steps:
        log.write({"mode": "train", "step": step, "loss": 1.0 / step})
    log.close()
    return log


def test_a_resume_cuts_later_lines_and_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3, 4])
    with path.open("a") as file:
        file.write('{"mode": "train", "step": 5, "lo')  # killed while writing
    log = write(path, [3, 4, 5], start_step=2)
    assert log.num_dropped == 3  # steps 3 and 4, and the torn line
    records, num_bad = read_metrics(path)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    assert num_bad == 0
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_sets_the_old_file_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    second = write(path, [1])
    third = write(path, [1])
    assert second.set_aside != third.set_aside
    assert len(read_metrics(second.set_aside)[0]) == 2
    assert len(read_metrics(third.set_aside)[0]) == 1
    assert len(read_metrics(path)[0]) == 1


def test_lines_are_on_disk_before_the_file_is_closed(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1})
    assert read_metrics(log.path) == ([{"step": 1}], 0)
    log.close()
    log.close()


def test_bad_lines_are_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n[1]\n{"loss": 1.0}\n')
    assert read_metrics(path) == ([{"step": 1}], 3)
