"""Images inside conversations: found, looked at, and written into the text as their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from xtuner_lite.data.image_rows import Named
from xtuner_lite.data.messages import BadRow
from xtuner_lite.data.sources import Source
from xtuner_lite.images.files import ImageError, ImageFiles, image_name
from xtuner_lite.images.vision_inputs import VisionInputs, image_spans, vision_of
from xtuner_lite.structures import Message
from xtuner_lite.templates.layout import Layout


class BadImage(BadRow):
    """An image of a row that cannot be used; counted apart from other bad rows."""

    reason = "an image cannot be read"


@dataclass(frozen=True)
class RowImages:
    """What a row's images become. Can be pickled.

    Args:
        vision: of the tokenizer.
        files: opens them.
    """

    vision: VisionInputs
    files: ImageFiles

    def find(self, messages: Sequence[Message]) -> tuple[list[Message], list[Named]]:
        """The messages with plain names for images, and (name, size) of each image in order.

        Every image is decoded once: what is damaged is found now and not in the middle of a run.

        Raises:
            BadImage: one cannot be read.
            RowRefused: a text holds the image token.
        """
        images: list[Named] = []
        found: list[Message] = []
        for index, message in enumerate(messages):
            content = message.get("content")
            if isinstance(content, str):
                self.vision.check_no_image_token(content, f"message {index}")
                found.append(message)
                continue
            parts = []
            for part in content or ():
                if part["type"] == "image":
                    named = self._look_at(part["image"], index)
                    images.append(named)
                    part = {"type": "image", "image": named[0]}
                else:
                    self.vision.check_no_image_token(part["text"], f"message {index}")
                parts.append(part)
            found.append({**message, "content": parts} if content else message)
        return found, images

    def check_text(self, text: str, what: str) -> None:
        """Raises RowRefused if a text without images holds the image token."""
        self.vision.check_no_image_token(text, what)

    def _look_at(self, image: object, index: int) -> Named:
        try:
            name = image_name(image)
            return name, self.files.size(name)
        except ImageError as error:
            raise BadImage(f"message {index}: {error}") from error

    def expand(self, layout: Layout, images: Sequence[Named]) -> Layout:
        """The layout with the tokens of the images in it.

        Raises:
            BadImage: the image processor refuses an image.
            TemplateError, RowRefused: the template writes none, or another number of them.
        """
        try:
            return self.vision.expand_layout(layout, [size for _, size in images])
        except ImageError as error:
            raise BadImage(str(error)) from error

    def spans(self, input_ids: np.ndarray, images: Sequence[Named]) -> list[tuple[int, int]]:
        """Tokens [first, end) of each image in a row, int [T]."""
        counts = [self.vision.num_image_tokens(size) for _, size in images]
        return image_spans(input_ids, self.vision.image_token_id, counts)


def images_in_part(
    spans: Sequence[tuple[int, int]], size: int, limit: int, *, from_end: bool
) -> tuple[int, list[int]]:
    """How much of a row is kept so that no image is cut, and which images are.

    Args:
        spans: tokens [first, end) of each image, in order.
        size: tokens of the row; more than ``limit``.
        limit: tokens that may be kept.
        from_end: the end of the row is kept in place of its beginning.

    Returns:
        Tokens to keep (at most ``limit``) and the indices of the images among them.
    """
    cut = size - limit if from_end else limit
    for begin, end in spans:
        if begin < cut < end:
            cut = end if from_end else begin
    if from_end:
        return size - cut, [i for i, (begin, _) in enumerate(spans) if begin >= cut]
    return cut, [i for i, (_, end) in enumerate(spans) if end <= cut]


def row_images(
    tokenizer: PreTrainedTokenizerBase,
    sources: list[Source],
    image_folder: str | Path | None,
    packing: str,
) -> RowImages | None:
    """What finds the rows' images; None for a tokenizer of text.

    Raises:
        ValueError: image_folder is no folder, or goes with a tokenizer of text; packing="concat".
    """
    vision = vision_of(tokenizer)
    if vision is None:
        if image_folder is not None:
            raise ValueError(
                f"image_folder={str(image_folder)!r} with a tokenizer that reads text only; use "
                "tokenizer=dict(type=load_processor, ...) or load_llava_processor, or leave "
                "image_folder out"
            )
        return None
    if packing == "concat":
        raise ValueError(
            "packing='concat' cuts rows anywhere, images too; with images allowed: "
            "packing='best_fit' or 'none'"
        )
    return RowImages(vision, image_files(sources, image_folder))


def image_files(sources: Sequence[Source], image_folder: str | Path | None) -> ImageFiles:
    """What opens the images of some sources: in ``image_folder``, or beside the first file.

    Raises:
        ValueError: image_folder is no folder.
    """
    if image_folder is None:
        path = next((source.path for source in sources if source.path is not None), None)
        image_folder = Path.cwd() if path is None else path.parent
    folder = Path(image_folder).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"image_folder={str(image_folder)!r} is no folder; name the one that the images' paths "
            "in the rows begin from"
        )
    return ImageFiles(folder.absolute())


def image_options(row_images: RowImages | None) -> dict[str, Any]:
    """What of the images decides the tokens."""
    if row_images is None:
        return {}
    return {"image_folder": str(row_images.files.folder), "vision": row_images.vision.settings()}


__all__ = ["BadImage", "RowImages", "image_files", "image_options", "images_in_part", "row_images"]
