"""LLaVA rows: an image and a conversation about it."""

from __future__ import annotations

from typing import Any

from xtuner_lite.data.map_fns.sharegpt import sharegpt_map_fn
from xtuner_lite.data.messages import BadRow
from xtuner_lite.registry import MAP_FNS

IMAGE_MARK = "<image>"


@MAP_FNS.register_module(name="llava")
def llava_map_fn(row: dict[str, Any]) -> dict[str, Any]:
    """LLaVA rows: conversations with <image> where an image (or each of images) stands.

    Gives messages whose content is parts, text and images. They need a vision-language data set.

    Example row::

        {"image": "cat.jpg",
         "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                           {"from": "gpt", "value": "A cat."}]}
    """
    mapped = sharegpt_map_fn(row)
    return {**mapped, "messages": with_images(mapped["messages"], images_of_row(row))}


@MAP_FNS.register_module(name="llava_image_only")
def llava_image_only_map_fn(row: dict[str, Any]) -> dict[str, Any]:
    """LLaVA rows for pre-training a projector: of each question only its image is kept.

    Example row::

        {"image": "cat.jpg",
         "conversations": [{"from": "human", "value": "Describe it.\\n<image>"},
                           {"from": "gpt", "value": "A cat on a mat."}]}
    """
    mapped = llava_map_fn(row)
    messages = []
    for index, message in enumerate(mapped["messages"]):
        if message["role"] == "user":
            images = [p for p in message["content"] if isinstance(p, dict) and p["type"] == "image"]
            if not images:
                raise BadRow(
                    f"message {index}: no {IMAGE_MARK} in a question, of which only the image is "
                    "kept; for conversations about an image use map_fn='llava'"
                )
            message = {**message, "content": images}
        messages.append(message)
    return {**mapped, "messages": messages}


def images_of_row(row: dict[str, Any]) -> list[Any]:
    """What stands under 'images' or 'image', as a list; nothing and '' are no image."""
    images = row["images"] if row.get("images") is not None else row.get("image")
    if images is None or (isinstance(images, str) and not images):
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def with_images(messages: list[Any], images: list[Any]) -> list[Any]:
    """Messages with each ``<image>`` mark replaced by an image part, in order.

    Image parts that name no image ({"type": "image"}, as transformers' templates take them) are
    given theirs in the same order.

    Args:
        images: a path (str) or an image object for each mark.

    Raises:
        BadRow: not one image for each mark.
    """
    left = list(images)
    contents = [m.get("content") for m in messages if isinstance(m, dict)]
    marks = sum(content.count(IMAGE_MARK) for content in contents if isinstance(content, str))
    marks += sum(_is_open(part) for c in contents if isinstance(c, list) for part in c)
    if marks != len(left):
        raise BadRow(f"{marks} x {IMAGE_MARK} in the conversation, but {len(left)} images")
    return [_replaced(message, left) for message in messages]


def _replaced(message: Any, left: list[Any]) -> Any:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        named = [{"type": "image", "image": left.pop(0)} if _is_open(p) else p for p in content]
        return {**message, "content": named}
    if not isinstance(content, str) or IMAGE_MARK not in content:
        return message
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(content.split(IMAGE_MARK)):
        if number:
            parts.append({"type": "image", "image": left.pop(0)})
        if piece:
            parts.append({"type": "text", "text": piece})
    return {**message, "content": parts}


def _is_open(part: Any) -> bool:
    """Whether a part is the place of an image that it does not name."""
    if not isinstance(part, dict) or part.get("type") != "image":
        return False
    return all(part.get(key) is None for key in ("image", "image_url", "url", "path"))


__all__ = ["IMAGE_MARK", "images_of_row", "llava_image_only_map_fn", "llava_map_fn", "with_images"]
