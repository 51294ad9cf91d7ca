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
    return {**mapped, "messages": with_images(mapped["messages"], _images(row))}


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


def _images(row: dict[str, Any]) -> list[Any]:
    images = row["images"] if row.get("images") is not None else row.get("image")
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def with_images(messages: list[Any], images: list[Any]) -> list[Any]:
    """Messages with each ``<image>`` mark replaced by an image part, in order.

    Args:
        images: a path (str) or an image object for each mark.

    Raises:
        BadRow: not one image for each mark.
    """
    left = list(images)
    marks = sum(
        m["content"].count(IMAGE_MARK)
        for m in messages
        if isinstance(m, dict) and isinstance(m.get("content"), str)
    )
    if marks != len(left):
        raise BadRow(f"{marks} x {IMAGE_MARK} in the conversation, but {len(left)} images")
    return [_replaced(message, left) for message in messages]


def _replaced(message: Any, left: list[Any]) -> Any:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, str) or IMAGE_MARK not in content:
        return message
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(content.split(IMAGE_MARK)):
        if number:
            parts.append({"type": "image", "image": left.pop(0)})
        if piece:
            parts.append({"type": "text", "text": piece})
    return {**message, "content": parts}


__all__ = ["IMAGE_MARK", "llava_image_only_map_fn", "llava_map_fn", "with_images"]
