"""A folder appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

from xtuner_lite.export.publish import ExportError, Receipt, publishing


def test_a_folder_appears_at_the_end(tmp_path):
    out = tmp_path / "deep/out"
    with publishing(out) as folder:
        (folder / "weights").write_text("w")
        Receipt("split", {}, notes=["n"]).write(folder)
        assert not out.exists()
    assert sorted(p.name for p in out.iterdir()) == ["export_receipt.json", "weights"]
    receipt = json.loads((out / "export_receipt.json").read_text())
    # printf w | sha256sum
    digest = "50e721e49c013f00c62cf59f2163542a9d8df02464efeb615d31051b0fddc326"
    assert receipt["outputs"] == {"weights": {"size": 1, "sha256": digest}}


def test_nothing_is_left_after_an_error(tmp_path):
    def fail():
        with publishing(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    with pytest.raises(ExportError, match="no space left on the disk .* Nothing was left behind"):
        with publishing(tmp_path / "out"):
            raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ExportError, match=r"would take 1048576.00 GiB, and its disk has"):
        with publishing(tmp_path / "out", num_bytes=2**50):
            pass
    assert list(tmp_path.iterdir()) == []


def test_what_may_be_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="is not empty; .* --overwrite"), publishing(out):
        pass
    with pytest.raises(ExportError, match="holds no model, so --overwrite does not delete it"):
        with publishing(out, overwrite=True):
            pass
    (out / "config.json").write_text("{}")
    with pytest.raises(KeyError), publishing(out, overwrite=True):
        raise KeyError
    assert (out / "notes.txt").read_text() == "mine"
    with publishing(out, overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "new"]


def test_sources_are_safe(tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text("{}")
    for out in (source, source / "merged", tmp_path):
        with pytest.raises(ExportError, match="name another"):
            with publishing(out, overwrite=True, sources=(source,)):
                pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="is a file"), publishing(tmp_path / "file"):
        pass


def test_what_a_killed_process_left_is_removed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead = tmp_path / f".writing-out-{process.pid}"
    alive = tmp_path / f".writing-out-{os.getppid()}"
    dead.mkdir()
    alive.mkdir()
    with publishing(tmp_path / "out"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([alive.name, "out"])
