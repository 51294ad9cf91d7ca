from types import SimpleNamespace

import pytest
import torch

from tests.engine.hooks.toy_run import log_text, toy_loader, train
from xtuner_lite.engine.hooks.nonfinite_guard_hook import (
    NonFiniteError,
    NonFiniteGuardHook,
    rows_of_step,
)

ROW = "toy.json:6"  # ToyData(poison=5): sample 5 has a NaN


def guard(**options):
    return {"nan_guard": {"type": "NonFiniteGuardHook", **options}}


def test_stop_names_step_loss_and_rows(tmp_path):
    with pytest.raises(
        NonFiniteError, match=r"step \d: loss nan, grad_norm nan.*was not made"
    ) as e:
        train(tmp_path, guard(), train_dataloader=toy_loader(poison=5))
    assert ROW in str(e.value)
    assert "lower the learning rate" in str(e.value)


def test_skip_leaves_the_weights_of_the_other_steps(tmp_path):
    runner, outputs = train(tmp_path, guard(policy="skip"), train_dataloader=toy_loader(poison=5))
    # Sample 5 comes once in each of the 2 epochs, in the second one in its last step.
    assert [step["updated"] for step in outputs.steps].count(0.0) == 2
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())
    assert log_text(runner).count("skipped step") == 2
    assert ROW in log_text(runner)
    hook = next(h for h in runner.hooks if isinstance(h, NonFiniteGuardHook))
    assert hook.state_dict() == {"num_skipped": 2, "num_in_a_row": 1}


def fake_runner(scaler=None):
    loop = SimpleNamespace(skipped=0)

    def skip_step():
        loop.skipped += 1

    loop.skip_step = skip_step
    return SimpleNamespace(
        iter=0,
        rank=0,
        world_size=1,
        train_loop=loop,
        strategy=SimpleNamespace(precision=SimpleNamespace(scaler=scaler)),
        logger=SimpleNamespace(warning=lambda text: None),
    )


def step(hook, runner, loss, grad_norm):
    hook.before_optimizer_step(runner, 0, [], {"loss": loss, "grad_norm": grad_norm})


def test_skip_gives_up_when_nothing_is_finite_any_more():
    hook, runner = NonFiniteGuardHook("skip", max_skips=2), fake_runner()
    step(hook, runner, float("nan"), 1.0)
    step(hook, runner, 1.0, 1.0)  # a good step: the count starts anew
    step(hook, runner, 1.0, float("inf"))
    step(hook, runner, 1.0, float("inf"))
    with pytest.raises(NonFiniteError, match="2 steps before it were skipped in a row"):
        step(hook, runner, 1.0, float("inf"))
    assert (hook.num_skipped, runner.train_loop.skipped) == (4, 3)


class Scaler:
    def __init__(self, scale):
        self.scale = scale

    def is_enabled(self):
        return True

    def get_scale(self):
        return self.scale


def test_an_fp16_scaler_finds_its_scale_undisturbed():
    hook, runner = NonFiniteGuardHook(), fake_runner(Scaler(65536.0))
    step(hook, runner, 1.0, float("inf"))
    assert runner.train_loop.skipped == 0
    with pytest.raises(NonFiniteError):  # a loss that is not finite is no matter of scale
        step(hook, runner, float("inf"), float("inf"))
    with pytest.raises(NonFiniteError):  # no room left to lower the scale
        step(hook, fake_runner(Scaler(1.0)), 1.0, float("inf"))


def test_rows_of_step():
    rows = [{"row_ids": [["a:1", "a:2"], ["b:1"]]}, {"row_ids": [["a:3"]]}]
    assert rows_of_step(rows) == "a:1, a:2, b:1, a:3"
    assert rows_of_step([{"row_ids": [[str(i)] for i in range(25)]}]).endswith("19 and 5 more")
    assert rows_of_step([{}]) == "unknown (the data set gives no row_ids)"


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="policy='ignore'; use 'stop' or 'skip'"):
        NonFiniteGuardHook("ignore")
    with pytest.raises(ValueError, match="max_skips=0"):
        NonFiniteGuardHook(max_skips=0)
