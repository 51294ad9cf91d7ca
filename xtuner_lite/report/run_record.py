"""What a work_dir tells about its run; every file in it may be missing or half-written."""

from __future__ import annotations

import fcntl
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xtuner_lite.data.ledger import Ledger
from xtuner_lite.engine.checkpoint import TRAINER_DIR, list_checkpoints
from xtuner_lite.engine.hooks.metrics_log import METRICS_FILE, read_metrics
from xtuner_lite.processes import is_running
from xtuner_lite.runner.run_files import CONFIG_FILE, ENVIRONMENT_FILE

SAMPLES_FILE = "chat_samples.jsonl"
PREVIEW_FILE = "dataset_preview.txt"
FAILURE_FILE = "failure.txt"


@dataclass
class RunRecord:
    """A run as its files tell it.

    Args:
        work_dir: where they lie.
        metrics: records of metrics.jsonl, in file order; each has "mode" and "step".
        samples: chat samples: {"step": int, "messages": [...], "reply": str}.
        ledgers: (name of the dataloader, its ledger as text).
        preview: the first training sample as text; "" if there is none.
        config: the config as text, secrets redacted; "" if there is none.
        environment: versions, device, seed; "" if there is none.
        failure: what the newest attempt failed by; "" if it did not, or does not say.
        max_iters: optimizer steps of the whole run; None where no checkpoint says it.
        checkpoints: names of the checkpoints, oldest first.
        attempts: names of the log folders, oldest first: a run and its resumes.
        is_running: whether a process holds the work_dir.
        notes: files that could not be read, and lines of them.
    """

    work_dir: Path
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    ledgers: list[tuple[str, str]] = field(default_factory=list)
    preview: str = ""
    config: str = ""
    environment: str = ""
    failure: str = ""
    max_iters: int | None = None
    checkpoints: list[str] = field(default_factory=list)
    attempts: list[str] = field(default_factory=list)
    is_running: bool = False
    notes: list[str] = field(default_factory=list)

    def of_mode(self, mode: str) -> list[dict[str, Any]]:
        """The metrics of 'train', 'val' or 'test'."""
        return [record for record in self.metrics if record.get("mode") == mode]

    @property
    def last_step(self) -> int:
        """Optimizer steps that were logged."""
        return max((record["step"] for record in self.of_mode("train")), default=0)

    @property
    def state(self) -> str:
        """'running', 'finished', 'failed' or 'stopped'."""
        if self.is_running:
            return "running"
        if self.max_iters is not None and self.last_step >= self.max_iters:
            return "finished"
        return "failed" if self.failure else "stopped"


def read_run(work_dir: str | Path) -> RunRecord:
    """All that the files of a run tell.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no run has written into it.
    """
    folder = Path(work_dir).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}; give the work_dir of a run, e.g. work_dirs/my_config"
        )
    record = RunRecord(folder.resolve())
    metrics = folder / METRICS_FILE
    record.attempts = sorted(path.parent.name for path in folder.glob("*/run.log"))
    if not metrics.is_file() and not record.attempts:
        runs = sorted(path.parent.name for path in folder.glob(f"*/{METRICS_FILE}"))
        hint = f"; runs in it: {', '.join(runs[:8])}" if runs else ""
        raise ValueError(
            f"{folder} is no work_dir of a run: it has no {METRICS_FILE} and no logs{hint}"
        )
    if metrics.is_file():
        record.metrics, num_bad = read_metrics(metrics)
        if num_bad:
            record.notes.append(f"{METRICS_FILE}: {num_bad} lines are no records and are left out")
    record.samples = _samples(folder / SAMPLES_FILE, record.notes)
    record.preview = _text(folder / PREVIEW_FILE)
    record.is_running = _is_held(folder)
    _read_attempts(record, folder)
    _read_checkpoints(record)
    return record


def files_of(work_dir: Path) -> list[Path]:
    """The files that ``read_run`` reads and a run changes, to see whether something is new."""
    return [
        work_dir / METRICS_FILE,
        work_dir / SAMPLES_FILE,
        work_dir / PREVIEW_FILE,
        work_dir / "checkpoints",
        *sorted(work_dir.glob("*/*_ledger.json")),
        *sorted(work_dir.glob(f"*/{FAILURE_FILE}")),
    ]


def _read_attempts(record: RunRecord, folder: Path) -> None:
    """Config, environment and ledgers of the newest attempt that has them; its failure."""
    for name in record.attempts:
        logs = folder / name
        record.config = _text(logs / CONFIG_FILE) or record.config
        record.environment = _text(logs / ENVIRONMENT_FILE) or record.environment
        record.failure = _text(logs / FAILURE_FILE)
        ledgers = [
            (path.name.removesuffix("_ledger.json"), _ledger(path, record.notes))
            for path in sorted(logs.glob("*_ledger.json"))
        ]
        record.ledgers = [(name, text) for name, text in ledgers if text] or record.ledgers


def _read_checkpoints(record: RunRecord) -> None:
    paths = list_checkpoints(record.work_dir)
    record.checkpoints = [path.name for path in paths]
    for path in reversed(paths):
        try:
            meta = json.loads((path / TRAINER_DIR / "meta.json").read_text(encoding="utf-8"))
            record.max_iters = int(meta["max_iters"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            record.notes.append(f"{path.name}: meta.json cannot be read ({error})")
            continue
        record.config = record.config or _text(path / CONFIG_FILE)
        return


def _samples(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    samples, num_bad = [], 0
    for line in _text(path).splitlines():
        try:
            sample = json.loads(line)
            if not isinstance(sample["reply"], str) or not sample["messages"]:
                raise ValueError("no reply")
            samples.append({**sample, "step": int(sample["step"])})
        except (ValueError, KeyError, TypeError):
            num_bad += 1
    if num_bad:
        notes.append(f"{path.name}: {num_bad} lines are no samples and are left out")
    return samples


def _ledger(path: Path, notes: list[str]) -> str:
    try:
        return Ledger.from_dict(json.loads(path.read_text(encoding="utf-8"))).report()
    except (OSError, ValueError, KeyError, TypeError) as error:
        notes.append(f"{path.name} cannot be read ({type(error).__name__}: {error})")
        return ""


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _is_held(folder: Path) -> bool:
    """Whether a run holds the lock of its work_dir (engine.checkpoint.exclusive_work_dir)."""
    lock = folder / ".lock"
    owner = re.fullmatch(r"process (\d+) on (.+)", _text(lock).strip())
    if owner is None:
        return False
    if owner[2] == os.uname().nodename and not is_running(int(owner[1])):
        return False  # the lock is not even tried: a run that just starts would be turned away
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        return False
