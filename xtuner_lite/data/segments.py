"""The rows inside samples: any data set's samples, taken apart at the borders of their segments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from xtuner_lite.structures import IGNORE_INDEX


@dataclass(frozen=True)
class Segment:
    """One row, or one piece of a row that was cut, as it stands in a sample. T tokens."""

    sample: int
    """Index of its sample in the data set."""
    number: int
    """Its place in the sample, from 0."""
    row_id: str
    """'file:line' of its row; '?' if the data set does not say."""
    input_ids: np.ndarray
    """int [T]."""
    labels: np.ndarray
    """int [T], IGNORE_INDEX where nothing is learnt."""
    weights: np.ndarray | None = None
    """float32 [T]; None: all 1."""
    source: str | None = None
    """Its data set in a mixture."""
    images: tuple[Any, ...] = ()
    """Its images (ImageRef), in the order of their tokens."""

    @property
    def title(self) -> str:
        """Its row, and its data set in a mixture."""
        return self.row_id if self.source is None else f"{self.source}: {self.row_id}"

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def learnt(self) -> np.ndarray:
        """bool [T], True where the token is a target."""
        return self.labels != IGNORE_INDEX

    @property
    def target_weights(self) -> np.ndarray:
        """float32 [T], what each token counts in the loss; 0 where nothing is learnt."""
        learnt = self.learnt.astype(np.float32)
        return learnt if self.weights is None else learnt * self.weights


def has_tokens(sample: Any) -> bool:
    """Whether a sample has the form that token data sets share: input_ids and labels."""
    return isinstance(sample, dict) and "input_ids" in sample and "labels" in sample


def segments_of(sample: dict[str, Any], index: int = 0) -> list[Segment]:
    """The segments of one sample.

    Args:
        sample: what ``dataset[index]`` returns; without ``lengths`` it is one segment.
        index: of the sample, kept in each segment.

    Raises:
        ValueError: the segments or labels do not fit the tokens.
    """
    input_ids, labels = np.asarray(sample["input_ids"]), np.asarray(sample["labels"])
    lengths = [int(length) for length in sample.get("lengths", [len(input_ids)])]
    if sum(lengths) != len(input_ids) or len(labels) != len(input_ids):
        raise ValueError(
            f"sample {index} has {len(input_ids)} tokens, {len(labels)} labels and segments of "
            f"{lengths} tokens; the labels must be as many and the segments add up to the tokens. "
            "Correct the data set's __getitem__."
        )
    weights = sample.get("loss_weights")
    row_ids = list(sample.get("row_ids") or [])
    row_ids += ["?"] * (len(lengths) - len(row_ids))
    sources = [sample["source_names"][source] for source in sample.get("sources", ())]
    images = sample.get("images") or [()] * len(lengths)
    segments, start = [], 0
    for number, length in enumerate(lengths):
        part = slice(start, start + length)
        segments.append(
            Segment(
                index,
                number,
                row_ids[number],
                input_ids[part],
                labels[part],
                None if weights is None else np.asarray(weights)[part],
                sources[number] if sources else None,
                tuple(images[number]),
            )
        )
        start += length
    return segments


def walk_segments(dataset: Any, limit: int | None = None) -> Iterator[Segment]:
    """Every segment of a map-style data set, in its own order.

    Args:
        dataset: has ``len`` and indexing.
        limit: samples read at most; None reads all.
    """
    for index in range(num_samples(dataset, limit)):
        yield from segments_of(dataset[index], index)


def is_endless(dataset: Any) -> bool:
    """Whether a data set is a stream: indexed from 0 on, without a length."""
    return bool(getattr(dataset, "endless", False))


def num_samples(dataset: Any, limit: int | None = None) -> int:
    """Samples to look at: all of a data set, or at most ``limit``.

    Raises:
        ValueError: a stream, which has no end, without a limit.
    """
    if not is_endless(dataset):
        return len(dataset) if limit is None else min(limit, len(dataset))
    if limit is None:
        raise ValueError(
            "a stream has no end, so not all of it can be looked at; give ChatDataset in its "
            "place, with limit=N for the first N rows"
        )
    return limit


def samples_with_row(dataset: Any, row_id: str) -> list[int]:
    """Indices of the samples that hold a row.

    Args:
        dataset: has ``len`` and indexing.
        row_id: 'file:line' as reports print it, or its end ('data.json:12', ':12').

    Raises:
        KeyError: no sample holds it; a few row ids that exist are in the message.
    """
    found, seen = [], []
    for index in range(num_samples(dataset)):
        row_ids = [str(name) for name in dataset[index].get("row_ids") or []]
        seen += row_ids[: max(0, 3 - len(seen))]
        if any(_names_row(name, row_id) for name in row_ids):
            found.append(index)
    if not found:
        raise KeyError(
            f"no sample holds the row {row_id!r}; rows are called like "
            f"{', '.join(seen) or '(this data set names none)'}. A row that is missing was "
            "skipped: xtuner-lite check-data says why."
        )
    return found


def rows_alone(sample: dict[str, Any], row_id: str) -> dict[str, Any]:
    """The sample with only the segments of one row, see samples_with_row."""
    chosen = [s for s in segments_of(sample) if _names_row(str(s.row_id), row_id)]
    alone = {
        "input_ids": np.concatenate([segment.input_ids for segment in chosen]),
        "labels": np.concatenate([segment.labels for segment in chosen]),
        "lengths": [len(segment) for segment in chosen],
        "row_ids": [segment.title for segment in chosen],
    }
    if sample.get("loss_weights") is not None:
        alone["loss_weights"] = np.concatenate([segment.weights for segment in chosen])
    if sample.get("images") is not None:
        alone["images"] = [list(segment.images) for segment in chosen]
    return alone


def _names_row(name: str, wanted: str) -> bool:
    if name == wanted:
        return True
    head = name[: -len(wanted)] if wanted and name.endswith(wanted) else ""
    return bool(head) and (wanted.startswith(":") or head.endswith(("/", "\\")))
