"""The report on a data set: every number counted by hand."""

import numpy as np

from tests.tiny import tiny_tokenizer
from xtuner_lite.data.report import examine, format_overlap, format_report


def sample(tokenizer, *rows: tuple[str, str, str]) -> dict:
    """Packed rows of (name, prompt, answer); the answer and <|im_end|> are learnt."""
    ids, labels, lengths, names = [], [], [], []
    for name, prompt, answer in rows:
        head, tail = tokenizer(prompt)["input_ids"], tokenizer(answer + "<|im_end|>")["input_ids"]
        ids += head + tail
        labels += [-100] * len(head) + tail
        lengths.append(len(head) + len(tail))
        names.append(name)
    return {
        "input_ids": np.array(ids),
        "labels": np.array(labels),
        "lengths": lengths,
        "row_ids": names,
    }


def data():
    tokenizer = tiny_tokenizer()
    rows = [
        sample(tokenizer, ("d:1", "zq", "q"), ("d:2", "zqzq", "qqq")),  # 2 + 2 and 4 + 4 tokens
        sample(tokenizer, ("d:3", "zq", "q"), ("d:4", "zq", " \n")),  # a copy; nothing answered
        sample(tokenizer, ("d:5", "zzz", "")),  # only the end of a turn
    ]
    return rows, tokenizer


def test_counts():
    report = examine(*data())
    assert report.num_samples == 3
    assert report.lengths.tolist() == [4, 8, 4, 5, 4]
    assert report.learnt.tolist() == [2, 4, 2, 3, 1]
    assert report.longest == [(8, 4, "d:2"), (5, 3, "d:4"), (4, 2, "d:3"), (4, 2, "d:1"),
                              (4, 1, "d:5")]  # fmt: skip
    assert (report.num_copies, report.copies) == (1, [("d:3", "d:1")])
    assert (report.num_empty, report.empty) == (2, ["d:4", "d:5"])
    assert report.num_unlearnt == 0


def test_the_text_shows_bars_and_rows():
    text = format_report(examine(*data()))
    assert "tokens of a row: least 4, median 4, mean 5, 95 % within 7, most 8" in text
    # lengths 4 4 4 5 8: bins of one token, the longest bar 40 signs, 1 of 3 rows is 13 of them
    assert f"  4         3 {'#' * 40}\n" in text
    assert f"  5         1 {'#' * 13}\n" in text
    assert "  6         0\n" in text
    assert "copies of another row (all tokens equal): 1 (20.0%)\n  d:3 = d:1\n" in text
    assert "rows with an empty answer: 2 (40.0%)\n  d:4\n  d:5" in text


def test_only_the_first_samples_when_asked():
    assert examine(*data(), limit=1).lengths.tolist() == [4, 8]


def test_other_samples_have_no_report():
    assert examine([{"x": 1.0}], None) is None


def test_rows_of_the_validation_data_that_are_trained_on():
    rows, tokenizer = data()
    train, val = examine(rows[:1], tokenizer), examine(rows[1:], tokenizer)
    assert format_overlap(train, val, "val_dataloader") == (
        "rows of val_dataloader that are training rows too: 1 (33.3%)\n  d:3 = d:1"
    )


def test_names_are_few_and_an_ellipsis_says_so():
    tokenizer = tiny_tokenizer()
    report = examine([sample(tokenizer, (f"d:{i}", "zq", "")) for i in range(9)], tokenizer)
    text = format_report(report)
    assert text.endswith("  d:0\n  d:1\n  d:2\n  d:3\n  d:4\n  ...")
