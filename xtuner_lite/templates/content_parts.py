"""Templates and content parts: which of the two forms a template reads, and one that reads both.

A message's content is a text, or a list of parts ({"type": "text", ...} and {"type": "image"}).
Templates of text models know the first form, some of image-text models only the second.
"""

from __future__ import annotations

from typing import Any

#: Put in front of a template of text, it turns every list of parts into the text that the template
#: knows, images as the image token. Whoever opens the saved tokenizer gets the same.
_HEADER = (
    "{%- set parts = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message.content is defined and message.content is not string"
    " and message.content is not none -%}"
    "{%- set text = namespace(value='') -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{%- set text.value = text.value + IMAGE_TOKEN -%}"
    "{%- elif part.type == 'text' -%}{%- set text.value = text.value + part.text -%}"
    "{%- else -%}{{ raise_exception('content part of type ' + part.type + ' is not known') }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set parts.messages = parts.messages + [dict(message, content=text.value)] -%}"
    "{%- else -%}{%- set parts.messages = parts.messages + [message] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = parts.messages -%}"
)


def reading_parts(template: str, image_token: str) -> str:
    """A template that reads lists of parts too, where the given one reads text only.

    Args:
        template: jinja of a model of text.
        image_token: what stands for an image.
    """
    literal = "'" + image_token.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return _HEADER.replace("IMAGE_TOKEN", literal) + template


def as_parts(content: Any) -> Any:
    """A text as a list of one text part; anything else as it is."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
