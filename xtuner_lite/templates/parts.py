"""A chat template written as parts, and its compilation to the jinja that tokenizers carry."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from typing import Any, Literal

from xtuner_lite.templates.layout import TemplateError

_ANY_ROLE = re.compile(r"\{(system|input|output|content|bos|eos)\}")


@dataclass(frozen=True)
class TemplateParts:
    """A conversation format in parts; ``{bos}`` and ``{eos}`` may stand in any of them.

    An assistant turn is ``assistant`` + its content + ``suffix`` + ``sep``. ``suffix`` is learnt,
    ``sep`` (what stands between two rounds) is not.
    """

    user: str
    """With ``{input}``."""
    assistant: str
    """The header in front of an answer: what generation starts from."""
    suffix: str
    """The end-of-turn token behind an answer."""
    system: str | None = None
    """With ``{system}``; None: the format has no system prompt, one in the data is refused."""
    sep: str = ""
    start: str = ""
    """In front of everything, such as ``{bos}``."""
    default_system: str | None = None
    """System prompt of conversations that have none; None: nothing is written."""
    tool: str | None = None
    """A tool's result, with ``{output}``; None: results are refused unless ``tools`` is set."""
    tools: Literal["hermes"] | None = None
    """How tools and calls are written: "hermes" is <tools>, <tool_call>, <tool_response>."""
    tokens: tuple[str, ...] = ()
    """Tokens that must be in the tokenizer's vocabulary, each as one token."""

    def __post_init__(self) -> None:
        for name, mark in (("user", "{input}"), ("system", "{system}"), ("tool", "{output}")):
            part = getattr(self, name)
            if part is not None and part.count(mark) != 1:
                raise TemplateError(
                    f"template part {name}={part!r} must hold {mark} exactly once; write it where "
                    "the message's text belongs"
                )


def parts_from_dict(given: dict[str, Any]) -> TemplateParts:
    """Parts from a config dict, in our words or XTuner 0.1's (SYSTEM, INSTRUCTION, SUFFIX, SEP).

    Raises:
        TemplateError: unknown, missing or wrongly typed parts.
    """
    parts = {key.lower(): value for key, value in dict(given).items() if key != "type"}
    parts.pop("suffix_as_eos", None)  # the suffix always ends the turn here
    parts.pop("stop_words", None)
    if "instruction" in parts:
        parts.update(_split_instruction(parts.pop("instruction")))
    allowed = [field.name for field in fields(TemplateParts)]
    unknown = sorted(set(parts) - set(allowed))
    missing = sorted({"user", "assistant", "suffix"} - set(parts))
    if unknown or missing:
        raise TemplateError(
            f"template dict with the parts {sorted(given)}: "
            + (f"unknown {unknown}; " if unknown else "")
            + (f"missing {missing}; " if missing else "")
            + f"allowed: {allowed} (or 'instruction' for user + assistant). Correct the names."
        )
    for name, value in parts.items():
        if name == "tokens":
            parts[name] = tuple(value)
        elif value is not None and not isinstance(value, str):
            raise TemplateError(f"template part {name}={value!r} is not a string; write it as one")
    return TemplateParts(**parts)


def _split_instruction(instruction: Any) -> dict[str, str]:
    """XTuner wrote a user turn and the answer's header as one string around ``{input}``."""
    if not isinstance(instruction, str) or instruction.count("{input}") != 1:
        raise TemplateError(
            f"template part instruction={instruction!r} must be a string that holds {{input}} "
            "exactly once; write it where the user's text belongs"
        )
    before, after = instruction.split("{input}")
    return {"user": before + "{input}", "assistant": after}


