"""Inject NaN, inf and huge losses, gradients and data; each must be caught before the update.

A program, started by test_bad_steps.py and `make test-slow`. A trial is one injected step of a
small run (at most TRIALS_A_RUN in one run) with the hooks every run has, of which one setting is
changed: what a bad step leads to. It passes where

    the update of that step was not made, and weights and optimizer state are unchanged bit for bit;
    policy "skip": the run ends with the weights and optimizer state of a run without the injection
        that leaves the same steps out, bit for bit (one bad step costs one step);
    policy "stop": the error names the rows of the step.

Prints one JSON object.

    python tests/reliability/bad_steps.py --trials 200 --seed 0
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from peft import LoraConfig

from tests.ranks import run_ranks
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.toy import ToyData, ToyMethod, toy_collate
from xtuner_lite.data.dataset import ChatDataset
from xtuner_lite.engine.hooks.loss_spike_hook import LossSpikeError, LossSpikeHook
from xtuner_lite.engine.hooks.nonfinite_guard_hook import (
    NonFiniteError,
    NonFiniteGuardHook,
    rows_of_step,
)
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.runner.runner import Runner

TRIALS_A_RUN = 10
MICRO_BATCHES = 3
WARMUP = 32  # of LossSpikeHook: a value that is huge but finite cannot be told before
MAX_IN_A_ROW = 5
NUM_STEPS = 64
VALUES = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "huge": 1e6}


@dataclass(frozen=True)
class Injection:
    """What is done to one step (0-based): on which rank, which value, where."""

    step: int
    rank: int
    value: str
    place: str
    micro_batch: int
    pick: int  # which parameter, which element


class Injector(Hook):
    """Makes steps bad, and notes whether weights and optimizer came out of them unchanged."""

    priority = "HIGHEST"

    def __init__(self, injections: list[Injection]) -> None:
        self.plan = {injection.step: injection for injection in injections}
        self.before: dict[int, str] = {}
        self.rows: dict[int, str] = {}
        self.verdicts: dict[int, str] = {}
        self._undo: Any = None

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        injection = self.plan.get(runner.iter)
        if injection is None:
            return
        self.before[runner.iter] = digest(runner)
        self.rows[runner.iter] = rows_of_step(data_batch)
        if runner.rank != injection.rank:
            return
        value, number = VALUES[injection.value], injection.micro_batch % len(data_batch)
        if injection.place == "data":
            x = data_batch[number]["x"].view(-1)
            if injection.value == "huge":
                x.fill_(value)  # dropout may take a single one away, and then nothing is bad
            else:
                x[injection.pick % x.numel()] = value
        elif injection.place == "gradient":
            parameters = [p for p in runner.model.parameters() if p.requires_grad]
            parameter = parameters[injection.pick % len(parameters)]
            self._undo = _Gradient(parameter, number, injection.pick, value)
        else:
            self._undo = _Loss(runner.model, number, injection.pick, value)

    def before_optimizer_step(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if self._undo is not None:
            assert self._undo.done
            self._undo.handle.remove()
            self._undo = None

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if runner.iter in self.plan:
            self.verdicts[runner.iter] = self.verdict(runner, outputs["updated"])

    def verdict(self, runner, updated: float) -> str:
        """'caught', or what went wrong with the present step."""
        if updated:
            return "the update was made"
        same = digest(runner) == self.before[runner.iter]
        return "caught" if same else "weights or optimizer state changed"


class _Gradient:
    """Makes one element of the gradient bad that one micro-batch gives to one parameter."""

    def __init__(self, parameter: torch.nn.Parameter, number: int, pick: int, value: float) -> None:
        self.left, self.pick, self.value, self.done = number, pick, value, False
        self.handle = parameter.register_hook(self.change)

    def change(self, gradient: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left != -1:
            return gradient
        self.done = True
        gradient = gradient.clone()
        gradient.view(-1)[self.pick % gradient.numel()] = self.value
        return gradient


class _Loss:
    """Adds to the loss of one micro-batch, or multiplies it, which changes its gradient too."""

    def __init__(self, model: torch.nn.Module, number: int, pick: int, value: float) -> None:
        self.left, self.pick, self.value, self.done = number, pick, value, False
        self.handle = model.register_forward_hook(self.change)

    def change(self, module, args, output):
        self.left -= 1
        if self.left == -1:
            self.done = True
            by = output.loss_sum * self.value if self.pick % 2 else self.value
            output.loss_sum = output.loss_sum + by
        return output


class LeaveOut(Hook):
    """Skips given steps for no reason: what a run with bad steps must be equal to."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps

    def before_optimizer_step(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if runner.iter in self.steps:
            runner.train_loop.skip_step()


def digest(runner: Runner) -> str:
    """sha256 over every weight, buffer and optimizer value."""
    total = hashlib.sha256()
    for name, tensor in sorted(runner.model.state_dict().items()):
        total.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().data)
    optimizer = runner.optim_wrapper.optimizer
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in sorted(optimizer.state.get(parameter, {}).items()):
                raw = torch.as_tensor(value).detach().contiguous().reshape(-1).view(torch.uint8)
                total.update(name.encode() + raw.numpy().data)
    return total.hexdigest()


