"""engine/schedulers.py: learning-rate schedules in shares of the run."""

import pytest
import torch

from xtuner_lite.engine.schedulers import WarmupCosineLR
from xtuner_lite.registry import PARAM_SCHEDULERS


def rates(max_iters: int, **options: float) -> list[float]:
    """The rate that each optimizer step of a run uses, with a peak of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = WarmupCosineLR(optimizer, max_iters, **options)
    used = []
    for _ in range(max_iters):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


def test_warm_up_then_cosine_by_hand():
    # 6 steps, a third of them warm-up: W = 2 -> 1/3, 2/3; then 4 steps of cosine over 0..3/4:
    # 1, (1 + cos 45°)/2, (1 + cos 90°)/2, (1 + cos 135°)/2
    expected = [1 / 3, 2 / 3, 1.0, 0.8535534, 0.5, 0.1464466]
    assert rates(6, warmup=1 / 3) == pytest.approx(expected, abs=1e-6)


def test_the_end_is_min_lr_of_the_peak():
    assert rates(2000, warmup=0.0, min_lr=0.1)[-1] == pytest.approx(0.1, abs=1e-5)
    assert rates(5, warmup=0.0, min_lr=1.0) == [1.0] * 5


@pytest.mark.parametrize("max_iters", [1, 2, 3])
def test_short_runs_always_reach_the_peak(max_iters):
    assert max(rates(max_iters, warmup=0.5)) == 1.0


def test_each_group_keeps_its_own_peak_and_state_resumes():
    def build(last=None):
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
        optimizer = torch.optim.SGD(groups)
        return optimizer, WarmupCosineLR(optimizer, 10, warmup=0.0)

    optimizer, scheduler = build()
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    other_optimizer, other = build()
    other.load_state_dict(scheduler.state_dict())
    for o, s in ((optimizer, scheduler), (other_optimizer, other)):
        o.step()
        s.step()
    lrs = [group["lr"] for group in optimizer.param_groups]
    assert lrs == [group["lr"] for group in other_optimizer.param_groups]
    assert lrs[1] == pytest.approx(lrs[0] / 10)
    assert lrs[0] == pytest.approx(0.5)  # step 5 of 10: (1 + cos 90°) / 2


def test_a_resumed_run_of_another_length_uses_the_new_length():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = WarmupCosineLR(optimizer, 10, warmup=0.0)
    longer = WarmupCosineLR(optimizer, 20, warmup=0.0)
    longer.load_state_dict(scheduler.state_dict())
    assert longer.max_iters == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(warmup=100), r"warmup=100 is not a share of the run"),
        (dict(min_lr=-0.1), r"min_lr=-0.1 is not a share of the peak"),
        (dict(max_iters=0), r"max_iters=0: a run has at least one"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        rates(**{"max_iters": 10, **options})


def test_is_registered():
    assert PARAM_SCHEDULERS.get("WarmupCosineLR") is WarmupCosineLR
