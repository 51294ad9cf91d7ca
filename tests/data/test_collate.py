"""packed_collate by hand."""

import numpy as np
import pytest
import torch

from xtuner_lite.data.collate import packed_collate

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
