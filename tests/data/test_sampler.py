"""Sample order: the same for every world size, and a function of (seed, epoch) only."""

import random

import numpy as np
import pytest
import torch

from xtuner_lite.data.sampler import (
    EpochSampler,
    LengthGroupedSampler,
    StepPlan,
    Ticket,
    isolated_random_state,
)


def test_order_depends_on_seed_and_epoch_only():
    sampler = EpochSampler(100, seed=3)
    assert (sampler.order(2) == EpochSampler(100, seed=3).order(2)).all()
    assert (sampler.order(2) != sampler.order(3)).any()
    assert (sampler.order(2) != EpochSampler(100, seed=4).order(2)).any()
    assert sorted(sampler.order(2)) == list(range(100))


def test_without_shuffle_the_order_is_the_data_sets():
    assert EpochSampler(4, shuffle=False).order(7).tolist() == [0, 1, 2, 3]


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="0 samples; at least 1 is needed"):
        EpochSampler(0)


def test_micro_batches_by_hand():
    # 5 samples, 2 in a micro-batch, 2 micro-batches in a step: steps [0 1 | 2 3], [4].
    plan = StepPlan(EpochSampler(5, shuffle=False), batch_size=2, accumulative_counts=2)
    assert plan.steps_per_epoch == 2
    assert plan.micro_batches(0) == [[Ticket(0, 0), Ticket(0, 1)], [Ticket(0, 2), Ticket(0, 3)]]
    assert plan.micro_batches(1) == [[Ticket(0, 4)]]
    assert plan.micro_batches(2)[0] == [Ticket(1, 0), Ticket(1, 1)]


def test_drop_last_leaves_out_the_short_step():
    plan = StepPlan(
        EpochSampler(5, shuffle=False), batch_size=2, accumulative_counts=2, drop_last=True
    )
    assert plan.steps_per_epoch == 1
    assert plan.micro_batches(1)[0][0] == Ticket(1, 0)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "world_size"), [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]
)
def test_a_step_sees_the_same_samples_for_every_split(batch_size, accumulation, world_size):
    reference = StepPlan(EpochSampler(29, seed=1), batch_size=8, accumulative_counts=1)
    plans = [
        StepPlan(EpochSampler(29, seed=1), batch_size, accumulation, rank, world_size)
        for rank in range(world_size)
    ]
    for step in range(8):
        expected = sorted(reference.samples_of_step(step)[1].tolist())
        shares = [plan.micro_batches(step) for plan in plans]
        seen = [t.index for share in shares for micro in share for t in micro if t.real]
        assert sorted(seen) == expected
        assert len({len(share) for share in shares}) == 1, (
            "every rank needs the same number of micro-batches"
        )


def test_a_rank_without_samples_gets_a_filler():
    plan = StepPlan(
        EpochSampler(1, shuffle=False), batch_size=1, accumulative_counts=1, rank=1, world_size=2
    )
    assert plan.micro_batches(0) == [[Ticket(0, 0, real=False)]]


def test_isolated_random_state_repeats_and_leaves_no_trace():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draws = []
    for _ in range(2):
        with isolated_random_state(1, 2, 3):
            draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
    assert torch.equal(torch.get_rng_state(), before)
    with isolated_random_state(1, 2, 4):
        assert random.random() != draws[0][0]


class Lengths:
    def __init__(self, *lengths):
        self.lengths = np.array(lengths)


def grouped(dataset, **options):
    return LengthGroupedSampler(len(dataset.lengths), dataset=dataset, **options)


def test_length_groups_by_hand():
    # One window: sorted 9 8 7 6 | 5 4 3 2 | 1; the step with the longest comes first, the short
    # one last. Sample i has length i + 1.
    sampler = grouped(Lengths(*range(1, 10)), group_size=4)
    assert sampler.order(0).tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    # A window of one step: each step holds what the random order put there, sorted.
    plain = EpochSampler(9).order(3)
    narrow = grouped(Lengths(*range(1, 10)), group_size=4, window_steps=1).order(3)
    groups = [set(plain[:4].tolist()), set(plain[4:8].tolist()), set(plain[8:].tolist())]
    found = [narrow[:4].tolist(), narrow[4:8].tolist(), narrow[8:].tolist()]
    assert {8} & set(found[0])
    assert sorted(map(sorted, found)) == sorted(map(sorted, groups))
    assert all(part == sorted(part, reverse=True) for part in found)


def test_length_groups_hold_every_sample_once_and_are_shuffled_anew():
    dataset = Lengths(*np.random.default_rng(0).integers(1, 100, 997).tolist())
    orders = [grouped(dataset, group_size=8, seed=5, window_steps=10).order(e) for e in (0, 1, 0)]
    assert all(sorted(order.tolist()) == list(range(997)) for order in orders)
    assert (orders[0] == orders[2]).all()
    assert (orders[0] != orders[1]).any()
    for order in orders:
        assert dataset.lengths[order[0]] == dataset.lengths.max()


def test_length_groups_do_not_know_the_split_of_a_step():
    dataset = Lengths(*range(1, 31))
    steps = []
    for batch_size, accumulation, world_size in ((8, 1, 1), (2, 4, 1), (2, 1, 4)):
        sampler = grouped(dataset, group_size=8)
        plans = [
            StepPlan(sampler, batch_size, accumulation, rank, world_size)
            for rank in range(world_size)
        ]
        shares = [
            [t for m in p.micro_batches(s) for t in m if t.real] for p in plans for s in (0, 1)
        ]
        steps.append(sorted(t.index for share in shares for t in share))
    assert steps[0] == steps[1] == steps[2]


def test_length_groups_without_shuffle_are_longest_first():
    assert grouped(Lengths(3, 9, 5), shuffle=False).order(4).tolist() == [1, 2, 0]


def test_length_groups_of_less_than_a_step():
    assert grouped(Lengths(3, 9, 5), group_size=8).order(0).tolist() == [1, 2, 0]


def test_length_groups_need_lengths():
    with pytest.raises(ValueError, match="list has no attribute 'lengths'. Add it"):
        LengthGroupedSampler(1, dataset=[1])
    with pytest.raises(ValueError, match="window_steps=0; at least 1"):
        grouped(Lengths(1), window_steps=0)
