"""``metrics.jsonl``: one strict JSON object a line, which every curve of a run is drawn from."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any, TextIO

#: Name of the file in ``work_dir``. One file for a run and all its resumes.
METRICS_FILE = "metrics.jsonl"


def to_strict_json(record: dict[str, Any]) -> str:
    """One line of strict JSON (no NaN or Infinity, which most readers refuse).

    A number that is not finite becomes null, and its text goes into ``"nonfinite"``:
    ``{"loss": nan}`` -> ``{"loss": null, "nonfinite": {"loss": "nan"}}``.
    """
    clean: dict[str, Any] = {}
    nonfinite: dict[str, str] = {}
    for key, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            clean[key], nonfinite[key] = None, str(value)
        else:
            clean[key] = value
    if nonfinite:
        clean["nonfinite"] = nonfinite
    return json.dumps(clean, allow_nan=False, ensure_ascii=False)


def read_metrics(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """Records of a metrics file, in file order, and the number of lines that do not parse.

    A kill in the middle of a write leaves half a line; such lines are counted, not fatal.

    Raises:
        FileNotFoundError: there is no such file.
    """
    records: list[dict[str, Any]] = []
    num_bad = 0
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            num_bad += 1
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        else:
            num_bad += 1
    return records, num_bad


def smooth(values: tuple[float, ...], window: int) -> list[float]:
    """Mean of the last ``window`` values at each place (fewer at the start)."""
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means


class MetricsLog:
    """Appends records to ``metrics.jsonl``; starts it afresh or cuts it back to the resumed step.

    Args:
        path: the file. Its folder is made when missing.
        start_step: optimizer steps done before this run. 0 starts a new file and sets an older one
            aside as ``metrics.<time of its last change>.jsonl``. Above 0 (a resume) keeps the lines
            up to that step and drops later ones, so that no step stands in the file twice.
    """

    def __init__(self, path: str | Path, start_step: int = 0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.num_dropped = 0
        self.set_aside: Path | None = None
        if self.path.exists():
            if start_step == 0:
                self.set_aside = self._set_aside()
            else:
                self._cut_back(start_step)
        # Line buffered: a reader sees whole lines at once, and a kill loses at most one.
        self._file: TextIO | None = self.path.open("a", encoding="utf-8", buffering=1)

    def _set_aside(self) -> Path:
        """Renames the file of an earlier run and returns its new name."""
        changed = time.strftime("%Y%m%d_%H%M%S", time.localtime(self.path.stat().st_mtime))
        target = self.path.with_name(f"{self.path.stem}.{changed}{self.path.suffix}")
        number = 1
        while target.exists():
            number += 1
            target = self.path.with_name(f"{self.path.stem}.{changed}_{number}{self.path.suffix}")
        self.path.rename(target)
        return target

    def _cut_back(self, start_step: int) -> None:
        """Rewrites the file without the lines after ``start_step``, beside it and renamed."""
        records, num_bad = read_metrics(self.path)
        kept = [r for r in records if r["step"] <= start_step]
        self.num_dropped = len(records) - len(kept) + num_bad
        aside = self.path.with_name(self.path.name + ".tmp")
        aside.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept), "utf-8")
        os.replace(aside, self.path)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record. It must hold ``step`` (int, optimizer steps done).

        Raises:
            OSError: the disk is full or the file is gone.
        """
        assert isinstance(record.get("step"), int), f"a record without a step: {record}"
        assert self._file is not None, "the metrics file is closed"
        self._file.write(to_strict_json(record) + "\n")

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
