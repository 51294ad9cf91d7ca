"""The input of a page whose model sees: text with pictures, and what of them is taken. Imports
gradio."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from xtuner_lite.chat.web.conversation import without_folders
from xtuner_lite.images.files import ImageError, ImageFiles

#: Pictures of one question.
MAX_PICTURES = 8
#: Pixels of the largest picture that is decoded; photographs of telephones have up to 50 million.
MAX_PIXELS = 50_000_000


def place_picture_box(placeholder: Any) -> gr.MultimodalTextbox:
    """Puts an input for text and pictures on the page that is being built."""
    box = gr.MultimodalTextbox(
        label=placeholder, placeholder=placeholder, show_label=False, container=False, lines=1,
        max_lines=8, scale=8, min_width=180, autofocus=True, elem_id="question", sources=["upload"],
        file_types=["image"], file_count="multiple", submit_btn=False,
        max_plain_text_length=1_000_000,  # a longer paste would become a file
    )  # fmt: skip
    move = box.async_move_resource_to_block_cache

    async def move_what_was_uploaded(place: str | Path | None) -> str | None:
        # gradio would download an address, and open a file of this machine, that a visitor names
        # in the place of an upload.
        if place is not None and not _is_uploaded(str(place)):
            raise gr.Error("only uploaded pictures are taken")
        return await move(place)

    box.async_move_resource_to_block_cache = move_what_was_uploaded
    return box


def _is_uploaded(place: str) -> bool:
    return "://" not in place and Path(place).resolve().is_relative_to(
        Path(get_upload_folder()).resolve()
    )


def read_box(value: Any) -> tuple[str, list[str]]:
    """(text, paths of the pictures) of either kind of input."""
    if isinstance(value, dict):
        return value.get("text") or "", list(value.get("files") or ())
    return value or "", []


def box_value(text: str, pictures: Sequence[str], *, takes_pictures: bool) -> Any:
    """What is put into the input, so that it can be changed."""
    return {"text": text, "files": list(pictures)} if takes_pictures else text


def check_pictures(pictures: Sequence[str]) -> None:
    """Looks whether each picture can be seen.

    Raises:
        ImageError: there are too many, or one is damaged, too large or no picture.
    """
    if len(pictures) > MAX_PICTURES:
        raise ImageError(f"{len(pictures)} pictures; at most {MAX_PICTURES} are taken")
    for picture in pictures:
        path = Path(picture)
        try:
            ImageFiles(path.parent, max_pixels=MAX_PIXELS).size(path.name)
        except ImageError as error:  # the server's folders are not the visitor's business
            raise ImageError(without_folders(str(error), [picture])) from error
