import json
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from safetensors.torch import load_file

from tests.engine.hooks.toy_run import log_text, toy_loader, train
from tests.ranks import run_ranks
from xtuner_lite.engine.distributed import Ranks
from xtuner_lite.engine.hooks.loss_spike_hook import LossSpikeError, LossSpikeHook
from xtuner_lite.engine.hooks.nonfinite_guard_hook import NonFiniteGuardHook
from xtuner_lite.runner.runner import Runner

WARMUP = 8
NUM_STEPS = 30
EVERY = 5  # steps between checkpoints


class Corrupt(Hook):
    """Multiplies the targets of some steps (0-based)."""

    priority = "HIGHEST"

    def __init__(self, steps):
        self.steps = set(steps)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx in self.steps:
            data_batch[0]["y"] *= 1e4


class Trace(Hook):
    """Weights, loss, rate and rows after every step."""

    priority = "LOWEST"

    def __init__(self):
        self.weights, self.lines = {}, {}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        rows = [row for batch in data_batch for rows in batch["row_ids"] for row in rows]
        rate = runner.optim_wrapper.param_groups[0]["lr"]
        self.weights[batch_idx] = [p.detach().clone() for p in runner.model.parameters()]
        self.lines[batch_idx] = [outputs["loss"].hex(), rate, outputs["updated"], rows]


class StopAfter(Hook):
    def __init__(self, step):
        self.step = step

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        runner.train_loop.stop_training |= batch_idx + 1 == self.step


def run(folder, policy, bad=(), *, stop_after=None, ckpt=None, **changes):
    """Trains NUM_STEPS steps with LossSpikeHook; returns runner, trace, the hook."""
    options, custom = changes.pop("options", {}), changes.pop("custom", [])
    num_steps = changes.pop("num_steps", NUM_STEPS)
    loader = changes.pop("train_dataloader", toy_loader(size=80, noise=0.1))
    hooks = {
        "loss_spike": dict(type="LossSpikeHook", policy=policy, warmup=WARMUP, **options),
        "param_scheduler": dict(type="ParamSchedulerHook"),
    }
    if policy == "rollback" or ckpt:
        hooks["checkpoint"] = dict(type="CheckpointHook", **(ckpt or dict(interval=EVERY)))
    trace = Trace()
    runner, _ = train(
        folder,
        hooks,
        train_dataloader=loader,
        train_cfg=dict(max_iters=num_steps),
        param_scheduler=dict(type="WarmupCosineLR"),
        custom_hooks=[
            trace,
            *custom,
            Corrupt(bad),
            *([StopAfter(stop_after)] if stop_after else []),
        ],  # fmt: skip
        **changes,
    )
    return runner, trace, next(h for h in runner.hooks if isinstance(h, LossSpikeHook))


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_an_ordinary_run_raises_no_alarm(tmp_path):
    runner, trace, hook = run(tmp_path, "stop")
    assert len(trace.lines) == NUM_STEPS
    assert hook.num_bad == 0
    assert hook.detector.num_accepted == NUM_STEPS


def test_stop_names_step_loss_and_rows_and_leaves_the_weights(tmp_path):
    seen = {}

    class Keep(Hook):
        priority = "HIGHEST"

        def before_optimizer_step(self, runner, batch_idx, data_batch=None, outputs=None):
            seen.update(
                weights=[p.detach().clone() for p in runner.model.parameters()],
                rows=[row for b in data_batch for rows in b["row_ids"] for row in rows],
                runner=runner,
            )

    with pytest.raises(LossSpikeError, match=r"loss spike at step 13: loss .*grad_norm") as caught:
        run(tmp_path, "stop", [12], custom=[Keep()])
    assert ", ".join(seen["rows"]) in str(caught.value)
    assert "policy='skip'" in str(caught.value)
    assert same(seen["weights"], list(seen["runner"].model.parameters()))


def test_skip_costs_one_step(tmp_path):
    runner, trace, hook = run(tmp_path, "skip", [12, 13, 20])
    assert [i for i, line in trace.lines.items() if not line[2]] == [12, 13, 20]
    assert same(trace.weights[11], trace.weights[13])
    assert not same(trace.weights[13], trace.weights[14])
    assert same(trace.weights[19], trace.weights[20])
    assert (hook.num_bad, hook.detector.num_accepted) == (3, NUM_STEPS - 3)
    assert log_text(runner).count("loss spike, skipped step") == 3