def to_jinja(parts: TemplateParts) -> str:
    """The jinja chat template of these parts. It refuses roles that the parts cannot write."""
    lines = [
        _write(parts.start),
        "{%- set first = messages[0] if messages else none -%}",
        *_system_lines(parts),
        "{%- for message in messages -%}",
        "{%- if message.role == 'system' -%}",
        "{%- if not loop.first -%}",
        _write(parts.system, "message.content") if parts.system else _refuse("system messages"),
        "{%- endif -%}",
        "{%- elif message.role == 'user' -%}",
        _write(parts.user, "message.content"),
        "{%- elif message.role == 'assistant' -%}",
        *_assistant_lines(parts),
        "{%- elif message.role == 'tool' -%}",
        *_tool_lines(parts),
        "{%- else -%}",
        "{{- raise_exception('unknown role ' ~ message.role) -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        "{%- if add_generation_prompt -%}",
        _write(parts.assistant),
        "{%- endif -%}",
    ]
    return "\n".join(line for line in lines if line)


def _write(part: str, content: str = "''") -> str:
    """Jinja that writes a part, with ``content`` where the message's text belongs."""
    expressions = {"bos": "(bos_token or '')", "eos": "eos_token"}
    pieces, at = [], 0
    for match in _ANY_ROLE.finditer(part):
        if match.start() > at:
            pieces.append(_literal(part[at : match.start()]))
        pieces.append(expressions.get(match[1], content))
        at = match.end()
    if at < len(part):
        pieces.append(_literal(part[at:]))
    return "{{- " + " ~ ".join(pieces) + " -}}" if pieces else ""


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # jinja reads the same escapes


def _refuse(what: str) -> str:
    return "{{- raise_exception(" + _literal(f"this template cannot write {what}") + ") -}}"


def _system_lines(parts: TemplateParts) -> list[str]:
    if parts.system is None:
        return [
            "{%- if first and first.role == 'system' -%}",
            _refuse("system messages"),
            "{%- endif -%}",
        ]
    default = "none" if parts.default_system is None else _literal(parts.default_system)
    lines = [
        "{%- set system = first.content if first and first.role == 'system' else "
        + default
        + " -%}",
    ]
    if parts.tools == "hermes":
        lines += [
            "{%- if tools -%}",
            "{%- set ns = namespace(text=(system ~ "
            + _literal("\n\n")
            + ") if system else '') -%}",
            "{%- set ns.text = ns.text ~ " + _literal(_HERMES_HEAD) + " -%}",
            "{%- for tool in tools -%}",
            "{%- set ns.text = ns.text ~ " + _literal("\n") + " ~ (tool | tojson) -%}",
            "{%- endfor -%}",
            "{%- set system = ns.text ~ " + _literal(_HERMES_TAIL) + " -%}",
            "{%- endif -%}",
        ]
    return [
        *lines,
        "{%- if system is not none -%}",
        _write(parts.system, "system"),
        "{%- endif -%}",
    ]


def _assistant_lines(parts: TemplateParts) -> list[str]:
    head = _write(parts.assistant)
    tail = _write(parts.suffix + parts.sep)
    if parts.tools != "hermes":
        refuse = ["{%- if message.tool_calls -%}", _refuse("tool calls"), "{%- endif -%}"]
        return [*refuse, head, "{{- message.content -}}", tail]
    newline = _literal("\n")
    return [
        head,
        "{{- message.content or '' -}}",
        "{%- for call in message.tool_calls or [] -%}",
        "{%- set call = call.function or call -%}",
        "{%- if message.content or not loop.first -%}{{- " + newline + " -}}{%- endif -%}",
        "{{- " + _literal('<tool_call>\n{"name": ') + " ~ (call.name | tojson) ~ "
        + _literal(', "arguments": ') + " ~ (call.arguments | tojson) ~ "
        + _literal("}\n</tool_call>") + " -}}",
        "{%- endfor -%}",
        tail,
    ]  # fmt: skip


def _tool_lines(parts: TemplateParts) -> list[str]:
    if parts.tool is not None:
        return [_write(parts.tool, "message.content")]
    if parts.tools != "hermes":
        return [_refuse("tool results")]
    before, after = parts.user.split("{input}")
    result = "<tool_response>\n{output}\n</tool_response>"
    return [
        "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}",
        _write(before),
        "{%- else -%}",
        _write("\n"),
        "{%- endif -%}",
        _write(result, "message.content"),
        "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}",
        _write(after),
        "{%- endif -%}",
    ]


# Word for word as Qwen2.5's own template has them.
_HERMES_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_HERMES_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
