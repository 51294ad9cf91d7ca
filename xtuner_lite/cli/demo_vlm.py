"""``xtuner-lite demo-vlm``: a small language model learns to see, in two stages, and is asked.

Stage one trains the projector on captions, stage two projector and LoRA on questions, each by a
shipped config. Held-out images are asked about before, between and after; the figures go to a JSON
record, images with questions and answers to a PNG.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from xtuner_lite.cli.make_digits import CAPTIONS_FILE, QUESTIONS_FILE, TEST_FILE, write_digits
from xtuner_lite.version import __version__

HELP = "teach a small chat model to see handwritten digits, in two stages, and show its answers"

STAGE_ONE = "smollm2_135m_dinov2_small_pretrain_digits"
STAGE_TWO = "smollm2_135m_dinov2_small_finetune_digits"
PICTURE, RECORD = "answers.png", "demo_vlm.json"

#: Rounds of questions, in their order; each has its own column in table and picture.
ROUNDS = ("before", "after stage one", "after stage two")
KINDS = {
    "which_digit": "which digit",
    "larger_than_five": "larger than five",
    "even_or_odd": "even or odd",
}
#: What the demo is there to reach: share of held-out images whose digit is named right.
GOAL = 0.85


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments to its parser."""
    parser.add_argument(
        "--work-dir",
        default="work_dirs/demo_vlm",
        help="where runs, record and picture are kept (default: %(default)s)",
    )
    parser.add_argument("--retrain", action="store_true", help="train again, even if it was done")
    for stage, config in (("one", STAGE_ONE), ("two", STAGE_TWO)):
        parser.add_argument(
            f"--stage-{stage}-options",
            nargs="+",
            action="extend",
            default=[],
            metavar="KEY=VALUE",
            help=f"change the config {config}",
        )


def run(args: argparse.Namespace) -> int:
    """Runs the demo. Returns 0 if the goal is reached, else 1."""
    folder = Path(args.work_dir) / _fingerprint(args)
    if args.retrain:
        shutil.rmtree(folder, ignore_errors=True)
    receipt = folder / RECORD
    if receipt.exists():
        record = json.loads(receipt.read_text(encoding="utf-8"))
        print(f"this demo was done before ({record['finished']}); --retrain does it again")
    else:
        record = _teach(folder, args)
        _write(receipt, record)
    return _show(record)


def _fingerprint(args: argparse.Namespace) -> str:
    """Names the run by all it depends on, so that other options never meet an old result."""
    from xtuner_lite.config import find_config

    parts = [__version__, args.stage_one_options, args.stage_two_options]
    parts += [find_config(name).read_text(encoding="utf-8") for name in (STAGE_ONE, STAGE_TWO)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]


