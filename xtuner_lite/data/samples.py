"""Samples out of encoded rows and the plan of which rows share one."""

from __future__ import annotations

from typing import Any

import numpy as np

from xtuner_lite.data.encode import EncodedRows
from xtuner_lite.data.fingerprint import array_digest
from xtuner_lite.data.image_rows import ImageIndex
from xtuner_lite.data.json_window import show_position
from xtuner_lite.data.packing import Packs
from xtuner_lite.data.store import rows_digest
from xtuner_lite.images.files import ImageFiles
from xtuner_lite.structures import IGNORE_INDEX


class PackedRows:
    """Encoded rows, cut and joined into samples as ``packs`` says.

    Args:
        rows: the rows.
        packs: which pieces of them make a sample; only whole rows if they have images.
        files: opens the images; None where rows have none.
    """

    def __init__(self, rows: EncodedRows, packs: Packs, files: ImageFiles | None = None) -> None:
        self.rows, self.packs = rows, packs
        has_images = files is not None and rows.image_counts is not None
        self._images = ImageIndex(rows, files) if has_images else None
        self._row_start = np.concatenate([[0], np.cumsum(rows.lengths)])

    def __len__(self) -> int:
        return len(self.packs)

    def sample(self, index: int) -> dict[str, Any]:
        """Sample ``index`` (0 .. len - 1); its form stands in ChatDataset's docstring."""
        packs, rows = self.packs, self.rows
        pieces = slice(packs.sample[index], packs.sample[index + 1])
        row = packs.row[pieces]
        start = self._row_start[row] + packs.start[pieces]
        end = self._row_start[row] + packs.end[pieces]
        input_ids = _gather(rows.input_ids, start, end)
        learnt = _gather(rows.learnt, start, end)
        lengths = end - start
        learnt[np.concatenate([[0], np.cumsum(lengths)[:-1]])] = False
        sample: dict[str, Any] = {
            "input_ids": input_ids,
            "labels": np.where(learnt, input_ids, np.int32(IGNORE_INDEX)),
            "lengths": lengths.tolist(),
            "row_ids": [self._row_id(r) for r in row],
        }
        if rows.weights is not None:
            sample["loss_weights"] = _gather(rows.weights, start, end)
        if self._images is not None:
            sample["images"] = [self._images.of(int(r)) for r in row]
        return sample

    def num_images(self) -> np.ndarray:
        """int64 [len(self)], images of each sample."""
        if self._images is None:
            return np.zeros(len(self), dtype=np.int64)
        of_pieces = np.concatenate([[0], np.cumsum(self.rows.image_counts[self.packs.row])])
        return np.diff(of_pieces[self.packs.sample])

    def num_cut_targets(self) -> int:
        """Targets lost because a row is cut (packing="concat"): the first of each later piece."""
        inside = self.packs.start > 0  # the first token of a row is never a target
        first = self._row_start[self.packs.row[inside]] + self.packs.start[inside]
        return int(self.rows.learnt[first].sum())

    @property
    def fingerprint(self) -> str:
        """Digest of every token, mask and pack."""
        packs = self.packs
        arrays = (packs.row, packs.start, packs.end, packs.sample)
        digest = np.frombuffer(rows_digest(self.rows).encode(), dtype=np.uint8)
        return array_digest(np.concatenate([*arrays, digest.astype(np.int64)]))

    def _row_id(self, row: int) -> str:
        name = self.rows.sources[self.rows.source[row]]
        return f"{name}:{show_position(int(self.rows.line[row]))}"


def _gather(flat: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    return np.concatenate([flat[s:e] for s, e in zip(start, end)])
