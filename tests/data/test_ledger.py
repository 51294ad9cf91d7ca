"""The ledger's sums and its table."""

import json

import pytest

from xtuner_lite.data.ledger import Ledger


def filled() -> Ledger:
    ledger = Ledger(name="my.json", rows_read=5, num_samples=1, capacity=40)
    ledger.keep((20, 8), [(20, 8)], eos_learnt=True)
    ledger.keep((16, 7), [(10, 4)], eos_learnt=False, eos_cut=True)
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
        "rows with their end learnt 1 50.0%",
        "end cut off by max_length 1 50.0%",
        "tokens cut off 6 16.7%",
        "supervised ones 3 20.0%",
        "tokens 30",
        "tokens supervised 12 40.0%",
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


def test_split_rows_and_tools():
    ledger = Ledger(rows_read=2)
    ledger.keep((50, 20), [(30, 12), (28, 8)], eos_learnt=True)  # 58 tokens: 8 are there twice
    ledger.offer_tools(written=False)
    ledger.keep((10, 5), [(10, 5)], eos_learnt=False)
    ledger.lose_supervised(1)
    ledger.check()
    assert (ledger.rows_split, ledger.rows_truncated, ledger.tokens_repeated) == (1, 0, 8)
    assert (ledger.tokens, ledger.tokens_supervised, ledger.supervised_truncated) == (68, 24, 1)
    assert ledger.rows_eos_missing == 1
    report = " ".join(ledger.report().split())
    assert "rows split into pieces 1 50.0%" in report
    assert "no end token, or not learnt 1" in report
    assert "rows with tools 1 50.0% not written by the template! 1" in report
    assert "tokens repeated as context 8" in report


def test_a_ledger_comes_back_from_json():
    ledger = filled()
    ledger.notes.append("a note")
    total = Ledger(name="all", parts=[ledger])
    total.add(ledger)
    assert Ledger.from_dict(json.loads(json.dumps(total.to_dict()))) == total
    assert total.report().startswith("my.json: what each row teaches\n  note: a note")


def test_sums_of_tokens_that_do_not_agree_are_our_bug():
    ledger = filled()
    ledger.tokens += 1
    with pytest.raises(AssertionError, match="31 tokens, but 36 encoded, 6 truncated, 0 repeated"):
        ledger.check()
    ledger = filled()
    ledger.tokens_supervised -= 1
    with pytest.raises(AssertionError, match="11 tokens supervised, but 15 encoded and 3 trunc"):
        ledger.check()


def test_a_row_that_is_not_accounted_for_is_our_bug():
    with pytest.raises(AssertionError, match="1 rows read, but 0 kept and 0 skipped"):
        Ledger(rows_read=1).check()
