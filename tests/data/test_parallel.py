"""Several processes give what one gives, in the same order."""

import os

import pytest

from tests.tiny import tiny_tokenizer
from xtuner_lite.data.dataset import ChatDataset


def test_two_processes_equal_one(monkeypatch):
    monkeypatch.setattr("xtuner_lite.data.parallel.CHUNK_ROWS", 10)
    rows = [{"instruction": f"{n}?", "output": "word " * (n % 9 + 1)} for n in range(35)]
    one = ChatDataset(rows, tokenizer=tiny_tokenizer(), max_length=64)
    two = ChatDataset(rows, tokenizer=tiny_tokenizer(), max_length=64, num_proc=2)
    assert one.ledger == two.ledger
    for a, b in zip(one, two, strict=True):
        assert a["input_ids"].tolist() == b["input_ids"].tolist()
        assert a["labels"].tolist() == b["labels"].tolist()


def worse_than_an_error(row):
    os._exit(3)  # as the system ends a process when memory runs out


def test_errors_of_a_process_come_through(monkeypatch):
    monkeypatch.setattr("xtuner_lite.data.parallel.CHUNK_ROWS", 2)
    options = dict(tokenizer=tiny_tokenizer(), max_length=64, num_proc=2)
    rows = [{"instruction": "a", "output": "b"}] * 9 + [{"instruction": "a", "output": 3}]
    with pytest.raises(ValueError, match="rows:10: 'output' is 3, not text.*Correct the row"):
        ChatDataset(rows, **options)
    kept = ChatDataset(rows, on_bad_row="skip", **options)
    assert kept.ledger.skipped["bad row"].count == 1
    with pytest.raises(RuntimeError, match="was killed from outside.*Lower num_proc .now 2."):
        ChatDataset(rows, map_fn=worse_than_an_error, **options)
