"""Turns of a conversation with images: made, shown as text, and saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xtuner_lite.images.files import (
    ImageError,
    ImageFiles,
    image_name,
    is_data_uri,
    is_web_address,
)
from xtuner_lite.structures import Message


def user_turn(text: str, images: Sequence[Any] = ()) -> Message:
    """What a user says, the images in front of the text as most models learnt it.

    Args:
        text: what is said; '' for images alone.
        images: paths, data URIs or PIL images.
    """
    if not images:
        return {"role": "user", "content": text}
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {
        "role": "user",
        "content": [*parts, *([{"type": "text", "text": text}] if text else [])],
    }


def local_image(name: str) -> tuple[str, tuple[int, int]]:
    """The absolute path of an image file that a person names, and its (width, height) in pixels.

    Raises:
        ImageError: there is no such file, it is damaged, too large or no image, or it is an
            address, which is not fetched.
    """
    if is_web_address(name):
        raise ImageError(f"{name} is a web address, which is not fetched; download it first")
    path = Path(name.removeprefix("file://")).expanduser().absolute()
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise ImageError(f"the image {name} {what}; give the path of a picture (png, jpg, ...)")
    return str(path), ImageFiles(Path(path.anchor)).size(str(path))


def local_name(name: str, folder: Path) -> str:
    """An image's name in a file as an absolute path; data URIs as they are.

    Args:
        name: as a row gives it.
        folder: of the file; paths begin from there.

    Raises:
        ImageError: it is an address, which is not fetched.
    """
    if is_data_uri(name):
        return name
    if is_web_address(name):
        raise ImageError(f"{name} is a web address, which is not fetched; download the image")
    return str((folder / Path(name.removeprefix("file://")).expanduser()).absolute())


def shown_text(content: Any) -> str:
    """A message's content as a person reads it: text, and images as '[file name]'.

    Args:
        content: text, a list of parts, or None.
    """
    if not isinstance(content, list):
        return "" if content is None else str(content)
    words = []
    for part in content:
        if isinstance(part, dict) and part.get("type") == "image":
            words.append(f"[{shown_image(part.get('image'))}]")
        else:
            words.append(str(part.get("text", part)) if isinstance(part, dict) else str(part))
    return " ".join(word for word in words if word)


def shown_image(image: Any) -> str:
    """An image's file name; what is known of one without a name."""
    if hasattr(image, "size") and hasattr(image, "convert"):
        return f"image of {image.size[0]}x{image.size[1]} pixels"
    if isinstance(image, str) and not is_data_uri(image):
        return Path(image).name
    return "image"


def with_named_images(messages: Sequence[Message]) -> list[Message]:
    """The messages as plain data for a log: images by their paths, others by what is known."""

    def named(image: Any) -> str:
        is_path = isinstance(image, str) and not is_data_uri(image)
        return image if is_path else shown_image(image)

    return [_with_images(message, named) for message in messages]


def with_saved_images(messages: Sequence[Message], folder: Path) -> list[Message]:
    """The messages as plain data for a file in ``folder``: images below it are named from there.

    Images without a name become data URIs.
    """

    def saved(image: Any) -> str:
        name = image_name(image)
        if is_data_uri(name):
            return name
        path = Path(name).absolute()
        return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)

    return [_with_images(message, saved) for message in messages]


def _with_images(message: Message, change: Any) -> Message:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = [
        {**part, "image": change(part["image"])}
        if isinstance(part, dict) and part.get("type") == "image"
        else part
        for part in content
    ]
    return {**message, "content": parts}  # type: ignore[typeddict-item,return-value]
