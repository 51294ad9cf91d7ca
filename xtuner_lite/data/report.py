"""What stands in a data set: lengths, longest rows, duplicates, empty answers; from its samples."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from xtuner_lite.data.segments import Segment, has_tokens, num_samples, segments_of

#: Rows named in each list of the report.
NUM_NAMED = 5
_BAR = 40  # characters of the longest bar


@dataclass
class DataReport:
    """What a walk over every sample of a data set found. S segments (rows, or pieces of rows)."""

    num_samples: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [S], tokens."""
    learnt: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [S], tokens with a label."""
    longest: list[tuple[int, int, str]] = field(default_factory=list)
    """(tokens, learnt tokens, row) of the longest, longest first."""
    num_copies: int = 0
    """Segments whose tokens are those of one seen before."""
    copies: list[tuple[str, str]] = field(default_factory=list)
    """The first few: (row, the row seen before)."""
    num_empty: int = 0
    """Segments with a learnt turn of nothing but special tokens and blanks."""
    empty: list[str] = field(default_factory=list)
    """The first few."""
    num_unlearnt: int = 0
    """Segments in which nothing is learnt."""
    hashes: dict[bytes, str] = field(default_factory=dict, repr=False)
    """Digest of the tokens -> the first row with them."""


def examine(
    dataset: Any, tokenizer: PreTrainedTokenizerBase | None, limit: int | None = None
) -> DataReport | None:
    """Walks over the samples of any map-style data set.

    Args:
        dataset: has ``len`` and indexing.
        tokenizer: tells blank tokens from others; None leaves empty answers uncounted.
        limit: samples read at most; None reads all.

    Returns:
        The report; None if the samples hold no ``input_ids`` and ``labels``.
    """
    report = DataReport()
    is_blank = None if tokenizer is None else _BlankTokens(tokenizer)
    lengths: list[int] = []
    learnt: list[int] = []
    longest: list[tuple[int, int, str]] = []
    for index in range(num_samples(dataset, limit)):
        sample = dataset[index]
        if not has_tokens(sample):
            return None
        report.num_samples += 1
        for segment in segments_of(sample, index):
            counted = int(segment.learnt.sum())
            lengths.append(len(segment))
            learnt.append(counted)
            keep = heapq.heappush if len(longest) < NUM_NAMED else heapq.heappushpop
            keep(longest, (len(segment), counted, segment.row_id))
            report.num_unlearnt += not counted
            _find_copy(segment, report)
            if is_blank is not None and _has_empty_answer(segment, is_blank):
                report.num_empty += 1
                report.empty += [segment.row_id][: NUM_NAMED - len(report.empty)]
    report.lengths, report.learnt = np.array(lengths, np.int64), np.array(learnt, np.int64)
    report.longest = sorted(longest, reverse=True)
    return report


def _find_copy(segment: Segment, report: DataReport) -> None:
    ids = np.ascontiguousarray(segment.input_ids, dtype=np.int64)
    digest = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
    if digest not in report.hashes:
        report.hashes[digest] = segment.row_id
        return
    report.num_copies += 1
    report.copies += [(segment.row_id, report.hashes[digest])][: NUM_NAMED - len(report.copies)]


class _BlankTokens:
    """Whether a token is special or blank; remembers each."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._known = tokenizer, {}

    def __call__(self, token: int) -> bool:
        if token not in self._known:
            text = self._tokenizer.decode([token], skip_special_tokens=True)
            self._known[token] = not text.strip()
        return self._known[token]


def _has_empty_answer(segment: Segment, is_blank: Callable[[int], bool]) -> bool:
    return any(all(is_blank(int(token)) for token in run) for run in _learnt_runs(segment))


def _learnt_runs(segment: Segment) -> Iterator[np.ndarray]:
    """The ids of each unbroken stretch of learnt tokens."""
    learnt = segment.learnt
    edges = np.flatnonzero(np.diff(np.concatenate([[False], learnt, [False]])))
    for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist()):
        yield segment.input_ids[begin:end]


def format_report(report: DataReport) -> str:
    """The report as text: histograms, then the rows to look at."""
    lines = [
        *_histogram("tokens of a row", report.lengths),
        "",
        *_histogram("learnt tokens of a row", report.learnt),
        "",
        "longest rows:",
        *(f"  {size:>8,} tokens, {learnt:,} learnt  {row}" for size, learnt, row in report.longest),
    ]
    size = len(report.lengths)
    lines += _named(
        "copies of another row (all tokens equal)",
        report.num_copies,
        size,
        [f"{row} = {first}" for row, first in report.copies],
    )
    lines += _named("rows with an empty answer", report.num_empty, size, report.empty)
    if report.num_unlearnt:
        lines += _named("rows in which nothing is learnt", report.num_unlearnt, size, [])
    return "\n".join(lines)


def format_overlap(train: DataReport, other: DataReport, name: str) -> str:
    """How many rows of another data set (such as the validation set) stand in the training data."""
    shared = [row for digest, row in other.hashes.items() if digest in train.hashes]
    lines = _named(f"rows of {name} that are training rows too", len(shared), len(other.hashes), [])
    for digest, row in other.hashes.items():
        if digest in train.hashes and len(lines) <= NUM_NAMED:
            lines.append(f"  {row} = {train.hashes[digest]}")
    return "\n".join(lines)


def _named(label: str, count: int, whole: int, names: list[str]) -> list[str]:
    share = f" ({count / whole:.1%})" if count and whole else ""
    lines = [f"{label}: {count:,}{share}", *(f"  {name}" for name in names)]
    return lines + (["  ..."] if names and count > len(names) else [])


def _histogram(label: str, values: np.ndarray, num_bins: int = 10) -> list[str]:
    """A line of quantiles and a bar per bin of equal, round width."""
    if not len(values):
        return [f"{label}: none"]
    median, most = np.quantile(values, [0.5, 0.95])
    lines = [
        f"{label}: least {values.min():,}, median {median:,.0f}, mean {values.mean():,.0f}, "
        f"95 % within {most:,.0f}, most {values.max():,}"
    ]
    low, width = _round_bins(int(values.min()), int(values.max()), num_bins)
    counts = np.bincount((values - low) // width)
    digits = len(f"{low + width * len(counts):,}")
    for index, count in enumerate(counts.tolist()):
        begin = low + index * width
        bar = "#" * max(round(_BAR * count / counts.max()), count > 0)
        span = f"{begin:>{digits},}"
        if width > 1:
            span += f" - {begin + width - 1:>{digits},}"
        lines.append(f"  {span} {count:>9,} {bar}".rstrip())
    return lines


def _round_bins(least: int, most: int, num_bins: int) -> tuple[int, int]:
    """(first border, width), the width 1, 2 or 5 times a power of ten."""
    wanted = max((most - least + 1) / num_bins, 1)
    power = 10 ** int(np.floor(np.log10(wanted)))
    width = next(step * power for step in (1, 2, 5, 10) if step * power >= wanted)
    return least - least % width, width
