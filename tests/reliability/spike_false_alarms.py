"""How often LossSpikeHook's defaults call an ordinary step a spike: simulated and real runs.

A program; test_spike_false_alarms.py starts a small part of it. The families imitate what makes
the loss of a fine-tuning run noisy: one row or one token a step, rare sources with a much higher
loss, memorised rows, preference losses, a gradient that grows as LoRA wakes up, short last steps.
The runs of ``--real`` train a 1-layer model. ``heavy_tails`` is no ordinary run but the limit of
the method: Student-t noise with 3 degrees of freedom, which jumps by itself; it is counted apart.

Prints one JSON object: steps, alarms, and per family the rise of the loss and the ratio of the
gradient norm that a step needs half-way to be called a spike.

    python tests/reliability/spike_false_alarms.py --runs 20 --steps 1500 --seed 0 --real 400
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import Any

import numpy as np

from xtuner_lite.engine.spike_detector import SpikeDetector

Step = tuple[float, float, float]  # loss, gradient norm, units


def falling(step: int, steps: int) -> float:
    """2.5 down to 1.2 nats."""
    return 1.2 + 1.3 * math.exp(-6 * step / steps)


def large_batch(draw: np.random.Generator, steps: int) -> Iterator[Step]:
    for i in range(steps):
        yield falling(i, steps) + 0.03 * draw.normal(), 0.5 * math.exp(0.15 * draw.normal()), 8e3


def pretraining(draw: np.random.Generator, steps: int) -> Iterator[Step]:
    for i in range(steps):
        loss = 10.8 * math.exp(-i / 60) + 3 + 2 * math.exp(-i / 800) + 0.04 * draw.normal()
        yield loss, max(0.3, 5 * math.exp(-i / 100)) * math.exp(0.2 * draw.normal()), 5e5


def one_row(draw: np.random.Generator, steps: int) -> Iterator[Step]:
    for i in range(steps):
        units = float(np.clip(np.exp(draw.normal() + 4), 2, 2000))
        loss = falling(i, steps) * math.exp(0.5 * draw.normal())
        loss += abs(draw.normal()) * 2 / math.sqrt(units)
        yield loss, 2 * math.exp(0.5 * draw.normal()) * max(1, math.sqrt(55 / units)), units


def one_token(draw: np.random.Generator, steps: int) -> Iterator[Step]:
    """A class as the only supervised token; 3 % of the answers are wrong with confidence."""
    for i in range(steps):
        wrong = draw.random() < 0.03 + 0.5 * math.exp(-i / 30)
        loss = draw.exponential(3) if wrong else draw.exponential(0.02)
        yield loss, 10 * loss + 0.01 * math.exp(draw.normal()), 1


def eight_tokens(draw: np.random.Generator, steps: int) -> Iterator[Step]:
    tokens = one_token(draw, 8 * steps)
    for _ in range(steps):
        losses, norms, _ = zip(*(next(tokens) for _ in range(8)), strict=True)
        yield float(np.mean(losses)), float(np.mean(norms)), 8


def rare_source(draw: np.random.Generator, steps: int, share: float = 0.02) -> Iterator[Step]:
    for i in range(steps):
        rare = draw.random() < share
        loss = (falling(i, steps) + 2.5 * rare) * math.exp(0.15 * draw.normal())
        yield loss, (3 if rare else 1) * math.exp(0.4 * draw.normal()), 300


def very_rare_source(draw: np.random.Generator, steps: int) -> Iterator[Step]:
    return rare_source(draw, steps, share=0.005)


def memorised(draw: np.random.Generator, steps: int) -> Iterator[Step]:
    hard = [draw.random() < 0.03 for _ in range(100)]
    for i in range(steps):
        loss = (2.5 * math.exp(-i / 150) + 0.01) * math.exp(0.6 * draw.normal())
        loss += math.exp(-i / 1500) * hard[i % 100]
        yield loss, 2 * loss * math.exp(0.5 * draw.normal()), 60


def preferences(draw: np.random.Generator, steps: int, pairs: int = 8) -> Iterator[Step]:
    for i in range(steps):
        margins = draw.normal(min(4, i / 100), 1.5, size=pairs)
        loss = float(np.log1p(np.exp(-margins)).mean())
        yield loss, 20 * loss * math.exp(0.4 * draw.normal()), pairs


def one_pair(draw: np.random.Generator, steps: int) -> Iterator[Step]:
    return preferences(draw, steps, pairs=1)


def lora_wakes_up(draw: np.random.Generator, steps: int) -> Iterator[Step]:
    for i in range(steps):
        norm = 0.05 * math.exp(4 * min(1, i / 100)) * math.exp(0.3 * draw.normal())
        yield falling(i, steps) + 0.1 * draw.normal(), norm, 500


def short_last_step(draw: np.random.Generator, steps: int) -> Iterator[Step]:
    for i in range(steps):
        few = 4.0 if i % 20 == 19 else 1.0  # a step of 1 sample after 19 of 16
        loss = falling(i, steps) + 0.1 * few * draw.normal()
        yield loss, 0.5 * few * math.exp(0.2 * draw.normal()), 640 / few**2


def heavy_tails(draw: np.random.Generator, steps: int) -> Iterator[Step]:
    for _ in range(steps):
        yield 2 + 0.1 * draw.standard_t(3), math.exp(0.4 * draw.standard_t(4)), 1000


ORDINARY: list[Callable[[np.random.Generator, int], Iterator[Step]]] = [
    large_batch, pretraining, one_row, one_token, eight_tokens, rare_source, very_rare_source,
    memorised, preferences, one_pair, lora_wakes_up, short_last_step,
]  # fmt: skip


def judge(steps: Iterable[Step]) -> tuple[list[str], float, float]:
    """The alarms of a run, and the least rise and ratio that would be one half-way (see above)."""
    steps = [(float(loss), float(norm), float(units)) for loss, norm, units in steps]
    detector, alarms, rise, ratio = SpikeDetector(), [], math.inf, math.inf
    for number, step in enumerate(steps):
        if number == len(steps) // 2:
            seen = steps[max(0, number - detector.window) : number]
            losses, norms, units = (median(column) for column in zip(*seen, strict=True))
            rise = detector.loss_limit(units) - losses
            ratio = detector.grad_limit(units) / norms
        found = detector.look(*step)
        if found is None:
            detector.accept(*step)
        else:
            alarms.append(f"step {number + 1}: {found}")
    return alarms, rise, ratio


def simulate(runs: int, steps: int, seed: int) -> dict[str, Any]:
    """Every family, ``runs`` times."""
    families = {}
    for family in [*ORDINARY, heavy_tails]:
        judged = [judge(family(np.random.default_rng([seed, i]), steps)) for i in range(runs)]
        families[family.__name__] = {
            "alarms": sum(len(alarms) for alarms, _, _ in judged),
            "rise_needed": round(median(rise for _, rise, _ in judged), 2),
            "ratio_needed": round(median(ratio for _, _, ratio in judged), 1),
        }
    return families


def rows_of(kind: str, rng: random.Random) -> list[dict[str, Any]]:
    """Training rows of a real run."""
    words = ["one", "two", "three", "Paris", "France", "sky", "blue", "green", "grass"]

    def text(number: int) -> str:
        return " ".join(rng.choices(words, k=number))

    def row(question: str, answer: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": question},
                             {"role": "assistant", "content": answer}]}  # fmt: skip

    if kind == "classes":  # one row in 30 has the other class, for no reason
        return [row(f"Row {i}?", "N" if rng.random() < 1 / 30 else "Y") for i in range(400)]
    if kind == "memorised":
        return [row(f"Say {i}.", text(1 + i % 12)) for i in range(20)]
    if kind == "mixture":  # 3 % of another language
        strange = [row("Go on.", "".join(chr(rng.randrange(33, 127)) for _ in range(60)))]
        return [*strange * 6, *(row(f"Say {i}.", "blue sky " * (1 + i % 5)) for i in range(194))]
    return [row(text(5), text(rng.randint(1, 25))) for _ in range(200)]


def real_run(kind: str, steps: int, seed: int) -> list[Step]:
    """Loss, gradient norm and units of a small training, batch size 1."""
    from mmengine.hooks import Hook

    from tests.tiny import tiny_llama, tiny_tokenizer
    from xtuner_lite.data.dataset import ChatDataset
    from xtuner_lite.engine.hooks import DEFAULT_HOOKS
    from xtuner_lite.methods.sft import SupervisedFinetune
    from xtuner_lite.runner.runner import Runner

    seen: list[Step] = []

    class Record(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            seen.append((outputs["loss"], outputs["grad_norm"], outputs["num_units"]))

    rows = rows_of(kind, random.Random(seed))
    data = ChatDataset(rows, tokenizer=tiny_tokenizer(), max_length=128)
    with tempfile.TemporaryDirectory() as folder:
        Runner(
            model=SupervisedFinetune(tiny_llama(num_layers=1), self_check=False),
            work_dir=folder,
            train_dataloader=dict(dataset=data, batch_size=1),
            optim_wrapper=dict(
                optimizer=dict(type="AdamW", lr=5e-3), dtype="fp32", clip_grad=dict(max_norm=1.0)
            ),
            param_scheduler=dict(type="WarmupCosineLR"),
            train_cfg=dict(max_iters=steps),
            randomness=dict(seed=seed),
            default_hooks={**dict.fromkeys(DEFAULT_HOOKS), "param_scheduler": dict(
                type="ParamSchedulerHook")},
            custom_hooks=[Record()],
            log_level="ERROR",
        ).train()  # fmt: skip
    return seen


def main() -> None:
    """Run all of it and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", type=int, default=0, help="optimizer steps of each real run")
    args = parser.parse_args()
    families = simulate(args.runs, args.steps, args.seed)
    limit = families.pop("heavy_tails")
    real = {}
    for kind in ("text", "classes", "memorised", "mixture") if args.real else ():
        real[kind] = judge(real_run(kind, args.real, args.seed))[0]
    result = {
        "simulated_steps": args.runs * args.steps * len(families),
        "simulated_alarms": sum(family["alarms"] for family in families.values()),
        "real_steps": args.real * len(real),
        "real_alarms": real,
        "families": families,
        "heavy_tails": {**limit, "steps": args.runs * args.steps},
        "seed": args.seed,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
