"""What users get wrong: each a clear error, a non-zero exit code, nothing lost."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.end_to_end.conftest import conversations, xtuner_lite
from tests.tiny import tiny_llama
from xtuner_lite.cli.main import main
from xtuner_lite.engine.checkpoint import exclusive_work_dir, list_checkpoints, verify_checkpoint


@pytest.fixture()
def train(project, monkeypatch, capfd):
    """Runs `xtuner-lite train cfg.py ...` in this process; returns (exit code, what it printed)."""
    monkeypatch.chdir(project)

    def run(*options: str) -> tuple[int, str]:
        code = main(["train", "cfg.py", *options])
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return run


def refused(result, *parts):
    code, text = result
    assert code != 0
    for part in parts:
        assert part in text
    assert "Traceback" not in text


def test_missing_model_folder(train):
    refused(train("--cfg-options", "model_path=./modell"), "modell", "its folders")


def test_missing_data_file(train, project):
    refused(train("--cfg-options", "data_path=dta.json"), "dta.json", "data.json")


@pytest.mark.parametrize(("content", "said"), [(b"", "empty"), (b"\xff\xfe\x00{", "data.json")])
def test_empty_or_unreadable_data_file(train, project, content, said):
    (project / "data.json").write_bytes(content)
    refused(train(), said)


def test_a_row_that_does_not_parse_stops_or_is_counted(train, project):
    lines = [json.dumps(row) for row in conversations()]
    lines[4] = lines[4][:-5]
    (project / "data.jsonl").write_text("\n".join(lines))
    refused(train("--cfg-options", "data_path=data.jsonl"), "data.jsonl:5: ")
    code, text = train(
        "--cfg-options",
        "data_path=data.jsonl",
        "train_dataloader.dataset.on_bad_row=skip",
        "train_cfg.max_epochs=1",
    )
    assert code == 0
    assert "data.jsonl:5" in text


def test_nothing_supervised(train, project):
    rows = [{"messages": [{"role": "user", "content": "hello"}]}]
    (project / "data.json").write_text(json.dumps(rows))
    refused(train(), "nothing is supervised")


def test_max_length_shorter_than_the_prompt(train):
    refused(train("--cfg-options", "max_length=4"), "max_length=4", "data.json:")


def test_an_adapter_that_does_not_fit(train, project):
    from peft import LoraConfig, get_peft_model

    other = get_peft_model(tiny_llama(hidden_size=64), LoraConfig(r=4, target_modules="all-linear"))
    other.save_pretrained(project / "adapter")
    refused(train("--load-from", "adapter"), "adapter", "lora_A")


def test_load_from_a_folder_that_is_no_model(train, project):
    (project / "empty").mkdir()
    refused(train("--load-from", "empty"), "empty")


def test_a_work_dir_that_another_run_is_writing(train, project):
    (project / "wd").mkdir()
    with exclusive_work_dir(project / "wd"):
        code = "import subprocess"
        assert code
        done = xtuner_lite("train", "cfg.py", "--work-dir", "wd", cwd=project)
    assert done.returncode != 0
    assert "is being written by another run" in done.stderr
    assert not list_checkpoints(project / "wd")


def test_resume_from_a_folder_that_is_no_checkpoint(train, project, model_folder):
    refused(train("--resume", str(model_folder)), "is no checkpoint of a run")


def test_misspelled_keys_are_refused_together_before_anything_loads(train, project):
    text = (project / "cfg.py").read_text()
    text = text.replace("max_epochs=2", "max_epoch=2").replace("lora_alpha=8", "lora_alfa=8")
    (project / "cfg.py").write_text(text + "\nresum = True\n")
    code, text = train()
    assert code == 2
    for said in ("max_epochs", "lora_alpha", "resume", "cfg.py:"):
        assert said in text
    assert not (project / "work_dirs").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_during_a_save_loses_nothing(project):
    disk = project / "small"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1600k", "tmpfs", str(disk)])
    if mounted.returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        done = xtuner_lite(
            "train", "cfg.py", "--work-dir", disk / "wd", "--cfg-options",
            "default_hooks.checkpoint.max_keep_ckpts=None", "train_cfg.max_epochs=20", cwd=project,
        )  # fmt: skip
        assert done.returncode == 1
        assert "no space left on the disk" in done.stderr
        saved = list_checkpoints(disk / "wd")
        assert saved
        for path in saved:
            verify_checkpoint(path)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
