"""Random rows of known truth: every bad one reported with its place, the good ones untouched."""

import random

import pytest

from tests.reliability import fuzz_rows
from tests.tiny import tiny_tokenizer
from xtuner_lite.data import ledger
from xtuner_lite.data.dataset import ChatDataset


@pytest.fixture(autouse=True)
def _restore(monkeypatch):
    monkeypatch.setattr(ledger, "NUM_EXAMPLES", ledger.NUM_EXAMPLES)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("name", fuzz_rows.SOURCES)
def test_a_sample_of_fuzzed_rows(name, suffix, tmp_path):
    found = fuzz_rows.compare(tmp_path, name, 120, seed=0, suffix=suffix)
    assert found["wrong"] == []
    assert found["rows"] > 50
    assert min(found[fuzz_rows.GOOD], found[fuzz_rows.BAD]) > 15


@pytest.mark.parametrize("name", fuzz_rows.SOURCES)
def test_one_bad_row_stops_a_run_that_does_not_skip(name, tmp_path):
    rng, source = random.Random(name), fuzz_rows.SOURCES[name]
    rows = [fuzz_rows.make_row(rng, source) for _ in range(60)]
    bad = [row for row in rows if row.truth == fuzz_rows.BAD]
    assert len(bad) > 10
    path = tmp_path / "a.jsonl"
    for row in bad:
        path.write_bytes(b"\n" + row.line + b"\n")
        with pytest.raises(ValueError, match=r"a\.jsonl:2: .*on_bad_row='skip'"):
            ChatDataset(str(path), tokenizer=tiny_tokenizer(), map_fn=source.map_fn, cache=False)


@pytest.mark.slow
@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("name", fuzz_rows.SOURCES)
def test_10000_fuzzed_rows(name, num_proc, tmp_path):
    for suffix in (".jsonl", ".json"):
        found = fuzz_rows.compare(tmp_path, name, 2000, seed=1, suffix=suffix, num_proc=num_proc)
        assert found["wrong"] == []
    assert found["rows"] > 1000