def parts(model: str, seed: int) -> dict[str, Any]:
    """Model and data of a run."""
    if model == "toy":
        data = dict(type=ToyData, size=100, noise=0.1)
        return dict(
            model=ToyMethod(dropout=0.1),
            train_dataloader=dict(
                dataset=data, batch_size=2, collate_fn=dict(type=toy_collate), num_workers=0
            ),
        )
    rng = random.Random(seed)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Say {i}."},
                {"role": "assistant", "content": f"{i} " * rng.randint(1, 8)},
            ]
        }
        for i in range(100)
    ]
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")
    method = SupervisedFinetune(
        tiny_llama(num_layers=1), lora=lora if model == "lora" else None, self_check=False
    )
    data = ChatDataset(rows, tokenizer=tiny_tokenizer(), max_length=64)
    return dict(model=method, train_dataloader=dict(dataset=data, batch_size=1))


def train(folder: Path, model: str, seed: int, policy: str, hook: Hook) -> Runner:
    """One run of NUM_STEPS optimizer steps; an error of the guards ends it and is kept."""
    quiet = dict.fromkeys(
        ("dataset_preview", "loss_curve", "trainability", "throughput", "checkpoint", "logger")
    )
    torch.manual_seed(seed)
    runner = Runner(
        **parts(model, seed),
        work_dir=str(folder),
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=1e-3),
            dtype="fp32",
            accumulative_counts=MICRO_BATCHES,
            clip_grad=dict(max_norm=1.0) if seed % 2 else None,
        ),
        param_scheduler=dict(type="WarmupCosineLR"),
        train_cfg=dict(max_iters=NUM_STEPS),
        randomness=dict(seed=seed),
        default_hooks={
            **quiet,
            "nan_guard": dict(policy=policy),
            "loss_spike": dict(policy=policy, warmup=WARMUP, max_skips=MAX_IN_A_ROW),
        },
        custom_hooks=[hook],
        log_level="ERROR",
    )
    runner.error = None
    try:
        runner.train()
    except (NonFiniteError, LossSpikeError) as error:
        runner.error = error
    return runner


def draw(rng: random.Random, number: int, model: str, num_ranks: int) -> list[Injection]:
    """``number`` injections at different steps, never more in a row than are passed over."""
    while True:
        injections = []
        # A huge value while the detector warms up would be taken for ordinary. Skipped steps do
        # not warm it up.
        for step in rng.sample(range(NUM_STEPS), number):
            can_be_huge = step >= WARMUP + number and rng.random() < 0.7
            value = "huge" if can_be_huge else rng.choice(["nan", "inf", "-inf"])
            places = ["loss", "gradient"] + (["data"] if model == "toy" else [])
            rank, micro_batch = rng.randrange(num_ranks), rng.randrange(MICRO_BATCHES)
            pick = rng.randrange(9999)
            injections.append(Injection(step, rank, value, rng.choice(places), micro_batch, pick))
        steps = {injection.step for injection in injections}
        runs = [all(s + i in steps for i in range(MAX_IN_A_ROW + 1)) for s in steps]
        if not any(runs):
            return sorted(injections, key=lambda injection: injection.step)


