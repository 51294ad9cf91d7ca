"""Samples as one static page: tokens, what is learnt, weights, borders of packed rows, search.

The page needs no network and loads nothing. Whatever comes from the data is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from xtuner_lite.data.ledger import Ledger
from xtuner_lite.data.preview import show_unseen
from xtuner_lite.data.segments import Segment, segments_of
from xtuner_lite.images.files import ImageError, shown_name
from xtuner_lite.images.vision_inputs import vision_of
from xtuner_lite.structures import IGNORE_INDEX

_PAGE = Path(__file__).with_name("preview_page.html")
#: Most tokens that share one character, such as the bytes of an emoji.
_MOST_IN_ONE_CHARACTER = 12
#: Pixels of a thumbnail's longer side.
_THUMBNAIL = 160


def render_page(
    samples: Sequence[tuple[str, dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    title: str,
    ledger: Ledger | None = None,
) -> str:
    """The whole page as text.

    Args:
        samples: (what it is called, what ``dataset[i]`` returns).
        tokenizer: turns ids back into text, special tokens shown.
        title: of the page.
        ledger: shown folded, if there is one.
    """
    pieces = _Pieces(tokenizer)
    body = "\n".join(
        _sample(label, segments_of(sample), pieces, number)
        for number, (label, sample) in enumerate(samples)
    )
    report = "" if ledger is None else escape(show_unseen(ledger.report()))
    page = _PAGE.read_text(encoding="utf-8")
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    fields = {
        "SCRIPT_HASH": digest,  # the one script that the page may run
        "TITLE": escape(show_unseen(title)),
        "LEDGER": f"<details><summary>Ledger</summary><pre>{report}</pre></details>" * bool(report),
        "BODY": body,
    }
    parts = re.split("<!--([A-Z_]+)-->", page)  # filled in one go: data may look like our marks
    parts[1::2] = [fields[name] for name in parts[1::2]]
    return "".join(parts)


def _sample(label: str, segments: list[Segment], pieces: _Pieces, number: int) -> str:
    size = sum(map(len, segments))
    learnt = sum(int(segment.learnt.sum()) for segment in segments)
    rows = "row" if len(segments) == 1 else "rows packed"
    head = (
        f"<h2>{escape(label)}</h2><p class=counts>{size:,} tokens, {learnt:,} learnt "
        f"({learnt / max(size, 1):.0%}), {len(segments)} {rows}</p>"
    )
    bar = "".join(
        f'<a href="#s{number}-{segment.number}" title="{escape(_heading(segment))}" '
        f'style="flex:{len(segment)};background:{_stripes(segment)}"></a>'
        for segment in segments
    )
    body = "\n".join(_segment(segment, pieces, number, len(segments)) for segment in segments)
    return f"<section class=sample>{head}<nav class=bar>{bar}</nav>\n{body}\n</section>"


def _heading(segment: Segment) -> str:
    learnt = int(segment.learnt.sum())
    return (
        f"{show_unseen(segment.title)}: {len(segment):,} tokens, {learnt:,} learnt "
        f"({learnt / max(len(segment), 1):.0%})"
    )


def _stripes(segment: Segment) -> str:
    """A CSS gradient with a stripe at each learnt stretch of the segment."""
    edges = np.flatnonzero(np.diff(segment.learnt)) + 1
    stops, begin = [], 0
    for end in [*edges.tolist(), len(segment)]:
        colour = "var(--learnt-line)" if segment.learnt[begin] else "var(--plain-line)"
        stops.append(f"{colour} {begin / len(segment):.2%} {end / len(segment):.2%}")
        begin = end
    return f"linear-gradient(90deg,{','.join(stops)})"


def _segment(segment: Segment, pieces: _Pieces, sample: int, count: int) -> str:
    head = (
        f"<header><span class=part>{segment.number + 1}/{count}</span> "
        f"<code>{escape(show_unseen(segment.title))}</code> <span class=counts>{len(segment):,} "
        f"tokens, {int(segment.learnt.sum()):,} learnt</span></header>"
    )
    weights, learnt = segment.target_weights, segment.learnt
    marks = []
    borders = {0, *(np.flatnonzero(np.diff(learnt) | (np.diff(weights) != 0)) + 1).tolist()}
    for begin, end, text in pieces.of(segment.input_ids, borders | pieces.image_borders(segment)):
        marks.append(_token(segment, begin, end, text, pieces, weights, begin in borders))
    return (
        f'<article id="s{sample}-{segment.number}">{head}{_thumbnails(segment)}'
        f"<div class=text>{''.join(marks)}</div></article>"
    )


def _thumbnails(segment: Segment) -> str:
    """The segment's images, small, inside the page; what cannot be read says so."""
    figures = []
    for image in segment.images:
        caption = escape(show_unseen(f"{shown_name(image.name)} {image.size[0]}x{image.size[1]}"))
        try:
            picture = image.open()
        except ImageError as error:
            figures.append(f"<figure><figcaption>{escape(str(error))}</figcaption></figure>")
            continue
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=80)
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        figures.append(
            f'<figure><img alt="{caption}" src="data:image/jpeg;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return f"<div class=images>{''.join(figures)}</div>" if figures else ""


def _token(
    segment: Segment,
    begin: int,
    end: int,
    text: str,
    pieces: _Pieces,
    weights: np.ndarray,
    starts: bool,
) -> str:
    """One token as an element: <b> is learnt, <i> is not; class s: special, w: weighted."""
    is_learnt, weight = segment.labels[begin] != IGNORE_INDEX, float(weights[begin])
    ids = segment.input_ids[begin:end].tolist()
    hint = f"#{begin} id {' '.join(map(str, ids))}"
    classes = ["s"] if pieces.is_special(ids[0]) else []
    label = ""
    if is_learnt and weight != 1:
        classes.append("w")
        hint += f" weight {weight:g}"
        label = f"<sup>&times;{weight:g}</sup>" if starts else ""
    shown = escape(show_unseen(text)).replace("\n", "<u></u>\n").replace("\t", "<s></s>\t")
    attributes = f' class="{" ".join(classes)}"' if classes else ""
    tag = "b" if is_learnt else "i"
    return f'{label}<{tag}{attributes} title="{hint}">{shown}</{tag}>'


class _Pieces:
    """Cuts ids into the smallest pieces that are whole characters, with their text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        vision = vision_of(tokenizer)
        self._image_token = -1 if vision is None else vision.image_token_id
        self._special = set(tokenizer.all_special_ids)
        self._special.update(
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        )

    def image_borders(self, segment: Segment) -> set[int]:
        """Where runs of image tokens begin and end: each is one piece of the page."""
        is_image = np.concatenate([[False], segment.input_ids == self._image_token, [False]])
        return set(np.flatnonzero(np.diff(is_image)).tolist())

    def is_special(self, token: int) -> bool:
        """Whether a token is one of the tokenizer's special ones."""
        return token in self._special

    def of(self, input_ids: np.ndarray, borders: set[int]) -> Iterator[tuple[int, int, str]]:
        """(begin, end, text) of each piece; no piece reaches across a border."""
        ids = input_ids.tolist()
        begin, before = 0, []
        while begin < len(ids):
            if ids[begin] == self._image_token:
                end = next(i for i in range(begin, max(borders) + 1) if i in borders and i > begin)
                yield begin, end, f"{self._decode(ids[begin : begin + 1])} x{end - begin}"
                before, begin = [], end
                continue
            for end in range(begin + 1, min(len(ids), begin + _MOST_IN_ONE_CHARACTER) + 1):
                text = self._text(before, ids[begin:end])
                if end in borders or not text.endswith("\N{REPLACEMENT CHARACTER}"):
                    break
            else:  # bytes that are no character
                end = begin + 1
                text = self._text(before, ids[begin:end])
            yield begin, end, text
            before = ids[begin:end]
            begin = end

    def _text(self, before: list[int], ids: list[int]) -> str:
        """Text of ``ids`` behind ``before``: alone, SentencePiece drops the space in front."""
        head = self._decode(before)
        whole = self._decode(before + ids)
        return whole[len(head) :] if whole.startswith(head) else self._decode(ids)

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        return self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
