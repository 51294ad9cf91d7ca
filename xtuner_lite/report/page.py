"""A run as one static HTML page, which loads nothing; whatever comes from the run is escaped."""

from __future__ import annotations

import base64
import re
import time
from html import escape
from pathlib import Path
from typing import Any

from xtuner_lite.data.preview import show_unseen
from xtuner_lite.engine.hooks.console import format_number
from xtuner_lite.images.turns import shown_text
from xtuner_lite.report.curves import draw_curves
from xtuner_lite.report.run_record import RunRecord
from xtuner_lite.report.words import LANGUAGES, WORDS

_PAGE = Path(__file__).with_name("report_page.html")


def render_report(run: RunRecord, *, language: str = "en", refresh_s: int | None = None) -> str:
    """The page as text.

    Args:
        run: see run_record.read_run.
        language: 'en' or 'zh', of the headings.
        refresh_s: seconds after which a browser loads the page anew; None: never.

    Raises:
        ValueError: an unknown language.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language is {language!r}; it must be one of {', '.join(LANGUAGES)}")
    words = WORDS[language]
    made = time.strftime("%Y-%m-%d %H:%M:%S")
    refresh = f'<meta http-equiv="refresh" content="{refresh_s}">' if refresh_s else ""
    fields = {
        "LANG": {"en": "en", "zh": "zh-CN"}[language],
        "REFRESH": refresh,
        "TITLE": escape(run.work_dir.name),
        "SUBTITLE": f"{escape(str(run.work_dir))} · {words['made']} {made}",
        "TILES": "".join(_tile(*tile) for tile in _tiles(run, words)),
        "BODY": "\n".join(part for part in _sections(run, words) if part),
    }
    # Filled in one go: what a run says may look like our marks.
    parts = re.split("<!--([A-Z]+)-->", _PAGE.read_text(encoding="utf-8"))
    parts[1::2] = [fields[name] for name in parts[1::2]]
    return "".join(parts)


def _tiles(run: RunRecord, words: dict[str, str]) -> list[tuple[str, str, str]]:
    """(label, value, CSS class) of the figures on top."""
    train = run.of_mode("train")
    total = f" / {run.max_iters}" if run.max_iters is not None else ""
    tiles = [
        (words["state"], words[run.state], run.state),
        (words["steps"], f"{run.last_step}{total}", ""),
    ]
    losses = [r["loss"] for r in train if isinstance(r.get("loss"), (int, float))]
    if losses:
        tiles.append((words["loss"], f"{losses[-1]:.4f}", ""))
    val = [r["loss"] for r in run.of_mode("val") if isinstance(r.get("loss"), (int, float))]
    if val:
        tiles.append((words["best"], f"{min(val):.4f}", ""))
    num_tokens, seconds = _sum(train, "num_tokens"), _sum(train, "step_time_s")
    if num_tokens:
        tiles.append((words["tokens"], f"{num_tokens:,.0f}", ""))
    if num_tokens and seconds:
        tiles.append((words["speed"], format_number(num_tokens / seconds), ""))
        tiles.append((words["time"], _duration(seconds), ""))
    peaks = [r["peak_memory_bytes"] for r in train if r.get("peak_memory_bytes")]
    if peaks:
        tiles.append((words["memory"], f"{max(peaks) / 2**30:.2f} GiB", ""))
    tiles.append((words["checkpoints"], str(len(run.checkpoints)), ""))
    if len(run.attempts) > 1:
        tiles.append((words["attempts"], str(len(run.attempts)), ""))
    return tiles


def _sections(run: RunRecord, words: dict[str, str]) -> list[str]:
    return [
        _text_section(words["failure"], run.failure, "wrap failure")
        if run.state == "failed"
        else "",
        _curves_section(run, words),
        _samples_section(run, words),
        "".join(_text_section(f"{words['ledger']}: {name}", text) for name, text in run.ledgers),
        _folded(words["preview"], run.preview, "wrap"),
        _text_section(words["checkpoints"], "\n".join(run.checkpoints)),
        _folded(words["config"], run.config),
        _text_section(words["environment"], run.environment, "wrap"),
        _text_section(words["notes"], "\n".join(run.notes), "wrap"),
    ]


def _curves_section(run: RunRecord, words: dict[str, str]) -> str:
    figures = []
    for curve in draw_curves(run):
        source = base64.b64encode(curve.svg.encode()).decode()
        figures.append(
            f"<figure><figcaption>{escape(curve.label)}</figcaption>"
            f'<img src="data:image/svg+xml;base64,{source}" '
            f'alt="{escape(curve.label)}. {escape(curve.summary)}">'
            f'<div class="quiet">{escape(curve.summary)}</div></figure>'
        )
    body = f'<div class="curves">{"".join(figures)}</div>' if figures else _quiet(words["nothing"])
    return f"<h2>{words['curves']}</h2>{body}"


def _samples_section(run: RunRecord, words: dict[str, str]) -> str:
    """Each question with its answers, the newest in view and the earlier ones folded."""
    heading = f"<h2>{words['samples']}</h2>"
    if not run.samples:
        return heading + _quiet(words["no_samples"])
    questions: dict[str, dict[int, str]] = {}
    for sample in run.samples:
        answers = questions.setdefault(_question(sample["messages"]), {})
        answers[sample["step"]] = sample["reply"]  # a resume may have asked at a step again
    articles = []
    for question, answers in questions.items():
        steps = sorted(answers)
        newest = _answers(answers, steps[-1:], words)
        earlier = _answers(answers, steps[:-1], words)
        fold = f"<details open><summary>{words['earlier']}</summary>{earlier}</details>"
        articles.append(
            f"<article><h3>{_visible(question)}</h3>{newest}{fold if steps[:-1] else ''}</article>"
        )
    return heading + "".join(articles)


def _answers(answers: dict[int, str], steps: list[int], words: dict[str, str]) -> str:
    rows = [
        f"<dt>{words['step']} {step}</dt><dd>{_visible(answers[step].strip())}</dd>"
        for step in reversed(steps)
    ]
    return f"<dl>{''.join(rows)}</dl>"


def _question(messages: list[dict[str, Any]]) -> str:
    """A single question as it is; a conversation with its roles."""
    if len(messages) == 1:
        return shown_text(messages[0].get("content"))
    return "\n".join(f"{m.get('role')}: {shown_text(m.get('content'))}" for m in messages)


def _text_section(heading: str, text: str, style: str = "") -> str:
    if not text.strip():
        return ""
    return f'<h2>{escape(heading)}</h2><pre class="{style}">{_visible(text.rstrip())}</pre>'


def _folded(heading: str, text: str, style: str = "") -> str:
    if not text.strip():
        return ""
    return (
        f"<details><summary><h2>{escape(heading)}</h2></summary>"
        f'<pre class="{style}">{_visible(text.rstrip())}</pre></details>'
    )


def _tile(label: str, value: str, style: str) -> str:
    return (
        f'<div class="tile"><span class="quiet">{escape(label)}</span>'
        f'<b class="{style}">{escape(value)}</b></div>'
    )


def _visible(text: str) -> str:
    return escape(show_unseen(text))


def _quiet(text: str) -> str:
    return f'<p class="quiet">{escape(text)}</p>'


def _sum(records: list[dict[str, Any]], name: str) -> float:
    return sum(r[name] for r in records if isinstance(r.get(name), (int, float)))


def _duration(seconds: float) -> str:
    """'1:02:03'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
