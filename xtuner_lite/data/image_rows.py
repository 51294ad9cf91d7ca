"""The images of encoded rows: flat arrays like the tokens', and references that can be opened."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xtuner_lite.images.files import ImageFiles

if TYPE_CHECKING:
    from PIL import Image

#: Names of the three arrays: UTF-8 bytes of one JSON list [name, width, height] per image, joined;
#: where each of them ends; how many images each row has.
IMAGE_DTYPES = {"image_text": np.uint8, "image_ends": np.int64, "image_counts": np.int64}

Named = tuple[str, tuple[int, int]]
"""An image's name and its (width, height) when the data was prepared."""


class ImageRef(NamedTuple):
    """An image of a sample: where it lies, and its size when the data was prepared."""

    files: ImageFiles
    name: str
    """Path below ``files.folder``, or data URI."""
    size: tuple[int, int]
    """Width and height, in pixels."""

    def open(self) -> Image.Image:
        """The image in RGB.

        Raises:
            ImageError: it is missing or damaged now, or has another size.
        """
        return self.files.open(self.name, self.size)


def flatten_images(rows: Sequence[Sequence[Named]]) -> dict[str, np.ndarray | None]:
    """The three arrays of some rows' images; None for each if no row has any."""
    if not any(rows):
        return dict.fromkeys(IMAGE_DTYPES)
    texts = [
        json.dumps([name, *size], ensure_ascii=False).encode("utf-8", "surrogateescape")
        for images in rows
        for name, size in images
    ]
    return {
        "image_text": np.frombuffer(b"".join(texts), dtype=np.uint8),
        "image_ends": np.cumsum([len(text) for text in texts], dtype=np.int64),
        "image_counts": np.array([len(images) for images in rows], dtype=np.int64),
    }


def join_images(parts: Sequence[Any]) -> dict[str, np.ndarray | None]:
    """The three arrays of several chunks of rows (EncodedRows), one behind the other."""
    if all(part.image_counts is None for part in parts):
        return dict.fromkeys(IMAGE_DTYPES)
    with_images = [part for part in parts if part.image_counts is not None]
    offsets = np.cumsum([0, *(len(part.image_text) for part in with_images)])
    counts = [
        np.zeros(len(part.lengths), np.int64) if part.image_counts is None else part.image_counts
        for part in parts
    ]
    ends = [part.image_ends + offset for part, offset in zip(with_images, offsets)]
    return {
        "image_text": np.concatenate([part.image_text for part in with_images]),
        "image_ends": np.concatenate(ends),
        "image_counts": np.concatenate(counts),
    }


class ImageIndex:
    """Finds the images of a row in the three arrays.

    Args:
        rows: EncodedRows with images.
        files: opens them.
    """

    def __init__(self, rows: Any, files: ImageFiles) -> None:
        self._rows, self._files = rows, files
        self._first = np.concatenate([[0], np.cumsum(rows.image_counts)])

    def of(self, row: int) -> list[ImageRef]:
        """The images of a row, in order."""
        found = []
        for image in range(int(self._first[row]), int(self._first[row + 1])):
            begin = int(self._rows.image_ends[image - 1]) if image else 0
            text = self._rows.image_text[begin : int(self._rows.image_ends[image])].tobytes()
            name, width, height = json.loads(text.decode("utf-8", "surrogateescape"))
            found.append(ImageRef(self._files, name, (width, height)))
        return found