def test_skip_gives_up_after_max_skips_in_a_row(tmp_path):
    with pytest.raises(LossSpikeError, match=r"step 15: .*as for the 2 steps before it"):
        run(tmp_path, "skip", [12, 13, 14], options=dict(max_skips=2))


def test_warn_goes_on_and_takes_a_new_level_as_ordinary(tmp_path):
    runner, trace, hook = run(tmp_path, "warn", range(12, NUM_STEPS), options=dict(max_skips=2))
    assert all(line[2] for line in trace.lines.values())
    text = log_text(runner)
    assert text.count("loss spike at step") == 3
    assert "policy='skip'" in text
    assert "3 loss spikes in a row: taken as the new level" in text
    assert hook.detector.num_accepted == NUM_STEPS - 15


def test_rollback_goes_back_and_on_with_the_next_data(tmp_path):
    _, plain, _ = run(tmp_path / "plain", "skip")
    runner, trace, hook = run(
        tmp_path / "bad", "rollback", range(15, 18), options=dict(max_skips=2)
    )
    # Steps 15 and 16 are passed over, 17 goes back to what stood before 15, on disk as iter_15.
    assert same(trace.weights[17], trace.weights[14])
    assert "go back to those after step 15 (rollback 1 of at most 3)" in log_text(runner)
    assert (hook.num_rollbacks, hook.num_bad) == (1, 3)
    assert [i for i, line in trace.lines.items() if not line[2]] == [15, 16, 17]
    for step in range(NUM_STEPS):  # the same data and the same learning rate as ever
        assert trace.lines[step][1] == plain.lines[step][1]
        assert trace.lines[step][3] == plain.lines[step][3]


def test_rollback_goes_back_further_when_the_first_did_not_hold(tmp_path):
    runner, trace, hook = run(tmp_path, "rollback", range(17, 20), options=dict(max_skips=0))
    # Each bad step goes back at once: to iter_15, then, as no good step followed, to 10 and 5.
    assert hook.num_rollbacks == 3
    text = log_text(runner)
    assert [f"after step {n} (rollback" in text for n in (15, 10, 5)] == [True] * 3
    first = load_file(tmp_path / "checkpoints/iter_5/model.safetensors")
    assert torch.equal(trace.weights[19][0], first["linear.weight"])
    # The optimizer's memory went with the weights: 5 updates, then those of steps 20 to 29.
    state = runner.optim_wrapper.optimizer.state
    assert {int(value["step"]) for value in state.values()} == {5 + 10}
    # So did the detector's: 5 ordinary steps, then 10 more.
    assert hook.detector.num_accepted == 15


