"""Packing by hand and at random."""

import numpy as np
import pytest

from xtuner_lite.data.packing import pack


def as_lists(packs):
    return [
        [(int(packs.row[p]), int(packs.start[p]), int(packs.end[p])) for p in range(a, b)]
        for a, b in zip(packs.sample[:-1], packs.sample[1:])
    ]


def test_best_fit_by_hand():
    # Longest first: 7 | 6 | 5 | 4 joins 6 (room 4, exactly) | 3 joins 7 | 2 joins 5 (room 5).
    lengths = np.array([2, 7, 5, 6, 3, 4])
    packs = pack(lengths, 10, "best_fit")
    assert as_lists(packs) == [
        [(0, 0, 2), (2, 0, 5)],
        [(1, 0, 7), (4, 0, 3)],
        [(3, 0, 6), (5, 0, 4)],
    ]
    assert packs.lengths.tolist() == [7, 10, 10]


def test_best_fit_splits_and_drops_nothing():
    rng = np.random.default_rng(0)
    for _ in range(50):
        limit = int(rng.integers(1, 300))
        lengths = rng.integers(1, limit + 1, size=int(rng.integers(0, 200)))
        packs = pack(lengths, limit, "best_fit")
        assert sorted(packs.row.tolist()) == list(range(len(lengths)))
        assert (packs.end - packs.start == lengths[packs.row]).all()
        assert (packs.lengths <= limit).all()
        assert packs.lengths.sum() == lengths.sum()
        again = pack(lengths, limit, "best_fit")
        assert as_lists(packs) == as_lists(again)


def test_best_fit_is_tight_on_rows_of_usual_lengths():
    lengths = np.random.default_rng(0).gamma(2.0, 100.0, 5000).astype(int).clip(5, 512)
    packs = pack(lengths, 512, "best_fit")
    assert lengths.sum() / (len(packs) * 512) > 0.97


def test_concat_by_hand():
    # 3 + 5 + 2 = 10 tokens, cut at 4 and 8.
    packs = pack(np.array([3, 5, 2]), 4, "concat")
    assert as_lists(packs) == [
        [(0, 0, 3), (1, 0, 1)],
        [(1, 1, 5)],
        [(2, 0, 2)],
    ]
    assert packs.lengths.tolist() == [4, 4, 2]


def test_concat_keeps_every_token_in_order():
    rng = np.random.default_rng(1)
    for _ in range(50):
        limit = int(rng.integers(1, 40))
        lengths = rng.integers(1, 60, size=int(rng.integers(1, 30)))
        packs = pack(lengths, limit, "concat")
        flat = [(r, t) for r, a, b in sum(as_lists(packs), []) for t in range(a, b)]
        assert flat == [(r, t) for r, n in enumerate(lengths) for t in range(n)]
        assert (packs.lengths[:-1] == limit).all()
        assert packs.lengths[-1] <= limit


def test_none_and_nothing():
    assert as_lists(pack(np.array([3, 1]), None, "none")) == [[(0, 0, 3)], [(1, 0, 1)]]
    for packing in ("best_fit", "concat", "none"):
        assert len(pack(np.array([], dtype=int), 8, packing)) == 0


def test_errors():
    with pytest.raises(ValueError, match="packing='tight' is unknown; allowed: 'best_fit'"):
        pack(np.array([1]), 8, "tight")
    with pytest.raises(ValueError, match="packing='concat' needs max_length"):
        pack(np.array([1]), None, "concat")
    with pytest.raises(ValueError, match="a row of 9 tokens does not fit into max_length=8"):
        pack(np.array([9]), 8, "best_fit")
