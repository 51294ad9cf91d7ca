"""Sample order: the same for every world size, and a function of (seed, epoch) only."""

import random

import numpy as np
import pytest
import torch

from xtuner_lite.data.sampler import EpochSampler, StepPlan, Ticket, isolated_random_state


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
