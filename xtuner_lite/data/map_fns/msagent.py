"""MSAgent-Bench conversations with API calls, as ReAct text."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from xtuner_lite.data.map_fns.columns import keys_of
from xtuner_lite.data.messages import BadRow
from xtuner_lite.registry import MAP_FNS

_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_STEP = re.compile(
    r"<\|startofthink\|>(?P<call>.*?)<\|endofthink\|>\s*"
    r"(?:<\|startofexec\|>(?P<result>.*?)<\|endofexec\|>)?",
    re.DOTALL,
)
_FENCE = re.compile(r"\A\s*```(?:JSON|json)?\s*(.*?)\s*```\s*\Z", re.DOTALL)


@MAP_FNS.register_module(name="msagent_react")
def msagent_react_map_fn(row: dict[str, Any]) -> dict[str, Any]:
    r"""MSAgent-Bench: API calls become Thought, Action and Action Input; results are not learnt.

    A result goes back as a user message that starts with 'Response:'; what is said behind the last
    result is the 'Final Answer:'.

    Example row::

        {"conversations": '[{"from": "user", "value": "Draw a cat."}, {"from": "assistant", '
         '"value": "I draw. <|startofthink|>{\\"api_name\\": \\"draw\\", \\"parameters\\": '
         '{\\"what\\": 1}}<|endofthink|><|startofexec|>cat.png<|endofexec|>Done."}]'}
    """
    messages: list[dict[str, Any]] = []
    for index, turn in enumerate(_turns(row)):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        role = _ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise BadRow(f"turn {index} has no 'from' (system, user, assistant) with a text value")
        said = turn["value"].strip()
        messages += _steps(said, index) if role == "assistant" else [_message(role, said)]
    return {"messages": messages}


def _turns(row: dict[str, Any]) -> list[Any]:
    """The turns; the data set stores them as the text of a Python or JSON list."""
    turns = row.get("conversations")
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except ValueError:
            try:
                turns = ast.literal_eval(turns)
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                raise BadRow(f"'conversations' is text, but not of a list: {error}") from error
    if not isinstance(turns, list):
        raise BadRow(f"no list under 'conversations'; keys found: {keys_of(row)}")
    return turns


def _steps(said: str, index: int) -> list[dict[str, Any]]:
    """An assistant turn: for each call an action and its response, then the final answer."""
    messages: list[dict[str, Any]] = []
    at = 0
    for step in _STEP.finditer(said):
        name, arguments = _call(step["call"], index)
        thought = said[at : step.start()].strip()
        action = f"Action: {name}\nAction Input: {arguments}"
        messages.append(
            _message("assistant", f"Thought: {thought}\n{action}" if thought else action)
        )
        if step["result"] is not None:
            messages.append(_message("user", f"Response: {_unfenced(step['result'])}"))
        at = step.end()
    rest = said[at:].strip()
    if not messages:
        return [_message("assistant", said)]
    if rest:
        messages.append(_message("assistant", f"Final Answer: {rest}"))
    return messages


def _call(text: str, index: int) -> tuple[str, str]:
    try:
        call = json.loads(_unfenced(text))
    except (ValueError, RecursionError) as error:
        raise BadRow(f"turn {index}: the API call is not valid JSON: {error}") from error
    if not isinstance(call, dict) or not isinstance(call.get("api_name"), str):
        raise BadRow(f"turn {index}: the API call has no 'api_name': {text!r:.60}")
    return call["api_name"], json.dumps(call.get("parameters", {}), ensure_ascii=False)


def _unfenced(text: str) -> str:
    fenced = _FENCE.match(text)
    return fenced[1] if fenced else text.strip()


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}
