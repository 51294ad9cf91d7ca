"""Two data sets compared row by row."""

import numpy as np
import pytest

from tests.tiny import tiny_tokenizer
from xtuner_lite.data.dataset import ChatDataset, TextDataset
from xtuner_lite.data.diff import Comparison, first_difference

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"Hi {number}"},
            {"role": "assistant", "content": "First"},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "Second"},
        ]
    }
    for number in range(4)
]


def chats(rows=CHATS, **options):
    return ChatDataset(rows, tokenizer=tiny_tokenizer(), max_length=200, **options)


def test_packing_changes_nothing():
    diff = Comparison(chats(packing="best_fit"), chats(packing="none")).diff
    assert diff.is_equal
    assert (diff.num_rows, diff.num_equal) == ((4, 4), 4)
    assert diff.num_tokens[0] == diff.num_tokens[1]


def test_labels_that_differ():
    comparison = Comparison(chats(), chats(train_on="last"))
    diff = comparison.diff
    assert diff.changed["labels differ"] == ["rows:1", "rows:2", "rows:3", "rows:4"]
    assert diff.num_tokens[0] == diff.num_tokens[1]
    # "First<|im_end|>" of each row is not learnt any more
    size = len(tiny_tokenizer()("First<|im_end|>")["input_ids"])
    assert diff.num_learnt[0] - diff.num_learnt[1] == 4 * size
    first, second = comparison.row(0, "rows:1"), comparison.row(1, "rows:1")
    at = first_difference(first, second)
    assert first.labels[at] == first.input_ids[at]
    assert second.labels[at] == -100
    assert (first.labels[:at] == second.labels[:at]).all()


def test_rows_that_changed_or_are_missing():
    changed = [*CHATS[:1], {"messages": [dict(m) for m in CHATS[1]["messages"]]}, CHATS[2]]
    changed[1]["messages"][3]["content"] = "Other"
    diff = Comparison(chats(), chats(changed)).diff
    assert diff.changed["tokens differ"] == ["rows:2"]
    assert diff.changed["only in A"] == ["rows:4"]
    assert diff.changed["only in B"] == []
    assert (diff.num_rows, diff.num_equal) == ((4, 3), 2)


def test_weights_that_differ():
    weighted = [{"messages": [dict(m) for m in row["messages"]]} for row in CHATS]
    weighted[2]["messages"][1]["loss"] = 0.5
    assert Comparison(chats(), chats(weighted)).diff.changed["weights differ"] == ["rows:3"]


def test_pieces_of_a_cut_row_are_joined():
    rows = [{"text": "one two three four five six seven eight nine ten"}]
    tokenizer = tiny_tokenizer()
    cut = TextDataset(rows, tokenizer=tokenizer, max_length=8)
    long = TextDataset(rows, tokenizer=tokenizer, max_length=100)
    comparison = Comparison(cut, long)
    assert len(cut) > 1
    # the tokens are the same; the first token of each later piece has no label any more
    assert comparison.diff.changed["labels differ"] == ["rows:1"]
    assert comparison.row(0, "rows:1").input_ids.tolist() == long[0]["input_ids"].tolist()
    assert first_difference(comparison.row(0, "rows:1"), comparison.row(1, "rows:1")) == 8


def test_samples_without_names_cannot_be_compared():
    nameless = [{"input_ids": np.array([1, 2]), "labels": np.array([-100, 2])}]
    with pytest.raises(ValueError, match="sample 0 names no rows"):
        Comparison(nameless, nameless)