def one_run(
    folder: Path, rng: random.Random, most: int, num_ranks: int
) -> tuple[list[tuple[Injection, str]], str, str]:
    """The injections of one run with their verdicts; which model and policy it was."""
    model, seed = rng.choice(["toy", "toy", "full", "lora"]), rng.randrange(1000)
    # Among several ranks an error ends the processes, so that it can be tried on one rank only.
    policy = "skip" if num_ranks > 1 else rng.choice(["skip", "skip", "skip", "stop"])
    injections = draw(rng, 1 if policy == "stop" else min(most, TRIALS_A_RUN), model, num_ranks)
    injector = Injector(injections)
    runner = train(folder / "bad", model, seed, policy, injector)
    if policy == "stop":
        (injection,) = injections
        rows = injector.rows[injection.step]
        if runner.error is None or runner.iter != injection.step:
            verdict = f"the run did not stop at the step: {runner.error}"
        elif f"step {injection.step + 1}:" not in str(runner.error) or rows not in str(
            runner.error
        ):
            verdict = f"the error does not name step and rows: {runner.error}"
        else:
            verdict = injector.verdict(runner, 0.0)
        return [(injection, verdict)], model, policy
    if runner.error is not None:
        return [(i, f"the run stopped: {runner.error}") for i in injections], model, policy
    plain = train(folder / "plain", model, seed, "stop", LeaveOut(set(injector.plan)))
    hooks = {type(hook): hook for hook in runner.hooks}
    caught = hooks[NonFiniteGuardHook].num_skipped + hooks[LossSpikeHook].num_bad
    if plain.error is not None or caught != len(injections):
        verdict = f"{caught} steps were skipped; without injections: {plain.error or 'none'}"
        return [(injection, verdict) for injection in injections], model, policy
    if digest(runner) != digest(plain):
        verdict = "the run does not end as one that leaves the steps out"
        return [(injection, verdict) for injection in injections], model, policy
    return [(i, injector.verdicts[i.step]) for i in injections], model, policy


def run_trials(folder: Path, number: int, seed: int, num_ranks: int = 1) -> dict[str, Any]:
    """All trials, in this process or, called on every rank, in each of them."""
    rng = random.Random(seed)
    trials, failures = 0, []
    kinds: collections.Counter[str] = collections.Counter()
    while trials < number:
        done, model, policy = one_run(folder / str(trials), rng, number - trials, num_ranks)
        trials += len(done)
        for injection, verdict in done:
            kinds.update([f"{injection.value} in {injection.place}", model, f"policy {policy}"])
            if verdict != "caught":
                failures.append([model, policy, str(injection), verdict])
    return {"trials": trials, "failures": failures, "kinds": dict(sorted(kinds.items()))}


def main() -> None:
    """Run the trials and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1, help="more than 1: DDP")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        given = Path(temporary), args.trials, args.seed, args.ranks
        if args.ranks == 1:
            results = [run_trials(*given)]
        else:
            results = run_ranks(run_trials, *given, world_size=args.ranks, timeout_s=3600)
    failed = {failure[2]: failure for result in results for failure in result["failures"]}
    result = {
        "trials": results[0]["trials"],
        "passes": results[0]["trials"] - len(failed),
        "failures": list(failed.values()),
        "seed": args.seed,
        "ranks": args.ranks,
        "kinds": results[0]["kinds"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    # As a module of its name: what is sent to the ranks is found there.
    from tests.reliability import bad_steps

    bad_steps.main()
