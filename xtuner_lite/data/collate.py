"""Collators: a list of samples -> one Batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from xtuner_lite.images.files import ImageError
from xtuner_lite.registry import COLLATORS
from xtuner_lite.structures import IGNORE_INDEX, Batch

if TYPE_CHECKING:
    from xtuner_lite.images.vision_inputs import VisionInputs

#: What a sample must hold.
SAMPLE_KEYS = ("input_ids", "labels", "lengths", "row_ids")


class SampleError(ValueError):
    """A data set gave a sample of the wrong form.

    Args:
        position: of the sample in its micro-batch.
        message: what is wrong with it and what to do.
    """

    def __init__(self, position: int, message: str) -> None:
        super().__init__(message)
        self.position = position

    def __reduce__(self) -> tuple[type[SampleError], tuple[int, str]]:
        return SampleError, (self.position, str(self))


@COLLATORS.register_module()
def packed_collate(
    samples: Sequence[dict[str, Any]],
    *,
    pad_token_id: int | None,
    pad_to_multiple_of: int | None = None,
    pad_to_max_length: bool = False,
    max_length: int | None = None,
    vision: VisionInputs | None = None,
) -> Batch:
    """Right-padded batch whose position ids restart at every segment; there is no attention mask.

    The padding behind a sample is a segment of its own, so no real token ever attends to it.

    Args:
        samples: B dicts with ``input_ids`` and ``labels`` [T_b], ``lengths`` (tokens of each
            segment, their sum is T_b), ``row_ids`` and, if any has them, ``loss_weights`` [T_b];
            in a mixture also ``sources`` (one index a segment) and ``source_names``; ``images``, of
            each segment the list of its images (ImageRef), where there are any.
        pad_token_id: fills ``input_ids`` behind each sample. Given by the Runner.
        pad_to_multiple_of: tokens; rounds the padded length up, so that few lengths occur. None
            pads to the longest sample.
        pad_to_max_length: pad to ``max_length``, so that all batches have one shape.
        max_length: tokens; given by the Runner, from the data set.
        vision: of a vision tokenizer (given by the Runner): the batch gets ``images``, a batch
            without any those of a filler segment, a blank image that teaches nothing, so that every
            rank runs the vision tower at every step.

    Returns:
        Batch with input_ids, labels, position_ids int64 [B, T]; cu_seqlens int32 [S + 1];
        loss_weights float32 [B, T] if a sample has them; segment_sources int64 [S] and source_names
        in a mixture; num_tokens; row_ids; images and num_images with ``vision``.

    Raises:
        SampleError: a sample is of the wrong form, or an image of it cannot be read any more; it
            says which and how.
        ValueError: no samples, or no length or token to pad with.
    """
    if not samples:
        raise ValueError("packed_collate got no samples; a micro-batch holds at least one")
    all_lengths = [_checked_lengths(sample, index) for index, sample in enumerate(samples)]
    num_tokens = sum(map(sum, all_lengths))
    images: dict[str, Any] = {}
    if vision is not None:
        images, samples, all_lengths = _with_images(samples, all_lengths, vision)
    elif any(sample.get("images") for sample in samples):
        raise ValueError(
            "samples with images, and the collate_fn has no vision=; use a vision tokenizer "
            "(load_processor or load_llava_processor)"
        )
    sizes = [sum(lengths) for lengths in all_lengths]
    width = _padded_width(max(sizes), pad_to_multiple_of, pad_to_max_length, max_length)
    if pad_token_id is None and min(sizes) < width:
        raise ValueError(
            "samples of different lengths have to be padded, and the tokenizer has no pad token. "
            "Set tokenizer.pad_token, or collate_fn=dict(type=packed_collate, pad_token_id=0)."
        )
    shape = (len(samples), width)
    input_ids = np.full(shape, 0 if pad_token_id is None else pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    position_ids = np.empty(shape, dtype=np.int64)
    weights = None
    if any(sample.get("loss_weights") is not None for sample in samples):
        weights = np.ones(shape, dtype=np.float32)
    segments: list[int] = []
    for index, (sample, lengths, size) in enumerate(zip(samples, all_lengths, sizes)):
        padded = [*lengths, width - size] if width > size else lengths
        input_ids[index, :size] = sample["input_ids"]
        labels[index, :size] = sample["labels"]
        position_ids[index] = np.concatenate([np.arange(length) for length in padded])
        if weights is not None and sample.get("loss_weights") is not None:
            weights[index, :size] = sample["loss_weights"]
        segments += padded
    # A segment's first token cannot be predicted from the segment; a label there would be learnt
    # from the segment before it.
    starts = position_ids == 0
    labels[starts] = IGNORE_INDEX
    batch = Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *segments], dtype=np.int32)),
        num_tokens=num_tokens,
        row_ids=[list(sample["row_ids"]) for sample in samples],
        **images,
    )
    if weights is not None:
        batch["loss_weights"] = torch.from_numpy(weights)
    if all("source_names" in sample for sample in samples):
        sources = [_sources(s, size < width) for s, size in zip(samples, sizes)]
        batch["segment_sources"] = torch.tensor([one for row in sources for one in row])
        batch["source_names"] = list(samples[0]["source_names"])
    return batch


def _with_images(
    samples: Sequence[dict[str, Any]], all_lengths: list[list[int]], vision: VisionInputs
) -> tuple[dict[str, Any], list[dict[str, Any]], list[list[int]]]:
    """(images and num_images of the batch, the samples, their lengths); a filler where none is."""
    pictures = []
    for position, sample in enumerate(samples):
        try:
            for refs in sample.get("images") or ():
                pictures += [ref.open() for ref in refs]
        except ImageError as error:
            raise SampleError(position, str(error)) from error
    samples, all_lengths = list(samples), list(all_lengths)
    if pictures:
        inputs = vision.model_inputs(pictures)
    else:
        ids, inputs = vision.filler()
        shortest = min(range(len(samples)), key=lambda index: sum(all_lengths[index]))
        samples[shortest] = _with_filler(samples[shortest], ids)
        all_lengths[shortest] = [*all_lengths[shortest], len(ids)]
    return {"images": inputs, "num_images": len(pictures)}, samples, all_lengths


def _with_filler(sample: dict[str, Any], ids: list[int]) -> dict[str, Any]:
    """The sample and behind it a segment of the ids, without labels."""
    filled = {
        **sample,
        "input_ids": np.concatenate([sample["input_ids"], ids]),
        "labels": np.concatenate([sample["labels"], np.full(len(ids), IGNORE_INDEX)]),
    }
    if sample.get("loss_weights") is not None:
        filled["loss_weights"] = np.concatenate([sample["loss_weights"], np.ones(len(ids))])
    if "sources" in sample:
        filled["sources"] = [*sample["sources"], -1]
    return filled


def _sources(sample: dict[str, Any], padded: bool) -> list[int]:
    """The source of each segment; -1 for padding."""
    return [*sample["sources"], -1] if padded else list(sample["sources"])


def _padded_width(
    longest: int, multiple: int | None, to_max_length: bool, max_length: int | None
) -> int:
    if to_max_length:
        if max_length is None or longest > max_length:
            raise ValueError(
                f"pad_to_max_length=True with max_length={max_length!r} and a sample of {longest} "
                "tokens; set max_length in the data set (or in collate_fn) to the longest sample, "
                "or use pad_to_multiple_of"
            )
        longest = max_length
    return -(-longest // multiple) * multiple if multiple else longest


def _checked_lengths(sample: Any, position: int) -> list[int]:
    """Tokens of each segment of a sample of the right form."""
    if not isinstance(sample, Mapping):
        raise SampleError(
            position, f"it is a {type(sample).__name__} ({sample!r:.60}), not a dict. {_ADVICE}"
        )
    missing = [key for key in SAMPLE_KEYS if key not in sample]
    if missing:
        raise SampleError(
            position,
            f"it has the keys {', '.join(map(str, sample)) or 'none'}; missing: "
            f"{', '.join(missing)}. {_ADVICE}",
        )
    for key in ("input_ids", "labels"):
        array = np.asarray(sample[key])
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise SampleError(
                position,
                f"its {key} have the shape {array.shape} and the type {array.dtype}; they must be "
                f"integers in one row, [T]. {_ADVICE}",
            )
    size = len(sample["input_ids"])
    lengths = [int(length) for length in sample["lengths"]]
    if sum(lengths) != size or min(lengths, default=0) < 1 or len(sample["labels"]) != size:
        raise SampleError(
            position,
            f"a sample of {size} tokens has {len(sample['labels'])} labels and segments of "
            f"{lengths} tokens (rows {sample['row_ids'][:3]}); the segments must be at least 1 "
            "long and add up to the tokens. Correct the dataset's __getitem__.",
        )
    return lengths


_ADVICE = (
    "A data set gives tokens: let ChatDataset or TextDataset make them from rows (data=...), write "
    "__getitem__ as docs/howto/add_a_dataset.md shows, or set a collate_fn for this form."
)
