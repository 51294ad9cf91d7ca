"""Images in requests: they come in the request itself, and nothing is fetched or opened for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xtuner_lite.chat.server.errors import ApiError, bad_request
from xtuner_lite.images.files import ImageError, ImageFiles, is_data_uri
from xtuner_lite.structures import Message

#: Pixels of the largest image that is decoded; photographs of telephones have up to 50 million.
MAX_PIXELS = 50_000_000
#: Pixels of all images of one request, which are held together: 0.6 GB.
MAX_PIXELS_TOGETHER = 200_000_000
#: Images of one request.
MAX_IMAGES = 16
_FORM = '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'


def read_image_part(part: dict[str, Any], where: str) -> dict[str, Any]:
    """An ``image_url`` part as this project writes images.

    Raises:
        ApiError: (400) it is no data URI. Addresses and paths are refused: a request must not make
            the server fetch something, or read its own files.
    """
    holder = part.get("image_url")
    url = holder.get("url") if isinstance(holder, dict) else None
    if not isinstance(url, str):
        raise _refused(f"{where} is an image without a URL; send {_FORM}", where)
    if not is_data_uri(url):
        start = url if len(url) <= 40 else url[:37] + "..."
        raise _refused(
            f"{where} names {start!r}; this server fetches no addresses and opens no files: send "
            f"the image itself, {_FORM}",
            where,
        )
    detail = holder.get("detail") or "auto"
    if detail not in ("auto", "high"):
        raise _refused(
            f"{where} asks for the detail {detail!r}; images are seen as the model sees them: "
            "leave it out, and send a smaller image for less",
            where,
        )
    return {"type": "image", "image": url}


def check_images(messages: list[Message]) -> list[tuple[int, int]]:
    """(width, height) of all images, each of which is decoded once.

    Raises:
        ApiError: (400) one is damaged or too large, or there are too many.
    """
    files = ImageFiles(Path("/nonexistent"), max_pixels=MAX_PIXELS)  # data URIs alone
    sizes = []
    for where, image in _images(messages):
        if len(sizes) == MAX_IMAGES:
            raise _refused(f"more than {MAX_IMAGES} images in one request; send fewer", where)
        try:
            sizes.append(files.size(image))
        except ImageError as error:
            raise _refused(f"{where}: {error}", where) from error
        if sum(width * height for width, height in sizes) > MAX_PIXELS_TOGETHER:
            raise _refused(
                f"the images have more than {MAX_PIXELS_TOGETHER:,} pixels together; send smaller "
                "or fewer ones",
                where,
            )
    return sizes


def _images(messages: list[Message]) -> Iterator[tuple[str, str]]:
    """(where it stands, the data URI) of each image."""
    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list):
            for number, part in enumerate(content):
                if part["type"] == "image":
                    yield f"messages[{index}].content[{number}]", part["image"]


def _refused(message: str, where: str) -> ApiError:
    return bad_request(message, where, "unsupported_content")
