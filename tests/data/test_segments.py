"""Samples taken apart into rows, and rows found again."""

import numpy as np
import pytest

from xtuner_lite.data.segments import (
    has_tokens,
    rows_alone,
    samples_with_row,
    segments_of,
    walk_segments,
)

SAMPLE = {
    "input_ids": np.array([5, 6, 7, 8, 9]),
    "labels": np.array([-100, 6, 7, -100, 9]),
    "loss_weights": np.array([1, 0.5, 0.5, 1, 2], dtype=np.float32),
    "lengths": [3, 2],
    "row_ids": ["folder/a.json:1", "folder/a.json:12"],
}


def test_a_sample_is_cut_at_its_borders():
    first, second = segments_of(SAMPLE, 4)
    assert (first.sample, first.number, first.row_id, len(first)) == (4, 0, "folder/a.json:1", 3)
    assert first.learnt.tolist() == [False, True, True]
    assert first.target_weights.tolist() == [0.0, 0.5, 0.5]
    assert second.input_ids.tolist() == [8, 9]
    assert second.target_weights.tolist() == [0.0, 2.0]


def test_a_plain_sample_is_one_segment_without_a_name():
    (only,) = segments_of({"input_ids": [1, 2], "labels": [-100, 2]})
    assert (only.row_id, len(only), only.target_weights.tolist()) == ("?", 2, [0.0, 1.0])
    assert has_tokens(SAMPLE)
    assert not has_tokens({"x": 1})
    assert not has_tokens((1, 2))


def test_the_source_in_a_mixture():
    mixed = {**SAMPLE, "sources": [1, 1], "source_names": ["own", "general"]}
    assert [segment.title for segment in segments_of(mixed)] == [
        "general: folder/a.json:1",
        "general: folder/a.json:12",
    ]
    assert segments_of(SAMPLE)[0].title == "folder/a.json:1"


def test_segments_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match=r"sample 3 has 5 tokens, 5 labels and segments of \[3\]"):
        segments_of({**SAMPLE, "lengths": [3]}, 3)


def test_walking_stops_at_the_limit():
    assert len(list(walk_segments([SAMPLE] * 3))) == 6
    assert [segment.sample for segment in walk_segments([SAMPLE] * 3, limit=1)] == [0, 0]


def test_rows_are_found_by_their_name_or_its_end():
    other = {**SAMPLE, "row_ids": ["folder/a.json:2", "folder/a.json:112"]}
    for name in ("folder/a.json:12", "a.json:12", ":12"):
        assert samples_with_row([other, SAMPLE], name) == [1]
    assert samples_with_row([other, SAMPLE], ":112") == [0]
    with pytest.raises(
        KeyError, match=r"no sample holds the row '12'; rows are called like folder"
    ):
        samples_with_row([other, SAMPLE], "12")


def test_a_row_alone():
    alone = rows_alone(SAMPLE, ":12")
    assert alone["input_ids"].tolist() == [8, 9]
    assert alone["labels"].tolist() == [-100, 9]
    assert alone["loss_weights"].tolist() == [1, 2]
    assert (alone["lengths"], alone["row_ids"]) == ([2], ["folder/a.json:12"])
