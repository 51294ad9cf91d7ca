"""``--cfg-options key.path=value``: parsing, and setting values by path."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from xtuner_lite.config.errors import ConfigError, Problem
from xtuner_lite.config.origins import COMMAND_LINE, KeyPath, dotted
from xtuner_lite.suggestions import did_you_mean

_WORDS = {
    "true": True, "false": False, "none": None, "null": None,
    "inf": float("inf"), "-inf": float("-inf"), "nan": float("nan"),
}  # fmt: skip


def parse_option(text: str) -> tuple[KeyPath, Any]:
    """'optim_wrapper.optimizer.lr=1e-4' -> (('optim_wrapper', 'optimizer', 'lr'), 0.0001).

    The value is a Python literal; true, false, none, inf and nan are understood in any case; any
    other word is a string.

    Raises:
        ConfigError: no '=', no key, or a list or dict that is not a literal.
    """
    key, sign, value = text.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise ConfigError(
            Problem(
                "", f"--cfg-options {text!r} is not KEY=VALUE; write e.g. train_cfg.max_epochs=1"
            )
        )
    return tuple(int(part) if part.isdigit() else part for part in parts), parse_value(value, key)


def parse_value(text: str, key: str = "") -> Any:
    """The value that a word of the command line means; see :func:`parse_option`."""
    if text.strip().lower() in _WORDS:
        return _WORDS[text.strip().lower()]
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        if text.strip()[:1] in ("[", "(", "{"):
            raise ConfigError(
                Problem(
                    key,
                    f"{text!r} is not a Python literal; put quotes around the words in it, "
                    f"e.g. {key}=\"['a', 'b']\"",
                    COMMAND_LINE,
                )
            ) from None
        return text


def set_path(
    root: Any, path: KeyPath, value: Any, can_be_made: Callable[[KeyPath], bool] | None = None
) -> None:
    """Set ``root[path[0]][path[1]]... = value``; the last key may be new, the others must exist.

    Args:
        root: the dict or list that is changed.
        path: keys and list indices.
        value: what the last of them gets.
        can_be_made: whether a dict on the way that is missing or None may be made; default: never.

    Raises:
        ConfigError: a key on the way, or a list index, does not exist, with the nearest ones.
    """
    held = root
    for depth, part in enumerate(path[:-1]):
        below = path[: depth + 1]
        lacks = isinstance(held, dict) and dict.get(held, part) is None
        if lacks and can_be_made is not None and can_be_made(below):
            held[part] = {}
        held = step(held, part, below, value)
    last = path[-1]
    if isinstance(held, (list, tuple)):
        if not isinstance(last, int) or last >= len(held):
            raise _missing(path, held)
        if isinstance(held, tuple):
            changed = (*held[:last], value, *held[last + 1 :])
            set_path(root, path[:-1], changed)
            return
        held[last] = value
    elif isinstance(held, dict):
        held[_key_of(held, last)] = value
    else:
        raise _not_a_section(path, held, value)


def step(held: Any, part: Any, path: KeyPath, value: Any) -> Any:
    """``held[part]`` on the way to a value that is being set."""
    if isinstance(held, (list, tuple)):
        if not isinstance(part, int) or part >= len(held):
            raise _missing(path, held)
        return held[part]
    if not isinstance(held, dict):
        raise _not_a_section(path, held, value)
    key = _key_of(held, part)
    if not dict.__contains__(held, key):
        raise _missing(path, held)
    return dict.__getitem__(held, key)


def _key_of(held: dict[Any, Any], part: Any) -> Any:
    """Digits are an index of a list and a string key of a dict, unless the dict has that number."""
    return str(part) if isinstance(part, int) and not dict.__contains__(held, part) else part


def _missing(path: KeyPath, held: Any) -> ConfigError:
    part = path[-1]
    if isinstance(held, (list, tuple)):
        allowed = f"it has {len(held)} items, so 0 to {len(held) - 1}" if held else "it is empty"
        text = f"no item {part!r}: {dotted(path[:-1])} is a list; {allowed}"
    else:
        keys = [str(key) for key in dict.keys(held)]
        known = did_you_mean(str(part), keys) or f"; it has {', '.join(keys) or 'no keys'}"
        text = f"no key {str(part)!r} in {dotted(path[:-1]) or 'the config'}{known}"
    return ConfigError(Problem(dotted(path), text, COMMAND_LINE))


def _not_a_section(path: KeyPath, held: Any, value: Any) -> ConfigError:
    parent = dotted(path[:-1])
    text = (
        f"{parent} is {held!r}, which has no keys; give the whole section, "
        f"e.g. {parent}=\"{{'{path[-1]}': {value!r}}}\""
    )
    return ConfigError(Problem(dotted(path), text, COMMAND_LINE))
