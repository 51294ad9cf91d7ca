"""The ledger's sums and its table."""

import json

import pytest

from xtuner_lite.data.ledger import Ledger


def filled() -> Ledger:
    ledger = Ledger(name="my.json", rows_read=5, num_samples=1, capacity=40)
    ledger.keep(20, 8, 0, eos_learnt=True)
    ledger.keep(10, 4, 6, eos_learnt=False)
    for line in (3, 4, 5):
        ledger.skip("bad row", f"my.json:{line}", "not JSON")
    return ledger


def test_counts_and_report():
    ledger = filled()
    ledger.check()
    assert (ledger.rows_kept, ledger.rows_skipped) == (2, 3)
    assert (ledger.tokens, ledger.tokens_supervised, ledger.tokens_truncated) == (30, 12, 6)
    assert (ledger.rows_truncated, ledger.rows_eos_learnt, ledger.fill) == (1, 1, 0.75)
    lines = [" ".join(line.split()) for line in ledger.report().splitlines()]
    assert lines == [
        "my.json: what each row teaches",
        "rows read 5",
        "rows kept 2 40.0%",
        "rows skipped 3 60.0%",
        "bad row 3 60.0%",
        "my.json:3: not JSON",
        "my.json:4: not JSON",
        "my.json:5: not JSON",
        "rows truncated 1 50.0%",
        "tokens cut off 6 16.7%",
        "tokens 30",
        "tokens supervised 12 40.0%",
        "rows with their end learnt 1 50.0%",
        "samples 1",
        "packed full to 75.0%",
    ]


def test_it_is_json_and_adds_up():
    total = Ledger(name="all")
    total.add(filled())
    total.add(filled())
    total.check()
    found = json.loads(json.dumps(total.to_dict()))
    assert found["rows_read"] == 10
    assert found["skipped"]["bad row"]["rows"] == 6
    assert len(found["skipped"]["bad row"]["examples"]) == 3
    assert found["tokens_supervised"] == 24


def test_a_row_that_is_not_accounted_for_is_our_bug():
    with pytest.raises(AssertionError, match="1 rows read, but 0 kept and 0 skipped"):
        Ledger(rows_read=1).check()
