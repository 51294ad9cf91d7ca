"""Collators: a list of samples -> one Batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from xtuner_lite.registry import COLLATORS
from xtuner_lite.structures import IGNORE_INDEX, Batch


@COLLATORS.register_module()
def packed_collate(
    samples: Sequence[dict[str, Any]],
    *,
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
) -> Batch:
    """Right-padded batch whose position ids restart at every segment; there is no attention mask.

    The padding behind a sample is a segment of its own, so no real token ever attends to it.

    Args:
        samples: B dicts with ``input_ids`` and ``labels`` [T_b], ``lengths`` (tokens of each
            segment, their sum is T_b), ``row_ids`` and, if any has them, ``loss_weights`` [T_b].
        pad_token_id: fills ``input_ids`` behind each sample.
        pad_to_multiple_of: tokens; rounds the padded length up, None pads to the longest sample.

    Returns:
        Batch with input_ids, labels, position_ids int64 [B, T]; cu_seqlens int32 [S + 1];
        loss_weights float32 [B, T] if a sample has them; num_tokens; row_ids.

    Raises:
        ValueError: no samples, or the segments of a sample do not add up to its tokens.
    """
    if not samples:
        raise ValueError("packed_collate got no samples; a micro-batch holds at least one")
    longest = max(len(sample["input_ids"]) for sample in samples)
    if pad_to_multiple_of:
        longest = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    shape = (len(samples), longest)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    position_ids = np.empty(shape, dtype=np.int64)
    weights = None
    if any(sample.get("loss_weights") is not None for sample in samples):
        weights = np.ones(shape, dtype=np.float32)
    segments: list[int] = []
    for index, sample in enumerate(samples):
        size = len(sample["input_ids"])
        lengths = _segment_lengths(sample, size)
        if longest > size:
            lengths = [*lengths, longest - size]
        input_ids[index, :size] = sample["input_ids"]
        labels[index, :size] = sample["labels"]
        position_ids[index] = np.concatenate([np.arange(length) for length in lengths])
        if weights is not None and sample.get("loss_weights") is not None:
            weights[index, :size] = sample["loss_weights"]
        segments += lengths
    # A segment's first token cannot be predicted from the segment; a label there would be learnt
    # from the segment before it.
    starts = position_ids == 0
    labels[starts] = IGNORE_INDEX
    batch = Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *segments], dtype=np.int32)),
        num_tokens=sum(len(sample["input_ids"]) for sample in samples),
        row_ids=[list(sample["row_ids"]) for sample in samples],
    )
    if weights is not None:
        batch["loss_weights"] = torch.from_numpy(weights)
    return batch


def _segment_lengths(sample: dict[str, Any], size: int) -> list[int]:
    lengths = [int(length) for length in sample["lengths"]]
    if sum(lengths) != size or min(lengths, default=0) < 1 or len(sample["labels"]) != size:
        raise ValueError(
            f"a sample of {size} tokens has {len(sample['labels'])} labels and segments of "
            f"{lengths} tokens (rows {sample['row_ids'][:3]}); the segments must be at least 1 "
            "long and add up to the tokens. Correct the dataset's __getitem__."
        )
    return lengths
