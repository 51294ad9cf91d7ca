"""A work_dir is read as far as it goes, and what cannot be read is told."""

import json
import os
import subprocess
import sys

import pytest

from xtuner_lite.report.run_record import read_run


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture
def work_dir(tmp_path):
    folder = tmp_path / "my_run"
    write_lines(
        folder / "metrics.jsonl",
        [{"mode": "train", "step": s, "loss": 3.0 - s, "num_tokens": 10} for s in (1, 2)]
        + [{"mode": "val", "step": 2, "loss": 1.5}],
    )
    logs = folder / "20260101_000000"
    logs.mkdir()
    (logs / "run.log").write_text("started\n")
    (logs / "config.py").write_text("lr = 0.5\n")
    (logs / "environment.txt").write_text("torch 2.13\n")
    return folder


def add_checkpoint(folder, step, max_iters):
    trainer = folder / f"checkpoints/iter_{step}/trainer"
    trainer.mkdir(parents=True)
    (trainer / "meta.json").write_text(json.dumps({"max_iters": max_iters}))


def test_what_a_run_wrote(work_dir):
    add_checkpoint(work_dir, 2, 2)
    run = read_run(work_dir)
    assert [r["step"] for r in run.of_mode("train")] == [1, 2]
    assert [r["loss"] for r in run.of_mode("val")] == [1.5]
    assert (run.last_step, run.max_iters, run.checkpoints) == (2, 2, ["iter_2"])
    assert (run.config, run.environment) == ("lr = 0.5\n", "torch 2.13\n")
    assert (run.state, run.notes) == ("finished", [])


def test_a_run_that_failed_and_one_that_was_stopped(work_dir):
    add_checkpoint(work_dir, 1, 5)
    assert read_run(work_dir).state == "stopped"
    (work_dir / "20260101_000000/failure.txt").write_text("rank 1: out of memory")
    run = read_run(work_dir)
    assert (run.state, run.failure) == ("failed", "rank 1: out of memory")


def test_a_resume_that_went_well_has_no_failure(work_dir):
    (work_dir / "20260101_000000/failure.txt").write_text("rank 1: out of memory")
    again = work_dir / "20260102_000000"
    again.mkdir()
    (again / "run.log").write_text("resumed")
    run = read_run(work_dir)
    assert (run.state, run.failure, len(run.attempts)) == ("stopped", "", 2)
    assert run.config == "lr = 0.5\n"  # of the attempt before


def test_half_written_lines_are_left_out_and_told(work_dir):
    with (work_dir / "metrics.jsonl").open("a") as file:
        file.write('{"mode": "train", "st')
    samples = work_dir / "chat_samples.jsonl"
    good = {"step": 2, "messages": [{"role": "user", "content": "Hi"}], "reply": "Hello"}
    samples.write_text(json.dumps(good) + "\n{}\nnot json\n")
    add_checkpoint(work_dir, 2, 5)
    (work_dir / "checkpoints/iter_2/trainer/meta.json").write_text("{")
    run = read_run(work_dir)
    assert run.last_step == 2
    assert run.samples == [good]
    assert len(run.notes) == 3
    assert "1 lines are no records" in run.notes[0]
    assert "2 lines are no samples" in run.notes[1]
    assert "iter_2: meta.json cannot be read" in run.notes[2]


def test_a_held_work_dir_is_a_running_run(work_dir):
    hold = (
        "import sys, time\n"
        "from xtuner_lite.engine.checkpoint import exclusive_work_dir\n"
        "with exclusive_work_dir(sys.argv[1]):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, work_dir], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        try:
            assert read_run(work_dir).state == "running"
        finally:
            process.kill()
    assert read_run(work_dir).state == "stopped"
    (work_dir / ".lock").write_text(f"process {os.getpid()} on {os.uname().nodename}")
    assert read_run(work_dir).state == "stopped"  # a living process, but it holds nothing


def test_folders_that_are_no_run(tmp_path, work_dir):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no metrics.jsonl and no logs; runs in it: my_run"):
        read_run(tmp_path)
