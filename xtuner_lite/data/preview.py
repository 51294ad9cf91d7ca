"""A sample as text, with what is learnt made visible."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from xtuner_lite.data.segments import Segment, segments_of
from xtuner_lite.images.files import shown_name
from xtuner_lite.images.vision_inputs import vision_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from xtuner_lite.images.vision_inputs import VisionInputs

_LEARNT, _PLAIN, _RULE, _RESET = "\033[1;32m", "\033[90m", "\033[36m", "\033[0m"
_OPEN, _CLOSE = "[[", "]]"
#: Characters that steer a terminal or turn text around, and those that cannot be seen; not the
#: joiners, which belong to emoji families and to the words of several scripts.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff]"
)


def render_preview(
    sample: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    color: bool = True,
    max_tokens: int | None = 600,
) -> str:
    """The text of one dataset sample; learnt tokens green, or in [[ ]] without colour.

    A learnt stretch whose weight is not 1 begins with it: 'x0.5'.

    Args:
        sample: what ``dataset[i]`` returns.
        tokenizer: turns the ids back into text, special tokens shown.
        color: ANSI colours.
        max_tokens: tokens shown; None shows all.

    Returns:
        Several lines: a head with the counts, then each segment under a rule with its row.
    """
    segments = segments_of(sample)
    size = sum(map(len, segments))
    learnt = sum(int(segment.learnt.sum()) for segment in segments)
    marks = "learnt is green" if color else f"learnt stands in {_OPEN} {_CLOSE}"
    lines = [
        f"{size} tokens, {learnt} learnt ({learnt / max(size, 1):.0%}), "
        f"{len(segments)} segment(s); {marks}"
    ]
    left = size if max_tokens is None else max_tokens
    for segment in segments:
        if left <= 0:
            break
        rule = (
            f"--- segment {segment.number + 1}/{len(segments)}: {show_unseen(segment.title)}, "
            f"{len(segment)} tokens, {int(segment.learnt.sum())} learnt ---"
        )
        lines.append(f"{_RULE}{rule}{_RESET}" if color else rule)
        lines.append(render_tokens(segment, tokenizer, 0, left, color=color))
        left -= min(len(segment), left)
    hidden = size - min(size, size if max_tokens is None else max_tokens)
    if hidden:
        lines.append(f"... {hidden} more tokens")
    return "\n".join(lines)


def render_tokens(
    segment: Segment,
    tokenizer: PreTrainedTokenizerBase,
    begin: int,
    end: int,
    *,
    color: bool,
) -> str:
    """Tokens [begin, end) of a segment as marked text, see render_preview."""
    pieces = []
    images = iter(segment.images)
    vision = vision_of(tokenizer)
    for is_learnt, weight, run in _runs(segment, slice(begin, end)):
        text = tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text = show_unseen(text)
        if vision is not None and not is_learnt:
            text = _shorten_images(text, vision, images)
        if is_learnt and weight != 1:
            text = f"x{weight:g} {text}"
        if not color:
            pieces.append(f"{_OPEN}{text}{_CLOSE}" if is_learnt else text)
            continue
        code = _LEARNT if is_learnt else _PLAIN
        # A colour that spans lines is lost in pagers: paint line by line.
        pieces.append(
            "\n".join(f"{code}{line}{_RESET}" if line else "" for line in text.split("\n"))
        )
    return "".join(pieces)


def _shorten_images(text: str, vision: VisionInputs, images: Iterator[Any]) -> str:
    """The text with each image's tokens as one note: its name, its size and how many they are."""
    token = vision.processor.tokenizer.convert_ids_to_tokens(vision.image_token_id)
    image = next(images, None)
    at = text.find(token)
    out = []
    while at >= 0:
        count = 0 if image is None else vision.num_image_tokens(image.size)
        length = count * len(token)
        if image is None or text[at : at + length] != token * count:  # rows of tiles, or cut
            length = len(token)
            while text.startswith(token, at + length):
                length += len(token)
            note = f"{token} x{length // len(token)}"
        else:
            size = f"{image.size[0]}x{image.size[1]}"
            note = f"{token} x{count} ({show_unseen(shown_name(image.name))}, {size})"
            image = next(images, None)
        out += [text[:at], note]
        text = text[at + length :]
        at = text.find(token)
    return "".join([*out, text])


def _runs(segment: Segment, part: slice) -> Iterator[tuple[bool, float, list[int]]]:
    """(learnt or not, weight, ids) of each run of tokens of one kind."""
    ids, learnt = segment.input_ids[part], segment.learnt[part]
    weights = segment.target_weights[part]
    borders = np.flatnonzero(np.diff(learnt) | (np.diff(weights) != 0)) + 1
    start = 0
    for stop in [*borders.tolist(), len(ids)]:
        if stop > start:
            yield bool(learnt[start]), float(weights[start]), ids[start:stop].tolist()
        start = stop


def show_unseen(text: str) -> str:
    """The text with control, direction and invisible characters written out: data must neither
    steer the terminal nor hide in a page. Newlines and tabs stay."""
    return _UNSEEN.sub(_written_out, text)


def _written_out(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
