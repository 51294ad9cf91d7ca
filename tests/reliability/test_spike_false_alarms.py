"""Ordinary runs, simulated and real, without a single alarm."""

import pytest

from tests.reliability.spike_false_alarms import ORDINARY, judge, real_run, simulate


def test_ordinary_noise_is_no_spike():
    families = simulate(runs=2, steps=300, seed=1)
    families.pop("heavy_tails")
    assert len(families) == len(ORDINARY) == 12
    assert {name: family["alarms"] for name, family in families.items()} == dict.fromkeys(
        families, 0
    )
    # It is not blind for it: in large batches a loss that rises by 2 nats is found.
    assert families["large_batch"]["rise_needed"] < 2
    assert families["large_batch"]["ratio_needed"] < 21


def test_a_real_run_raises_no_alarm_and_its_spike_is_found():
    steps = real_run("mixture", 45, seed=0)
    assert len(steps) == 45
    assert judge(steps)[0] == []
    loss, norm, units = steps[40]
    steps[40] = (loss, norm * 1e4, units)
    (alarm,) = judge(steps)[0]
    assert alarm.startswith("step 41: grad_norm")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "classes", "memorised", "mixture"])
def test_real_runs_raise_no_alarm(kind):
    assert judge(real_run(kind, 400, seed=0))[0] == []


@pytest.mark.slow
def test_ordinary_noise_is_no_spike_in_360000_steps():
    families = simulate(runs=20, steps=1500, seed=0)
    assert families.pop("heavy_tails")["alarms"] > 0  # noise that jumps by itself: the limit
    assert sum(family["alarms"] for family in families.values()) == 0