def _teach(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The demo itself; returns what is shown and kept."""
    begin = time.perf_counter()
    data = folder / "digits"
    _step(1, f"the data: handwritten digits with captions and questions in {data}")
    if not (data / TEST_FILE).exists():
        write_digits(data, force=True)  # what an interrupted run left is written again
    _step(2, f"stage one: the projector learns captions ({STAGE_ONE})")
    one = _stage(STAGE_ONE, data / CAPTIONS_FILE, folder / "stage_one", args.stage_one_options)
    runner, before = _asked_first(one)
    first = _train(runner, one)
    _step(3, f"stage two: projector and LoRA learn to answer ({STAGE_TWO})")
    options = [("pretrained_pth", first["checkpoint"]), *args.stage_two_options]
    two = _stage(STAGE_TWO, data / QUESTIONS_FILE, folder / "stage_two", options)
    second = _train(_runner(two), two)
    _step(4, "the answers")
    rounds = dict(zip(ROUNDS, (before, first["round"], second["round"]), strict=True))
    picture = draw_answers(data, {name: r["replies"] for name, r in rounds.items()}, folder)
    return {
        "finished": time.strftime("%Y-%m-%d %H:%M"),
        "total_s": round(time.perf_counter() - begin, 1),
        "training_s": [first["training_s"], second["training_s"]],
        "checkpoints": [first["checkpoint"], second["checkpoint"]],
        "picture": str(picture),
        "figures": {name: r["figures"] for name, r in rounds.items()},
        "asked": {name: r["asked"] for name, r in rounds.items()},
        "goal": {"which_digit": GOAL},
    }


def _stage(config: str, data: Path, work_dir: Path, options: list[Any]) -> Any:
    """The config of a stage, checked; the demo asks by itself, not the training loop."""
    from xtuner_lite.config import check_config, load_config, report_problems

    overrides = [
        ("data_path", str(data)),
        ("test_path", str(data.parent / TEST_FILE)),
        ("work_dir", str(work_dir)),
        ("train_cfg.val_interval", 0),
    ]
    cfg = load_config(config, overrides=[*overrides, *options])
    if problems := check_config(cfg):
        raise ValueError(report_problems(problems))
    return cfg


def _runner(cfg: Any) -> Any:
    from xtuner_lite.engine.checkpoint import list_checkpoints
    from xtuner_lite.runner.runner import Runner

    cfg.resume = bool(list_checkpoints(cfg.work_dir))  # an interrupted run goes on
    return Runner.from_cfg(cfg)


def _asked_first(cfg: Any) -> tuple[Any, dict[str, Any]]:
    """The runner of a stage, and what its untrained model answers (asked once, then kept)."""
    kept = Path(cfg.work_dir) / "before.json"
    runner = _runner(cfg)
    if kept.exists():
        return runner, json.loads(kept.read_text(encoding="utf-8"))
    if cfg.resume:  # interrupted before it was kept: the checkpoint's weights are no "before"
        shutil.rmtree(Path(cfg.work_dir) / "checkpoints")
        runner = _runner(cfg)
    asked = _round(runner, runner.val(), cfg)
    _write(kept, asked)
    return runner, asked


def _train(runner: Any, cfg: Any) -> dict[str, Any]:
    """Trains a stage and asks; where its checkpoint lies, and how long it took."""
    from xtuner_lite.engine.checkpoint import list_checkpoints

    begin = time.perf_counter()
    runner.train()
    seconds = time.perf_counter() - begin
    return {
        "training_s": round(seconds, 1),
        "checkpoint": str(list_checkpoints(cfg.work_dir)[-1].resolve()),
        "round": _round(runner, runner.val(), cfg),
    }


def _round(runner: Any, figures: dict[str, float], cfg: Any) -> dict[str, Any]:
    """Figures of a round, how many questions of each kind were asked, and the replies."""
    file = Path(cfg.work_dir) / "replies" / f"val_{runner.iter:06d}.jsonl"
    replies = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    asked = {kind: sum(reply["kind"] == kind for reply in replies) for kind in KINDS}
    return {"figures": figures, "asked": asked, "replies": replies}


def draw_answers(
    data: Path, rounds: dict[str, list[dict[str, Any]]], folder: Path, num_images: int = 8
) -> Path:
    """Draws images of the test set with a question each, and what each round replied to it.

    Args:
        data: folder that the replies' image paths begin from.
        rounds: name of a round -> its replies, as the reply loops write them.
        folder: gets the PNG.
        num_images: cells of the picture.

    Returns:
        The file.
    """
    from matplotlib.figure import Figure  # no pyplot: it would look for a screen
    from PIL import Image

    by_name = [{reply["name"]: reply for reply in replies} for replies in rounds.values()]
    shown = _to_show([name for name in by_name[0] if all(name in r for r in by_name)], num_images)
    columns = 4
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(3.4 * columns, 4.4 * lines))
    figure.subplots_adjust(left=0.02, right=0.98, top=0.95, bottom=0.14, wspace=0.08, hspace=0.5)
    for place, name in enumerate(shown):
        axes = figure.add_subplot(lines, columns, place + 1)
        replies = [replies[name] for replies in by_name]
        with Image.open(data / replies[0]["images"][0]) as image:
            axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.set_axis_off()
        axes.set_title(replies[0]["question"].strip(), fontsize=11)
        for line, (title, reply) in enumerate(zip(rounds, replies, strict=True)):
            is_right = reply["scores"]["exact_match"] == 1
            axes.text(
                0.0, -0.04 - 0.09 * line, f"{title}: {_short(reply['reply'])}",
                transform=axes.transAxes, fontsize=9, va="top", parse_math=False,
                color="#1a7f37" if is_right else "#b3261e",
            )  # fmt: skip
    file = folder / PICTURE
    figure.savefig(file, dpi=110, bbox_inches="tight", facecolor="white")
    return file


def _to_show(names: list[str], number: int) -> list[str]:
    """Questions on different images, the kinds in turn; ``names`` are in the order of the file."""
    kinds = list(KINDS)
    images = list(dict.fromkeys(name.rpartition(":")[0] for name in names))
    wanted = [f"{image}:{kinds[place % len(kinds)]}" for place, image in enumerate(images)]
    return [name for name in wanted if name in names][:number]


def _short(text: str, length: int = 34) -> str:
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return f"{text[: length - 3]}..." if len(text) > length else text or "(nothing)"


def _step(number: int, text: str) -> None:
    print(f"\n[{number}/4] {text}", flush=True)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".part")
    aside.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, file)


def _show(record: dict[str, Any]) -> int:
    """The figures as a table, where everything lies, and the exit code."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="right answers about held-out images")
    table.add_column("question")
    for name in ROUNDS:
        table.add_column(name, justify="right")
    for kind, title in KINDS.items():
        cells = [_share(record, name, f"exact_match/{kind}", kind) for name in ROUNDS]
        table.add_row(title, *cells)
    named = [_share(record, name, "contains_answer/which_digit") for name in ROUNDS]
    table.add_row("the digit is named anywhere", *named)
    print()
    Console().print(table)
    one, two = record["training_s"]
    print(
        f"\ntrained in {one:.0f} s + {two:.0f} s, {record['total_s']:.0f} s in all\n"
        f"images with questions and answers: {record['picture']}\n"
        f"the model: {record['checkpoints'][1]}"
    )
    reached = record["figures"][ROUNDS[2]]["exact_match/which_digit"]
    if reached >= GOAL:
        return 0
    print(
        f"\n{reached:.1%} of the digits are named right, and {GOAL:.0%} is the goal: train longer, "
        "for example\n    xtuner-lite demo-vlm --stage-two-options train_cfg.max_epochs=2"
    )
    return 1


def _share(record: dict[str, Any], name: str, figure: str, kind: str | None = None) -> str:
    value = record["figures"][name].get(figure)
    asked = f" of {record['asked'][name][kind]}" if kind else ""
    return "-" if value is None else f"{value:.1%}{asked}"
