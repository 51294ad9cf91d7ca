"""Templates and content parts: which of the two forms a template reads, and one that reads both.

A message's content is a text, or a list of parts ({"type": "text", ...} and {"type": "image"}).
Templates of text models know the first form, some of image-text models only the second.
"""

from __future__ import annotations

from typing import Any

_BLANKS = " \n\t"

#: Put in front of a template of text, it turns every list of parts into the text that the template
#: knows, images as the image token. Whoever opens the saved tokenizer gets the same. Between an
#: image and a text a line ends, as in LLaVA's data ('<image>\nWhat is it?'), unless the text has
#: a blank there already: a question reads the same from a data file and from a chat.
_HEADER = (
    "{%- set parts = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message.content is defined and message.content is not string"
    " and message.content is not none -%}"
    "{%- set text = namespace(value='', before='') -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}"
    "{%- if text.before == 'text' and text.value and text.value[-1] not in BLANKS -%}"
    "{%- set text.value = text.value + NEWLINE -%}{%- endif -%}"
    "{%- set text.value = text.value + IMAGE_TOKEN -%}"
    "{%- elif part.type == 'text' -%}"
    "{%- if text.before == 'image' and part.text and part.text[0] not in BLANKS -%}"
    "{%- set text.value = text.value + NEWLINE -%}{%- endif -%}"
    "{%- set text.value = text.value + part.text -%}"
    "{%- else -%}{{ raise_exception('content part of type ' + part.type + ' is not known') }}"
    "{%- endif -%}"
    "{%- set text.before = part.type -%}"
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
    header = _HEADER.replace("IMAGE_TOKEN", literal)
    return header.replace("BLANKS", "' \\n\\t'").replace("NEWLINE", "'\\n'") + template


def split_header(template: str) -> tuple[str | None, str]:
    """(image token, the template of text) of what ``reading_parts`` made; (None, template) else."""
    before, after = reading_parts("", "\0").split("'\0'")
    if not template.startswith(before):
        return None, template
    literal, end, rest = template[len(before) :].partition(after)
    if not end:
        return None, template
    return literal[1:-1].replace("\\'", "'").replace("\\\\", "\\"), rest


def joined_parts(content: Any, image_token: str) -> Any:
    """What the header makes of a message's content: the same text, many times faster.

    Raises:
        KeyError, ValueError: a part is neither text nor image.
    """
    if content is None or isinstance(content, str):
        return content
    text, before = "", ""
    for part in content:
        kind = part["type"]
        if kind == "image":
            if before == "text" and text and text[-1] not in _BLANKS:
                text += "\n"
            text += image_token
        elif kind == "text":
            if before == "image" and part["text"] and part["text"][0] not in _BLANKS:
                text += "\n"
            text += part["text"]
        else:
            raise ValueError(f"content part of type {kind} is not known")
        before = kind
    return text


def as_parts(content: Any) -> Any:
    """A text as a list of one text part; anything else as it is."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
