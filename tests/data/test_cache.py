"""The cache: used while nothing changed, else made anew, with the reason told; never damaged."""

import functools
import hashlib
import importlib
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import tiny_tokenizer
from xtuner_lite.data import cache as cache_module
from xtuner_lite.data import content
from xtuner_lite.data.cache import DataCacheError
from xtuner_lite.data.content import NotKeyable, file_digest, function_digest
from xtuner_lite.data.dataset import ChatDataset, TextDataset
from xtuner_lite.data.store import DamagedStore, open_rows

ROOT = Path(__file__).parents[2]


def write(file, num_rows=12, word="word"):
    rows = [{"instruction": f"{n}?", "output": f"{word} " * (n % 5 + 1)} for n in range(num_rows)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "a.jsonl")


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(cache_module, "_say", lambda text, level=logging.INFO: lines.append(text))
    return lines


def make(data, folder, **options):
    options.setdefault("tokenizer", tiny_tokenizer())
    return ChatDataset(data, max_length=64, cache=folder, **options)


def entries(folder):
    return sorted(p.name for p in Path(folder).iterdir() if p.is_dir() and p.name != "files")


def test_a_second_run_reads_no_row_and_sees_the_same(tmp_path, data, said, monkeypatch):
    first = make(data, tmp_path / "c")
    assert "is prepared for the first time; kept in" in said[0]
    monkeypatch.setattr("xtuner_lite.data.dataset.encode_chunks", None)  # nothing is encoded
    second = make(data, str(tmp_path / "c"))
    assert "is taken from" in said[1]
    assert isinstance(second._packed.rows.input_ids, np.memmap)
    assert first.ledger == second.ledger
    assert "recognised as 'alpaca'" in second.ledger.notes[0]
    for a, b in zip(first, second, strict=True):
        assert a["input_ids"].tolist() == b["input_ids"].tolist()
        assert a["labels"].tolist() == b["labels"].tolist()
        assert a["row_ids"] == b["row_ids"]
    assert first.fingerprint == second.fingerprint


def test_cached_or_not_the_samples_and_the_fingerprint_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("xtuner_lite.data.parallel.CHUNK_ROWS", 2)  # weights begin in the third
    rows = [
        {"messages": [{"role": "user", "content": str(n)},
                      {"role": "assistant", "content": "b" * n, **extra}]}
        for n in range(1, 9) for extra in ({}, {"loss": 0.5})[n > 4 :][:1]
    ]  # fmt: skip
    file = tmp_path / "a.json"
    file.write_text(json.dumps(rows))
    kept, plain = make(file, tmp_path / "c"), make(file, False)
    assert kept.fingerprint == plain.fingerprint
    assert kept.ledger == plain.ledger
    for a, b in zip(kept, plain, strict=True):
        assert a["loss_weights"].tolist() == b["loss_weights"].tolist()
    again = pickle.loads(pickle.dumps(kept))  # as a spawned worker gets it
    assert isinstance(again._packed.rows.input_ids, np.memmap)
    assert again[0]["input_ids"].tolist() == kept[0]["input_ids"].tolist()


def test_a_change_is_seen_and_named(tmp_path, data, said):
    folder = tmp_path / "c"
    make(data, folder)

    def changed(expected, **options):
        said.clear()
        make(data, folder, **options)
        assert "is prepared anew, what changed since" in said[0], said
        assert expected in said[0]

    write(tmp_path / "a.jsonl", word="ward")  # as long as before
    changed("source files (")
    changed("train_on 'assistant' -> 'all'", train_on="all")
    changed("limit None -> 5", limit=5)
    changed("map_fn", map_fn="alpaca")
    tokenizer = tiny_tokenizer(tiny_tokenizer().chat_template + "{# #}")
    changed(": chat template;", tokenizer=tokenizer)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    changed(": tokenizer;", tokenizer=tokenizer)
    assert len(entries(folder)) == 7
    said.clear()
    make(data, folder)
    assert "is taken from" in said[0]


def test_versions_are_part_of_the_key(tmp_path, data, said, monkeypatch):
    make(data, tmp_path)
    monkeypatch.setattr(content, "version", lambda name: "9.9")
    make(data, tmp_path)
    assert "transformers" in said[1]
    assert "'9.9'" in said[1]


