"""Image rows prepared per second, and training tokens per second packed against unpacked.

    python benchmarks/image_throughput.py [--rows 1200] [--steps 8] [--pairs 2] [--threads 2]

Trains by the demo's stage two (SmolLM2-135M, DINOv2-small, projector and LoRA) on its questions
about digits. Packed: samples of 512 tokens, one a step. Unpacked: the rows one by one, as many in
a step (by accumulation) as a packed sample holds. Counted are real tokens, image tokens included,
from the end of the first step to the end of the last; each run is a fresh process, and the sides
take turns. Preparing means reading the JSON, decoding every image once, rendering and tokenising,
without a cache; it is also measured with one process per thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sft_throughput import cpu_name

from xtuner_lite.cli.make_digits import QUESTIONS_FILE, write_digits

HERE = Path(__file__).resolve().parent
CONFIG = "smollm2_135m_dinov2_small_finetune_digits"
SIDES = ("packed", "unpacked")


def main() -> int:
    """Runs the sides in turn and prints the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1200, help="rows prepared and trained on")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps; the first not timed")
    parser.add_argument("--pairs", type=int, default=2, help="how often both sides run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder) / "digits")
        args.folder = Path(folder)
        print(f"{cpu_name()}, {args.threads} threads")
        for num_proc in dict.fromkeys((1, args.threads)):
            print(f"preparing with {num_proc} process(es): {prepare(args, num_proc):.0f} rows/s")
        speeds: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(args.pairs):
            for side in SIDES:
                result = run_side(side, args)
                speeds[side].append(result["tokens_per_s"])
                print(f"{side:>9}: {result['tokens_per_s']:7.1f} tokens/s, {result['fill']}")
    ratios = [a / b for a, b in zip(speeds["packed"], speeds["unpacked"])]
    print(f"packed / unpacked: median {statistics.median(ratios):.2f} of {len(ratios)}")
    return 0


def config_of(folder: Path, rows: int) -> Any:
    """The demo's stage two without its first stage, on the first rows of its questions."""
    from xtuner_lite.config import load_config

    cfg = load_config(CONFIG)
    data = folder / "digits" / QUESTIONS_FILE
    cfg.train_dataloader.dataset.update(data=str(data), limit=rows, cache=False, max_length=512)
    cfg.model.pretrained_pth = None
    cfg.val_dataloader = cfg.val_evaluator = None
    cfg.work_dir = str(folder / "run")
    cfg.default_hooks.update(checkpoint=None, loss_curve=None, dataset_preview=None)
    return cfg


def prepare(args: argparse.Namespace, num_proc: int) -> float:
    """Rows per second from the JSON file to packed samples of tokens."""
    from xtuner_lite.registry import DATASETS, MODELS

    cfg = config_of(args.folder, args.rows)
    tokenizer = MODELS.build(cfg.tokenizer)
    start = time.perf_counter()
    dataset = DATASETS.build({**cfg.train_dataloader.dataset, "num_proc": num_proc},
                             tokenizer=tokenizer)  # fmt: skip
    return dataset.num_rows / (time.perf_counter() - start)


def run_side(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """One side in a fresh process.

    Raises:
        RuntimeError: the process failed; the end of its output is in the message.
    """
    command = [sys.executable, str(Path(__file__)), "--side", side, "--folder", str(args.folder),
               "--rows", str(args.rows), "--steps", str(args.steps)]  # fmt: skip
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Trains one side in this process."""
    from mmengine.hooks import Hook

    from xtuner_lite.config import check_config, report_problems
    from xtuner_lite.registry import DATASETS, MODELS
    from xtuner_lite.runner.runner import Runner

    cfg = config_of(args.folder, args.rows)
    section = cfg.train_dataloader.dataset
    packed = DATASETS.build(dict(section), tokenizer=MODELS.build(cfg.tokenizer))
    rows_per_sample = packed.num_rows / len(packed)
    if args.side == "unpacked":
        section.packing = "none"
        cfg.optim_wrapper.accumulative_counts = round(rows_per_sample)
    cfg.train_cfg = dict(max_iters=args.steps)
    if problems := check_config(cfg):
        raise ValueError(report_problems(problems))
    ends: list[tuple[float, int]] = []

    class Watch(Hook):
        def after_train_iter(
            self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
        ) -> None:
            ends.append((time.perf_counter(), int(outputs["num_tokens"])))

    runner = Runner.from_cfg(cfg)
    runner.register_hook(Watch())
    runner.train()
    tokens = sum(count for _, count in ends[1:])
    return {
        "tokens_per_s": tokens / (ends[-1][0] - ends[0][0]),
        "fill": f"{rows_per_sample:.1f} rows in a step, {tokens / (len(ends) - 1):.0f} tokens",
    }


if __name__ == "__main__":
    sys.exit(main())
