"""From a template's parts to the jinja text that a tokenizer carries and exports."""

from __future__ import annotations

import json
import re

from xtuner_lite.templates.parts import TemplateParts

_MARK = re.compile(r"\{(system|input|output|thought|bos|eos)\}")


def to_jinja(parts: TemplateParts) -> str:
    """The jinja chat template of these parts. It refuses roles that the parts cannot write."""
    lines = [
        _write(parts.start),
        "{%- set first = messages[0] if messages else none -%}",
        *_system_lines(parts),
        "{%- for message in messages -%}",
        "{%- if message.role == 'system' -%}",
        *_later_system_lines(parts),
        "{%- elif message.role == 'user' -%}",
        *_user_lines(parts),
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


def _write(part: str, **contents: str) -> str:
    """Jinja that writes a part, with expressions in place of its marks."""
    expressions = {"bos": "(bos_token or '')", "eos": "eos_token", **contents}
    pieces, at = [], 0
    for match in _MARK.finditer(part):
        if match.start() > at:
            pieces.append(_literal(part[at : match.start()]))
        pieces.append(expressions.get(match[1]) or _literal(match[0]))
        at = match.end()
    if at < len(part):
        pieces.append(_literal(part[at:]))
    return "{{- " + " ~ ".join(pieces) + " -}}" if pieces else ""


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # jinja reads the same escapes


def _refuse(what: str) -> str:
    return "{{- raise_exception(" + _literal(f"this template cannot write {what}") + ") -}}"


def _content(parts: TemplateParts, role: str, of: str = "message.content") -> str:
    return f"({of} | trim)" if role in parts.trim else of


# ------------------------------------------------------------------ system prompt


def _system_lines(parts: TemplateParts) -> list[str]:
    """What stands in front of the first turn; sets ``state.system`` for first_user."""
    if parts.first_user is not None:
        first = "first.content if first and first.role == 'system' else "
        return [
            "{%- set state = namespace(system=" + first + _default(parts) + ") -%}",
        ]
    if parts.system is None:
        return []
    first = "first.content if first and first.role == 'system' else "
    lines = ["{%- set system = " + first + _default(parts) + " -%}"]
    if parts.tools == "hermes":
        lines += _HERMES_TOOLS
    return [
        *lines,
        "{%- if system is not none -%}",
        _write(parts.system, system=_content(parts, "system", "system")),
        "{%- endif -%}",
    ]


def _default(parts: TemplateParts) -> str:
    return "none" if parts.default_system is None else _literal(parts.default_system)


def _later_system_lines(parts: TemplateParts) -> list[str]:
    if parts.first_user is None and parts.system is None:
        return [_refuse("system messages")]
    refuse = _refuse("a system message behind the first message")
    return [
        "{%- if not loop.first -%}",
        _write(parts.system, system=_content(parts, "system")) if parts.system else refuse,
        "{%- endif -%}",
    ]


# ------------------------------------------------------------------ turns


def _user_lines(parts: TemplateParts) -> list[str]:
    plain = _write(parts.user, input=_content(parts, "user"))
    if parts.first_user is None:
        return [plain]
    system = _content(parts, "system", "state.system")
    return [
        "{%- if state.system is not none -%}",
        _write(parts.first_user, input=_content(parts, "user"), system=system),
        "{%- set state.system = none -%}",
        "{%- else -%}",
        plain,
        "{%- endif -%}",
    ]


def _assistant_lines(parts: TemplateParts) -> list[str]:
    tail = _write(parts.suffix + parts.sep)
    lines = []
    if parts.first_user is not None:  # the system prompt has no turn to stand in
        refuse = _refuse("a system message that no user message follows")
        lines += ["{%- if state.system is not none -%}", refuse, "{%- endif -%}"]
    if parts.tools != "hermes":
        refuse = _refuse("tool calls")
        lines += ["{%- if message.tool_calls -%}", refuse, "{%- endif -%}"]
    lines += [_write(parts.assistant), *_thought_lines(parts), _write(parts.lead)]
    lines.append("{{- " + _content(parts, "assistant", "(message.content or '')") + " -}}")
    if parts.tools == "hermes":
        lines += _HERMES_CALLS
    return [*lines, tail]


def _thought_lines(parts: TemplateParts) -> list[str]:
    if parts.thought is None:
        return []
    thought = "((message.reasoning_content or '').strip('\\n'))"
    written = _write(parts.thought, thought=thought)
    if parts.always_thought:
        return [written]
    return ["{%- if message.reasoning_content -%}", written, "{%- endif -%}"]


def _tool_lines(parts: TemplateParts) -> list[str]:
    if parts.tool is not None:
        return [_write(parts.tool, output="message.content")]
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
        _write(result, output="message.content"),
        "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}",
        _write(after),
        "{%- endif -%}",
    ]


# ------------------------------------------------------------------ tools in Hermes form

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
_HERMES_TOOLS = [
    "{%- if tools -%}",
    "{%- set ns = namespace(text=(system ~ " + _literal("\n\n") + ") if system else '') -%}",
    "{%- set ns.text = ns.text ~ " + _literal(_HERMES_HEAD) + " -%}",
    "{%- for tool in tools -%}",
    "{%- set ns.text = ns.text ~ " + _literal("\n") + " ~ (tool | tojson) -%}",
    "{%- endfor -%}",
    "{%- set system = ns.text ~ " + _literal(_HERMES_TAIL) + " -%}",
    "{%- endif -%}",
]
_HERMES_CALLS = [
    "{%- for call in message.tool_calls or [] -%}",
    "{%- set call = call.function or call -%}",
    "{%- if message.content or not loop.first -%}{{- " + _literal("\n") + " -}}{%- endif -%}",
    "{{- " + _literal('<tool_call>\n{"name": ') + " ~ (call.name | tojson) ~ "
    + _literal(', "arguments": ') + " ~ (call.arguments | tojson) ~ "
    + _literal("}\n</tool_call>") + " -}}",
    "{%- endfor -%}",
]  # fmt: skip
