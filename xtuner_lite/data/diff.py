"""What training would see differently: two data sets compared row by row, tokens and labels."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from xtuner_lite.data.segments import Segment, segments_of, walk_segments

Change = Literal["only in A", "only in B", "tokens differ", "labels differ", "weights differ"]
#: In the order in which a report lists them.
CHANGES: tuple[Change, ...] = (
    "tokens differ", "labels differ", "weights differ", "only in A", "only in B",
)  # fmt: skip


@dataclass
class _Row:
    """Where a row stands and digests of what it teaches. A cut row has several places."""

    places: list[tuple[int, int]] = field(default_factory=list)
    """(sample, segment)."""
    digests: tuple[int, ...] = (0, 0, 0)
    """Of its token ids, of which are learnt, and of their weights; the same however it is cut."""

    def add(self, segment: Segment) -> None:
        """Takes in the next piece of the row."""
        self.places.append((segment.sample, segment.number))
        parts = (
            np.asarray(segment.input_ids, np.int64),
            segment.learnt,
            segment.target_weights,
        )
        self.digests = tuple(_digest(part.tobytes(), d) for part, d in zip(parts, self.digests))


def _digest(data: bytes, before: int) -> int:
    """64 bits, carried on from the pieces before; a hashlib object for each row takes 1 kB.

    Only the two versions of one row are ever compared, so that chance hits are one in 2 ** 60.
    """
    high, low = before >> 32, before & 0xFFFFFFFF
    return zlib.crc32(data, high) << 32 | zlib.adler32(data, low)


@dataclass
class DataDiff:
    """Two data sets, row by row. A row is known by its id ('file:line')."""

    num_rows: tuple[int, int] = (0, 0)
    """Rows of A and of B."""
    num_tokens: tuple[int, int] = (0, 0)
    num_learnt: tuple[int, int] = (0, 0)
    num_equal: int = 0
    """Rows whose tokens, labels and weights are the same."""
    changed: dict[Change, list[str]] = field(default_factory=dict)
    """Change -> ids of the rows, in the order of A, then of B."""

    @property
    def is_equal(self) -> bool:
        """Whether every row is the same. Packing and order are not compared."""
        return not any(self.changed.values())


class Comparison:
    """Compares two data sets; keeps digests and places of rows, not their tokens.

    Args:
        first, second: map-style data sets, A and B, whose samples name their rows.

    Raises:
        ValueError: a sample names no rows, so that rows cannot be told apart.
    """

    def __init__(self, first: Any, second: Any) -> None:
        self.datasets = (first, second)
        totals: list[tuple[int, int]] = []
        self._rows: list[dict[str, _Row]] = []
        for dataset in self.datasets:
            rows, total = _index(dataset)
            self._rows.append(rows)
            totals.append(total)
        self.diff = self._compare()
        (tokens_a, learnt_a), (tokens_b, learnt_b) = totals
        self.diff.num_tokens, self.diff.num_learnt = (tokens_a, tokens_b), (learnt_a, learnt_b)

    def row(self, side: int, row_id: str) -> Segment:
        """A row as one segment, its pieces joined.

        Args:
            side: 0 for A, 1 for B.
            row_id: a row of that side.
        """
        places = self._rows[side][row_id].places
        dataset = self.datasets[side]
        parts = [segments_of(dataset[sample], sample)[number] for sample, number in places]
        weights = None
        if any(part.weights is not None for part in parts):
            weights = np.concatenate([part.target_weights for part in parts])
        return Segment(
            *places[0],
            row_id,
            np.concatenate([part.input_ids for part in parts]),
            np.concatenate([part.labels for part in parts]),
            weights,
        )

    def _compare(self) -> DataDiff:
        rows_a, rows_b = self._rows
        diff = DataDiff((len(rows_a), len(rows_b)), changed={change: [] for change in CHANGES})
        for row_id, row in rows_a.items():
            other = rows_b.get(row_id)
            if other is None:
                diff.changed["only in A"].append(row_id)
                continue
            pairs = zip(row.digests, other.digests, CHANGES)
            change = next((change for mine, theirs, change in pairs if mine != theirs), None)
            if change is None:
                diff.num_equal += 1
            else:
                diff.changed[change].append(row_id)
        diff.changed["only in B"] = [row_id for row_id in rows_b if row_id not in rows_a]
        return diff


def first_difference(first: Segment, second: Segment) -> int:
    """The first position whose token, label or weight differs; the shorter length if one is the
    beginning of the other."""
    size = min(len(first), len(second))
    differs = first.input_ids[:size] != second.input_ids[:size]
    differs |= first.learnt[:size] != second.learnt[:size]
    differs |= first.target_weights[:size] != second.target_weights[:size]
    return int(differs.argmax()) if differs.any() else size


def _index(dataset: Any) -> tuple[dict[str, _Row], tuple[int, int]]:
    rows: dict[str, _Row] = {}
    tokens = learnt = 0
    for segment in walk_segments(dataset):
        if segment.row_id == "?":
            raise ValueError(
                f"sample {segment.sample} names no rows (row_ids), so rows cannot be compared. "
                "Give the samples of your data set 'row_ids', see docs/howto/add_a_dataset.md"
            )
        rows.setdefault(segment.row_id, _Row()).add(segment)
        tokens += len(segment)
        learnt += int(segment.learnt.sum())
    return rows, (tokens, learnt)