def test_our_own_code_is_part_of_the_key():
    assert content.library_versions()["xtuner_lite"].endswith(content.package_digest()[:12])


def test_the_code_that_rows_pass_through_is_all_of_that(tmp_path, monkeypatch):
    """Also the code that measures images and writes their tokens."""
    for folder in ("data", "images", "templates"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("1")
    monkeypatch.setattr(content, "__file__", str(tmp_path / "data" / "content.py"))
    digests = [content.package_digest.__wrapped__()]
    for folder in ("data", "images", "templates"):
        (tmp_path / folder / "a.py").write_text("2")
        digests.append(content.package_digest.__wrapped__())
    assert len(set(digests)) == 4


def test_a_file_is_read_again_only_when_its_state_changed(tmp_path, monkeypatch):
    file, memory = tmp_path / "a", tmp_path / "memory"
    file.write_text("one")
    young = file_digest(file, memory)
    file.write_text("two")  # perhaps within one tick of the file system's clock
    assert file_digest(file, memory) != young
    monkeypatch.setattr(content, "_TICK_NS", 0)
    time.sleep(0.05)
    known = file_digest(file, memory)
    with monkeypatch.context() as patch:
        patch.setattr(content.hashlib, "sha256", None)  # nothing is hashed
        patch.setattr(
            content, "_text_digest", lambda text: hashlib.new("sha256", text.encode()).hexdigest()
        )
        assert file_digest(file, memory) == known
    before = file.stat()
    file.write_text("six")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync and cp -p do
    assert file_digest(file, memory) != known


def test_rows_and_functions_that_cannot_be_keyed_are_not_kept(tmp_path, data, monkeypatch):
    lines = []
    monkeypatch.setattr(
        "xtuner_lite.data.dataset.print_log", lambda text, **options: lines.append(text)
    )
    make([{"instruction": "a", "output": "b"}], tmp_path / "c")
    why = "is not kept, because its content cannot be told: "
    assert f"data cache: rows {why}rows: rows in memory, or streamed" in lines
    make(data, tmp_path / "c", map_fn=lambda row: {"text": row["output"]})
    assert f"data cache: {data} {why}map_fn: a lambda" in lines
    assert not [name for name in tmp_path.glob("c/*") if name.name != "files"]


def mapped(row, prefix=""):
    return {"text": prefix + row["output"]}


def holder(prefix):
    def inner(row):
        return {"text": prefix + row["output"]}

    return inner


def test_what_makes_a_function(tmp_path, monkeypatch):
    assert function_digest(mapped) == function_digest(mapped)
    partials = [functools.partial(mapped, prefix=p) for p in ("a", "b")]
    held = [holder(p) for p in ("a", "b")]
    assert len({function_digest(f) for f in (mapped, *partials, *held)}) == 5
    for bad, why in (
        (lambda row: row, "a lambda"),
        (holder(object()), "variables around it are no plain data"),
        (functools.partial(mapped, prefix=object()), "its arguments are no plain data"),
        (mapped.__get__(3), "is no plain function"),
    ):
        with pytest.raises(NotKeyable, match=why):
            function_digest(bad)
    exec("def made(row): return row", scope := {"__name__": "nowhere"})
    with pytest.raises(NotKeyable, match="made has no source file"):
        function_digest(scope["made"])


def test_the_modules_behind_a_function_count(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "behind_x.py").write_text("WORD = 'a'\n")
    (tmp_path / "front_x.py").write_text("import behind_x\ndef f(row): return behind_x.WORD\n")
    function = importlib.import_module("front_x").f
    before = function_digest(function)
    (tmp_path / "behind_x.py").write_text("WORD = 'b'\n")
    behind = function_digest(function)
    (tmp_path / "front_x.py").write_text("import behind_x\ndef f(row): return 1\n")
    assert len({before, behind, function_digest(function)}) == 3


def test_a_damaged_entry_is_made_again(tmp_path, data, said):
    folder = tmp_path / "c"
    first = make(data, folder)
    entry = folder / entries(folder)[0]
    with (entry / "input_ids.bin").open("r+b") as file:
        file.truncate(8)
    with pytest.raises(DamagedStore, match="its files hold"):
        open_rows(entry)
    second = make(data, folder)
    assert "the entry is not used" in said[1]
    assert "what changed since" in said[-1]
    assert "the entry is damaged" in said[-1]
    assert second.fingerprint == first.fingerprint
    assert open_rows(entry).digest == first._packed.rows.digest


def test_a_failed_build_leaves_nothing(tmp_path, data):
    with Path(data).open("a") as file:
        file.write("\n{oops")
    with pytest.raises(ValueError, match="a.jsonl:13: not valid JSON"):
        make(data, tmp_path / "c")
    assert entries(tmp_path / "c") == []


def test_a_file_that_changes_while_it_is_read(tmp_path, data):
    def growing(row):
        write(tmp_path / "a.jsonl", num_rows=30)
        return {"text": "x"}

    for folder in (tmp_path / "c", False):
        write(tmp_path / "a.jsonl")
        with pytest.raises(ValueError, match="a.jsonl changed while it was read.*Start again"):
            TextDataset(data, tokenizer=tiny_tokenizer(), map_fn=growing, cache=folder)
    assert entries(tmp_path / "c") == []


def test_a_full_disk(tmp_path, data, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    folder = tmp_path / "c"
    monkeypatch.setattr("xtuner_lite.data.store._ArrayFile.write", full)
    with pytest.raises(DataCacheError, match="No space left on device.*cache=False.*cache='/ano"):
        make(data, folder)
    assert entries(folder) == []
    assert not list(folder.glob(".building-*"))
    monkeypatch.undo()
    assert len(make(data, folder)) > 0


def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        data = write(tmp_path / "a.jsonl", num_rows=20_000)
        with pytest.raises(DataCacheError, match="cannot be written: No space left on device"):
            make(data, disk)
        assert entries(disk) == []
        assert not list(disk.glob(".building-*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_made(tmp_path, data):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataCacheError, match="cannot be written: Not a directory.*cache=False"):
        make(data, tmp_path / "file" / "c")


@pytest.mark.parametrize("value", [True, None, "", 3])
def test_a_wrong_option(data, value):
    with pytest.raises(
        ValueError, match="cache=.* is unknown; allowed: 'auto', False, or a folder"
    ):
        make(data, value)


SCRIPT = """
import sys, time
from tests.tiny import tiny_tokenizer
from xtuner_lite.data import dataset
from xtuner_lite.data.map_fns.alpaca import alpaca_map_fn
folder, data, seconds, num_proc = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
def slow(chunks):
    for chunk in chunks:
        time.sleep(seconds)
        yield chunk
encode = dataset.encode_chunks
dataset.encode_chunks = lambda *args: slow(encode(*args))
print("start", flush=True)
made = dataset.ChatDataset(data, tokenizer=tiny_tokenizer(), max_length=64, cache=folder,
                           num_proc=num_proc)
print(made.fingerprint, flush=True)
"""


def start(folder, data, seconds, num_proc=1):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), data, str(seconds), str(num_proc)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_two_processes_build_once(tmp_path, data):
    processes = [start(tmp_path / "c", data, 1.0) for _ in range(2)]
    texts = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert texts[0].split()[-1] == texts[1].split()[-1]
    together = "".join(texts)
    assert together.count("is prepared for the first time") == 1
    assert together.count("is taken from") == 1
    assert len(entries(tmp_path / "c")) == 1


@pytest.mark.parametrize("num_proc", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_while_building(tmp_path, num_proc):
    folder = tmp_path / "c"
    data = write(tmp_path / "a.jsonl", num_rows=3000)
    process = start(folder, data, 0.3, num_proc)
    deadline = time.monotonic() + 60
    while not (list(folder.glob(".building-*/input_ids.bin")) if folder.is_dir() else []):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [name.startswith(".building-") for name in entries(folder)] == [True]
    made = make(data, folder)
    assert made.ledger.rows_kept == 3000
    assert [name.startswith(".building-") for name in entries(folder)] == [False]
    assert made.fingerprint == make(data, False).fingerprint
