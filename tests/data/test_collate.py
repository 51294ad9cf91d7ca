"""packed_collate by hand."""

import pickle

import numpy as np
import pytest
import torch

from xtuner_lite.data.collate import SampleError, packed_collate

LONG = dict(input_ids=np.array([5, 6, 7, 8, 9]), labels=np.array([-100, 6, 7, 8, 9]),
            lengths=[2, 3], row_ids=["a:1", "a:2"])  # fmt: skip
SHORT = dict(input_ids=np.array([1, 2, 3]), labels=np.array([-100, -100, 3]),
             lengths=[3], row_ids=["b:1"])  # fmt: skip


def test_by_hand():
    batch = packed_collate([LONG, SHORT], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, 0, 0]]
    # The label 7 stood on the first token of a segment: it would be learnt across the border.
    assert batch["labels"].tolist() == [[-100, 6, -100, 8, 9], [-100, -100, 3, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]
    assert batch["cu_seqlens"].tolist() == [0, 2, 5, 8, 10]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert {batch[key].dtype for key in ("input_ids", "labels", "position_ids")} == {torch.int64}
    assert batch["num_tokens"] == 8
    assert batch["row_ids"] == [["a:1", "a:2"], ["b:1"]]
    assert "attention_mask" not in batch
    assert "loss_weights" not in batch


def test_padding_to_a_multiple_is_a_segment_of_its_own():
    batch = packed_collate([SHORT], pad_token_id=9, pad_to_multiple_of=4)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 4]


def test_weights_of_one_sample_give_ones_to_the_others():
    weighted = {**SHORT, "loss_weights": np.array([1, 1, 0.5], dtype=np.float32)}
    batch = packed_collate([LONG, weighted], pad_token_id=0)
    assert batch["loss_weights"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0.5, 1, 1]]


def test_errors():
    with pytest.raises(ValueError, match="no samples"):
        packed_collate([], pad_token_id=0)
    with pytest.raises(ValueError, match=r"5 tokens has 5 labels and segments of \[2, 2\]"):
        packed_collate([{**LONG, "lengths": [2, 2]}], pad_token_id=0)


def test_padding_to_max_length():
    batch = packed_collate([SHORT, LONG], pad_token_id=9, pad_to_max_length=True, max_length=6)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, 9, 9], [5, 6, 7, 8, 9, 9]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 6, 8, 11, 12]
    for max_length in (4, None):
        with pytest.raises(ValueError, match=f"max_length={max_length} and a sample of 5 tokens"):
            packed_collate([LONG], pad_token_id=0, pad_to_max_length=True, max_length=max_length)


def test_without_a_pad_token_only_equal_lengths_go():
    assert packed_collate([LONG], pad_token_id=None)["num_tokens"] == 5
    with pytest.raises(ValueError, match="the tokenizer has no pad token"):
        packed_collate([LONG, SHORT], pad_token_id=None)


def test_sources_of_segments_and_of_padding():
    names = ["a", "b"]
    samples = [
        {**LONG, "sources": [1, 1], "source_names": names},
        {**SHORT, "sources": [0], "source_names": names},
    ]
    batch = packed_collate(samples, pad_token_id=0)
    assert batch["segment_sources"].tolist() == [1, 1, 0, -1]  # one for each of cu_seqlens
    assert batch["source_names"] == names
    assert "segment_sources" not in packed_collate([LONG], pad_token_id=0)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"text": "a"}, "it has the keys text; missing: input_ids, labels, lengths, row_ids. A da"),
        ({k: v for k, v in SHORT.items() if k != "row_ids"}, "missing: row_ids. A data set gives"),
        ({}, "it has the keys none; missing"),
        ("hello", "it is a str .'hello'., not a dict. A data set gives tokens"),
        ({**SHORT, "input_ids": np.ones((1, 3), int)}, r"its input_ids have the shape \(1, 3\)"),
        ({**SHORT, "labels": np.ones(3)}, "labels have the shape .3,. and the type float64; they"),
    ],
)
def test_a_sample_of_the_wrong_form(sample, message):
    with pytest.raises(SampleError, match=message) as caught:
        packed_collate([SHORT, sample], pad_token_id=0)
    assert caught.value.position == 1
    again = pickle.loads(pickle.dumps(caught.value))  # it comes out of a worker process
    assert (again.position, str(again)) == (1, str(caught.value))