def test_rollback_restores_what_bad_updates_did(tmp_path):
    """Weights that are bad themselves: every loss after that is, until they are put back."""

    class Break(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if batch_idx == 16:
                with torch.no_grad():
                    runner.model.linear.weight += 1e4

    runner, trace, hook = run(
        tmp_path, "rollback", options=dict(max_skips=1, max_rollbacks=1), custom=[Break()]
    )
    assert hook.num_rollbacks == 1
    assert same(trace.weights[18], trace.weights[14])
    assert float.fromhex(trace.lines[NUM_STEPS - 1][0]) < 10


def test_rollback_stops_after_max_rollbacks(tmp_path):
    with pytest.raises(LossSpikeError, match=r"step 19: .*gone back 1 times already"):
        run(tmp_path, "rollback", [17, 18], options=dict(max_skips=0, max_rollbacks=1))


def test_rollback_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(
        LossSpikeError, match=r"step 10: .*cannot go back.*of at most 9 steps, saved every 10"
    ):
        run(tmp_path, "rollback", [9], options=dict(max_skips=0), ckpt=dict(interval=10))


def test_rollback_passes_over_a_damaged_checkpoint(tmp_path):
    class Damage(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if batch_idx == 16:
                (tmp_path / "checkpoints/iter_15/trainer/meta.json").write_text("{}")

    runner, trace, hook = run(
        tmp_path, "rollback", [17], options=dict(max_skips=0), custom=[Damage()]
    )
    assert same(trace.weights[17], trace.weights[9])
    assert "checkpoint iter_15 is passed over" in log_text(runner)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
@pytest.mark.parametrize("cut", [14, 18])
def test_a_resumed_run_is_bit_identical(tmp_path, policy, cut):
    """Cut before and within a row of bad steps: the detector's state survives."""
    bad, options = [12, *range(16, 20)], dict(max_skips=4 if policy == "skip" else 1)
    common = dict(options=options, ckpt=dict(interval=EVERY))
    whole, trace, hook = run(tmp_path / "whole", policy, bad, **common)
    _, before, _ = run(tmp_path / "cut", policy, bad, stop_after=cut, **common)
    resumed, after, other = run(tmp_path / "cut", policy, bad, resume=True, **common)
    assert sorted(after.lines) == list(range(cut, NUM_STEPS))
    assert {**before.lines, **after.lines} == trace.lines
    assert same(trace.weights[NUM_STEPS - 1], after.weights[NUM_STEPS - 1])
    assert other.state_dict() == hook.state_dict()
    assert json.dumps(other.detector.state_dict()) == json.dumps(hook.detector.state_dict())
    assert hook.num_rollbacks == (2 if policy == "rollback" else 0)


def _two_ranks(folder):
    strategy = dict(type="DDP")
    loader = {**toy_loader(size=80, noise=0.1), "batch_size": 1}
    runner, trace, hook = run(
        folder,
        "rollback",
        range(11, 13),
        options=dict(max_skips=1),
        train_dataloader=loader,
        strategy=strategy,
        num_steps=15,
    )
    weights = [w.tolist() for w in trace.weights[14]]
    return (
        [line[:3] for line in trace.lines.values()],
        hook.num_rollbacks,
        weights,
        log_text(runner),
    )


def test_two_ranks_go_back_together(tmp_path):
    one, two = run_ranks(_two_ranks, tmp_path)
    assert one[:3] == two[:3]
    assert one[1] == 1
    assert "; rank 1: toy.json:" in one[3]


def fake_runner(*hooks):
    done = []
    loop = SimpleNamespace(
        skip_step=lambda: done.append("skip"),
        request_rollback=lambda before, multiple_of: done.append(before) or before,
    )
    return SimpleNamespace(
        iter=7, rank=0, world_size=1, train_loop=loop, hooks=list(hooks), done=done,
        strategy=SimpleNamespace(), ranks=Ranks(),
        logger=SimpleNamespace(warning=lambda text: None),
    )  # fmt: skip


def step(hook, runner, loss, grad_norm=1.0, num_units=100.0):
    outputs = {"loss": loss, "grad_norm": grad_norm, "num_units": num_units}
    hook.before_optimizer_step(runner, 0, [], outputs)


def test_values_that_are_not_finite_are_the_guards_unless_the_run_may_go_back():
    nan, guard = float("nan"), NonFiniteGuardHook("skip")
    for policy, hooks, expected in (
        ("skip", [guard], []),
        ("stop", [guard], []),
        ("warn", [], []),
        ("skip", [], ["skip"]),
        ("rollback", [guard], ["skip", 7]),
    ):
        runner = fake_runner(*hooks)
        hook = LossSpikeHook(policy, max_skips=1)
        step(hook, runner, nan)
        if policy == "rollback":
            step(hook, runner, 1.0, float("inf"))
        assert runner.done == expected, policy
        assert hook.detector.num_accepted == 0
    with pytest.raises(LossSpikeError, match="loss nan"):
        step(LossSpikeHook("stop"), fake_runner(), nan)


def test_a_step_without_units_is_not_learnt_from():
    hook = LossSpikeHook("stop")
    step(hook, fake_runner(), 0.0, 0.0, num_units=0.0)
    assert hook.detector.num_accepted == 0


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="policy='ignore'; use one of warn, stop, skip, rollback"):
        LossSpikeHook("ignore")
    for name, value in dict(max_skips=-1, max_rollbacks=0, threshold=0.5, warmup=3).items():
        with pytest.raises(ValueError, match=f"{name}={value}; use a number from"):
            LossSpikeHook(**{name: value})
    with pytest.raises(ValueError, match="window=20; use a number from 32 on"):
        LossSpikeHook(window=20)
    for ckpt in (dict(interval=None, save_last=False), dict(interval=5, max_keep_ckpts=1)):
        with pytest.raises(ValueError, match="needs checkpoints on the way, at least two"):
            run(tmp_path, "rollback", ckpt=ckpt)
    (tmp_path / "checkpoints/iter_3").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        run(tmp_path, "rollback")


def test_the_default_warns(tmp_path):
    runner = Runner(model=torch.nn.Linear(1, 1), work_dir=str(tmp_path))
    (hook,) = [hook for hook in runner.hooks if isinstance(hook, LossSpikeHook)]
    assert hook.policy == "warn"
