"""A user's way from a config to an adapter that other tools open."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.end_to_end.conftest import ROOT, xtuner_lite
from xtuner_lite.engine.checkpoint import list_checkpoints, verify_checkpoint


def losses(project):
    files = sorted(project.glob("work_dirs/cfg/*/metrics.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_train_resume_and_open_elsewhere(project, model_folder):
    done = xtuner_lite("train", "cfg.py", cwd=project)
    assert done.returncode == 0, done.stderr[-3000:]
    log = done.stdout + done.stderr
    for said in (
        "what each row teaches",
        "compute dtype",
        "trained:",
        "[[",
        "loss",
        "checkpoint saved",
    ):
        assert said in log
    newest = list_checkpoints(project / "work_dirs" / "cfg")[-1]
    verify_checkpoint(newest)
    assert not list(newest.rglob("*.bin")) + list(newest.rglob("*.pt*"))

    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = PeftModel.from_pretrained(base, newest)
    tokenizer = AutoTokenizer.from_pretrained(newest)
    moved = [p.abs().max().item() for n, p in model.named_parameters() if "lora_B" in n]
    assert len(moved) == 14
    assert min(moved) > 0
    assert tokenizer.chat_template

    again = xtuner_lite(
        "train", "cfg.py", "--resume", "--cfg-options", "train_cfg.max_epochs=3", cwd=project
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"resumed from {newest.relative_to(project)}" in (again.stdout + again.stderr).replace(
        "./", ""
    )


def test_tools_train_is_the_same_command(project, model_folder):
    done = subprocess.run(
        [sys.executable, ROOT / "tools/train.py", "cfg.py", "--dry-run"],
        cwd=project,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(project)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for said in (
        "[[It is",
        "20 ",
        "optimizer steps an epoch",
        "nothing was trained",
    ):
        assert said in done.stdout + done.stderr
    line = (
        (project / "cfg.py").read_text().splitlines().index(f"model_path = {str(model_folder)!r}")
    )
    assert f"cfg.py:{line + 1} (model_path)" in done.stdout
    assert not (project / "work_dirs").exists()


def test_sigterm_saves_and_a_resume_continues(project):
    words = [
        "-m",
        "xtuner_lite.cli.main",
        "train",
        "cfg.py",
        "--cfg-options",
        "train_cfg.max_epochs=400",
    ]
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=project,
        env={
            "PYTHONPATH": str(ROOT),
            "PATH": "/usr/bin:/bin",
            "HOME": str(project),
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list_checkpoints(project / "work_dirs" / "cfg") and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output[-3000:]
    assert "continue with --resume" in output
    verify_checkpoint(list_checkpoints(project / "work_dirs" / "cfg")[-1])


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_half_precision_through_the_command_line(project, dtype):
    done = xtuner_lite(
        "train",
        "cfg.py",
        "--cfg-options",
        f"optim_wrapper.dtype={dtype}",
        "train_cfg.max_epochs=1",
        cwd=project,
    )
    assert done.returncode == 0, done.stderr[-3000:]
