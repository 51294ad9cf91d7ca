import json
import math
import random

import pytest

from xtuner_lite.engine.spike_detector import SpikeDetector

MANY = 10_000  # units: the noise of their mean, 8 / sqrt(10000) = 0.08, times 8 is below min_rise


def calm(steps=40, loss=2.0, grad_norm=0.5, num_units=MANY, **options):
    """A detector after some equal steps."""
    detector = SpikeDetector(**options)
    for _ in range(steps):
        assert detector.look(loss, grad_norm, num_units) is None
        detector.accept(loss, grad_norm, num_units)
    return detector


def test_the_limits_by_hand():
    detector = calm()
    # No spread, no reach: the median and min_rise; the median times grad_factor.
    assert detector.loss_limit(MANY) == pytest.approx(2.0 + 1.0)
    assert detector.grad_limit(MANY) == pytest.approx(20 * 0.5)
    # 4 units: 8 spreads of 8 / sqrt(4); norms of mean gradients grow by sqrt(10000 / 4) = 50.
    assert detector.loss_limit(4) == pytest.approx(2.0 + 8 * 4)
    assert detector.grad_limit(4) == pytest.approx(50 * 20 * 0.5)
    # Gradients far below min_grad_norm = 1: 1 + 8 * 0.08 stays the limit.
    assert calm(grad_norm=1e-3).grad_limit(MANY) == pytest.approx(1.64)


def test_what_the_run_did_before_is_no_spike():
    detector = calm()
    detector.accept(2.9, 4.0, MANY)
    assert detector.loss_limit(MANY) == pytest.approx(2.0 + 3 * 0.9)
    assert detector.grad_limit(MANY) == pytest.approx(5 * 4.0)
    for _ in range(8 * 128):  # the memory fades to a half
        detector.accept(2.0, 0.5, MANY)
    assert detector.loss_limit(MANY) == pytest.approx(2.0 + 3 * 0.45)
    assert detector.grad_limit(MANY) == pytest.approx(5 * 2.0)


def test_a_spike_within_the_warm_up_does_not_blind():
    detector = SpikeDetector()
    for number in range(32):
        detector.accept(*((1e6, 1e9) if number == 20 else (2.0, 0.5)), MANY)
    assert detector.loss_limit(MANY) == pytest.approx(3.0)
    assert detector.grad_limit(MANY) == pytest.approx(10.0)


def test_the_extremes_of_the_warm_up_count():
    detector = SpikeDetector()
    for number in range(32):
        detector.accept(*((2.9, 4.0) if number == 20 else (2.0, 0.5)), MANY)
    assert detector.loss_limit(MANY) == pytest.approx(2.0 + 3 * 0.9)
    assert detector.grad_limit(MANY) == pytest.approx(5 * 4.0)


def test_a_spread_widens_the_limits():
    detector = SpikeDetector()
    for number in range(100):
        sign = (-1) ** number
        detector.accept(5.0 + 0.3 * sign, math.exp(0.5 * sign), 10**8)
    # MAD 0.3, standard deviation 1.4826 * 0.3; the norm's in logarithms, at 0.75 of the threshold.
    assert detector.loss_limit(10**8) == pytest.approx(5.0 + 8 * 1.4826 * 0.3, rel=1e-4)
    assert detector.grad_limit(10**8) == pytest.approx(math.exp(6 * 1.4826 * 0.5))
    wide = SpikeDetector()
    for number in range(100):
        wide.accept(1.0, math.exp(3 * (-1) ** number), 10**8)
    assert wide.grad_limit(10**8) == pytest.approx(400.0)


def test_what_is_found():
    detector = calm()
    assert detector.look(2.99, 9.9, MANY) is None
    assert detector.look(3.01, 1.0, MANY) == "loss 3.01, median 2, limit 3"
    assert detector.look(2.0, 10.1, MANY) == "grad_norm 10.1, median 0.5, limit 10"
    assert "; grad_norm" in detector.look(30.0, 30.0, MANY)
    assert detector.look(30.0, None, MANY) == "loss 30, median 2, limit 3"
    assert detector.look(float("nan"), 1.0, MANY) == "loss nan"
    assert detector.look(2.0, float("inf"), MANY) == "grad_norm inf"
    assert detector.look(-50.0, 0.0, MANY) is None  # downwards is no spike


def test_nothing_but_what_is_not_finite_is_judged_while_warming_up():
    detector = calm(steps=31)
    assert detector.look(1e9, 1e9, MANY) is None
    assert detector.look(float("inf"), 1.0, MANY) == "loss inf"
    detector.accept(2.0, 0.5, MANY)
    assert detector.look(1e9, 1e9, MANY) is not None
    detector.reset()
    assert detector.look(1e9, 1e9, MANY) is None


def test_steps_without_a_norm_or_with_a_norm_of_zero():
    detector = calm(grad_norm=None)
    assert detector.look(2.0, 1e9, MANY) is None
    detector = calm(grad_norm=0.0)
    assert detector.look(2.0, 1e9, MANY) is None


def test_a_restored_detector_is_equal_bit_for_bit():
    numbers = random.Random(0)
    one = SpikeDetector(window=50)
    for _ in range(77):
        one.accept(numbers.gauss(2, 0.3), numbers.lognormvariate(0, 1), numbers.randrange(1, 999))
    two = SpikeDetector(window=50)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert two.state_dict() == one.state_dict()
    for _ in range(60):
        step = numbers.gauss(2, 0.3), numbers.lognormvariate(0, 1), numbers.randrange(1, 999)
        assert one.loss_limit(step[2]).hex() == two.loss_limit(step[2]).hex()
        assert one.grad_limit(step[2]).hex() == two.grad_limit(step[2]).hex()
        one.accept(*step)
        two.accept(*step)
    assert two.state_dict() == one.state_dict()
