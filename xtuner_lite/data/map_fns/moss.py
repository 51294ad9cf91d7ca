"""MOSS-003 conversations, with and without plug-ins."""

from __future__ import annotations

import re
from typing import Any

from xtuner_lite.data.map_fns.columns import keys_of, optional_text
from xtuner_lite.data.messages import BadRow
from xtuner_lite.registry import MAP_FNS

#: Part of a turn -> its mark in front and behind.
_PARTS = {
    "Human": ("<|Human|>:", "<eoh>"),
    "Inner Thoughts": ("<|Inner Thoughts|>:", "<eot>"),
    "Commands": ("<|Commands|>:", "<eoc>"),
    "Tool Responses": ("<|Results|>:", "<eor>"),
    "MOSS": ("<|MOSS|>:", "<eom>"),
}
_API = re.compile(r"^- ([^:\n]+): enabled\. API: (\w+)\((\w+)\)", re.MULTILINE)
_BETWEEN = r"[\s,，;；]*"
_CALL = re.compile(
    rf"{_BETWEEN}(?:(\w+)\((.*?)\)(?={_BETWEEN}(?:\w+\(|None|\Z))|None\b)", re.DOTALL
)
_DESCRIPTION = "The {} of MOSS."


@MAP_FNS.register_module(name="moss")
def moss_map_fn(row: dict[str, Any]) -> dict[str, Any]:
    """MOSS-003: turns with inner thoughts, commands of plug-ins and their results.

    Commands become tool calls and are learnt, as the answers are; results become tool messages and
    thoughts reasoning_content, which are not. The plug-ins that meta_instruction enables become
    tools. The template 'moss_sft' writes it all in MOSS's own form.

    Example row::

        {"meta_instruction": "- Calculator: enabled. API: Calculate(expression)", "num_turns": 1,
         "chat": {"turn_1": {
            "Human": "<|Human|>: What is 6 * 7?<eoh>",
            "Inner Thoughts": "<|Inner Thoughts|>: I calculate it.<eot>",
            "Commands": "<|Commands|>: Calculate(\\"6*7\\")<eoc>",
            "Tool Responses": "<|Results|>: Calculate(\\"6*7\\") => 42<eor>",
            "MOSS": "<|MOSS|>: It is 42.<eom>"}}}
    """
    chat, meta = row.get("chat"), optional_text(row, "meta_instruction")
    if not isinstance(chat, dict):
        raise BadRow(f"no turns under 'chat'; keys found: {keys_of(row)}")
    parameters = {name: parameter for _, name, parameter in _API.findall(meta)}
    messages: list[dict[str, Any]] = []
    if meta:
        messages.append({"role": "system", "content": meta})
    for number in range(1, len(chat) + 1):
        turn = chat.get(f"turn_{number}")
        if not isinstance(turn, dict):
            raise BadRow(f"'chat' has no 'turn_{number}'; keys found: {keys_of(chat)}")
        messages += _turn(turn, f"turn_{number}", parameters)
    return {"messages": messages, "tools": _tools(meta)}


def _turn(turn: dict[str, Any], name: str, parameters: dict[str, str]) -> list[dict[str, Any]]:
    said = {part: _part(turn, part, name) for part in _PARTS}
    thought = {"reasoning_content": said["Inner Thoughts"]} if said["Inner Thoughts"] else {}
    messages: list[dict[str, Any]] = [{"role": "user", "content": said["Human"]}]
    calls = _calls(said["Commands"], name, parameters)
    if calls:
        messages.append({"role": "assistant", "content": "", "tool_calls": calls, **thought})
        messages.append({"role": "tool", "content": said["Tool Responses"]})
        thought = {}
    elif said["Tool Responses"]:
        raise BadRow(f"{name}: results without a command: {said['Tool Responses']!r:.60}")
    messages.append({"role": "assistant", "content": said["MOSS"], **thought})
    return messages


def _part(turn: dict[str, Any], part: str, name: str) -> str:
    """A part's text without its marks; '' for None, the word MOSS writes where there is none."""
    value = turn.get(part, "" if part not in ("Human", "MOSS") else None)
    if not isinstance(value, str):
        raise BadRow(f"{name}: {part!r} is {value!r:.60}, not text; keys found: {keys_of(turn)}")
    front, behind = _PARTS[part]
    text = value.strip().removeprefix(front).removesuffix(behind).strip()
    return "" if text == "None" and part not in ("Human", "MOSS") else text


def _calls(commands: str, name: str, parameters: dict[str, str]) -> list[dict[str, Any]]:
    """Commands such as ``Search("a"), Calculate("1+1")`` as tool calls."""
    if commands.startswith("Non"):  # 'None', with a remark behind it or misspelled
        return []
    calls, at = [], 0
    while commands[at:].strip(" \n,，;；"):
        match = _CALL.match(commands, at)
        if match is None:
            raise BadRow(f'{name}: the command is not of the form Name("..."): {commands!r:.60}')
        at = match.end()
        if match[1]:
            argument = match[2].strip()
            if argument[:1] == argument[-1:] == '"' and argument.count('"') == 2:
                argument = argument[1:-1]
            key = parameters.get(match[1], "input")
            calls.append({"name": match[1], "arguments": {key: argument}})
    return calls


def _tools(meta: str) -> list[dict[str, Any]] | None:
    """The plug-ins that are enabled, as function schemas."""
    return [
        {
            "name": name,
            "description": _DESCRIPTION.format(kind.strip().lower()),
            "parameters": {
                "type": "object",
                "properties": {parameter: {"type": "string"}},
                "required": [parameter],
            },
        }
        for kind, name, parameter in _API.findall(meta)
    ] or None
