"""OpenAI chat rows."""

from __future__ import annotations

from typing import Any

from xtuner_lite.data.map_fns.columns import keys_of
from xtuner_lite.data.map_fns.llava import images_of_row, with_images
from xtuner_lite.data.messages import BadRow
from xtuner_lite.registry import MAP_FNS


@MAP_FNS.register_module(name="openai")
def openai_map_fn(row: dict[str, Any]) -> dict[str, Any]:
    """OpenAI chat rows: messages of role and content, tools, weight 0 on turns not to learn.

    With 'images' (or 'image'), each <image> in a text and each image part without a name of its own
    ({"type": "image"}) is one of them, in order; that needs a vision-language data set.

    Example row::

        {"messages": [{"role": "user", "content": "Hi"},
                      {"role": "assistant", "content": "Hello!"}]}
    """
    messages = row.get("messages")
    if not isinstance(messages, list):
        raise BadRow(f"no list under 'messages'; keys found: {keys_of(row)}")
    messages = [_message(message) for message in messages]
    if images := images_of_row(row):
        messages = with_images(messages, images)
    return {"messages": messages, "tools": row.get("tools")}


def _message(message: Any) -> Any:
    """OpenAI's ``weight`` (0 or 1) is our ``loss``; 'developer' is its newer word for system."""
    if not isinstance(message, dict):
        return message
    if "weight" in message and "loss" not in message:
        message = {**message, "loss": message["weight"]}
    if message.get("loss", True) is None:  # tables write absent values as None
        message = {key: value for key, value in message.items() if key != "loss"}
    if message.get("role") == "developer":
        message = {**message, "role": "system"}
    return message
