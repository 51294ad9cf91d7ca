"""Packing: which rows, or pieces of rows, share a sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Packing = Literal["best_fit", "concat", "none"]
PACKINGS: tuple[str, ...] = ("best_fit", "concat", "none")


@dataclass(frozen=True)
class Packs:
    """Samples as lists of pieces: piece p is tokens [start[p], end[p]) of row row[p].

    Sample s holds the pieces sample[s] .. sample[s + 1] - 1.
    """

    row: np.ndarray  # int64 [P]
    start: np.ndarray  # int64 [P]
    end: np.ndarray  # int64 [P]
    sample: np.ndarray  # int64 [S + 1]

    def __len__(self) -> int:
        return len(self.sample) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [S], tokens of each sample."""
        sums = np.concatenate([[0], np.cumsum(self.end - self.start)])
        return np.diff(sums[self.sample])


def pack(lengths: np.ndarray, max_length: int | None, packing: Packing) -> Packs:
    """Packs rows into samples of at most ``max_length`` tokens; a function of the lengths alone.

    Args:
        lengths: int [N], tokens of each row; none is 0.
        max_length: tokens; None is allowed with "none" only.
        packing: "best_fit" splits and drops nothing; "concat" joins the rows in order and cuts
            (pre-training); "none" makes one sample of each row.

    Raises:
        ValueError: unknown packing, no max_length, or a row longer than max_length ("best_fit").
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    check_packing(packing, max_length)
    if packing == "none":
        return _whole_rows(lengths, np.arange(len(lengths)), np.arange(len(lengths) + 1))
    assert max_length is not None  # check_packing
    if packing == "concat":
        return _concat(lengths, max_length)
    if len(lengths) and lengths.max() > max_length:
        raise ValueError(
            f"a row of {lengths.max()} tokens does not fit into max_length={max_length}; "
            "truncate or drop it first (overlong=), or raise max_length"
        )
    return _best_fit(lengths, max_length)


def check_packing(packing: str, max_length: int | None) -> None:
    """Raises ValueError for an unknown packing or one without the length that it needs."""
    if packing not in PACKINGS:
        raise ValueError(
            f"packing={packing!r} is unknown; allowed: {', '.join(map(repr, PACKINGS))}"
        )
    if packing != "none" and max_length is None:
        raise ValueError(
            f"packing={packing!r} needs max_length (tokens of a sample); set it, or packing='none'"
        )


def _whole_rows(lengths: np.ndarray, order: np.ndarray, sample: np.ndarray) -> Packs:
    return Packs(order, np.zeros(len(order), dtype=np.int64), lengths[order], sample)


def _best_fit(lengths: np.ndarray, max_length: int) -> Packs:
    """Best-fit decreasing: each row, longest first, goes where the least room is left over.

    ``open_rooms`` has bit r set while a bin with r tokens of room exists, so that the best bin is
    the lowest set bit at or above the row's length.
    """
    bins_by_room: list[list[int]] = [[] for _ in range(max_length + 1)]
    bin_of = np.empty(len(lengths), dtype=np.int64)
    open_rooms = 0
    num_bins = 0
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        fitting = open_rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = bins_by_room[room].pop()
            if not bins_by_room[room]:
                open_rooms ^= 1 << room
        else:
            room, chosen = max_length, num_bins
            num_bins += 1
        bin_of[row] = chosen
        left = room - length
        if left:
            if not bins_by_room[left]:
                open_rooms |= 1 << left
            bins_by_room[left].append(chosen)
    return _by_bin(lengths, bin_of, num_bins)


def _by_bin(lengths: np.ndarray, bin_of: np.ndarray, num_bins: int) -> Packs:
    """Bins in the order of their first rows, rows in source order inside them."""
    first = np.full(num_bins, len(lengths), dtype=np.int64)
    np.minimum.at(first, bin_of, np.arange(len(lengths)))
    rank = np.empty(num_bins, dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(num_bins)
    bin_rank = rank[bin_of]
    order = np.argsort(bin_rank, kind="stable")
    counts = np.bincount(bin_rank, minlength=num_bins)
    return _whole_rows(lengths, order, np.concatenate([[0], np.cumsum(counts)]))


def _concat(lengths: np.ndarray, max_length: int) -> Packs:
    """All rows end to end, cut every max_length tokens; the last sample may be shorter."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.arange(max_length, total, max_length)
    borders = np.unique(np.concatenate([[0], ends, cuts]))  # every place where a piece begins
    left, right = borders[:-1], borders[1:]
    row = np.searchsorted(ends, left, side="right")
    offset = ends[row] - lengths[row]
    first_of_sample = np.searchsorted(left, np.concatenate([[0], cuts])) if total else [0]
    sample = np.concatenate([np.asarray(first_of_sample), [len(left)]]) if total else np.array([0])
    return Packs(row, left - offset, right - offset, sample)
