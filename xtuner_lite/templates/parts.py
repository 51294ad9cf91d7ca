"""A chat template written as parts; compile.py makes the jinja that tokenizers carry of it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from xtuner_lite.templates.layout import TemplateError

_MARKS = (
    ("user", "{input}"),
    ("system", "{system}"),
    ("tool", "{output}"),
    ("thought", "{thought}"),
    ("first_user", "{input}"),
    ("first_user", "{system}"),
)


@dataclass(frozen=True)
class TemplateParts:
    """A conversation format in parts; ``{bos}`` and ``{eos}`` may stand in any of them.

    An assistant turn is ``assistant`` + ``thought`` + ``lead`` + its content + ``suffix`` +
    ``sep``. All but ``assistant`` (the prompt) and ``sep`` (what stands between two rounds) is
    learnt; the thought's own text is not, unless ``train_thinking`` is set.
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
    lead: str = ""
    """Between the header and the content, written by the model itself: a space, say."""
    first_user: str | None = None
    """With ``{system}`` and ``{input}``: the user turn that carries the system prompt, for formats
    that have no turn of its own for it (``system`` must be None then)."""
    default_system: str | None = None
    """System prompt of conversations that have none; None: nothing is written."""
    thought: str | None = None
    """With ``{thought}``: a message's reasoning_content; None: it is not written."""
    always_thought: bool = False
    """Write ``thought`` around nothing in front of answers without reasoning_content."""
    tool: str | None = None
    """A tool's result, with ``{output}``; None: results are refused unless ``tools`` is set."""
    tools: Literal["hermes"] | None = None
    """How tools and calls are written: "hermes" is <tools>, <tool_call>, <tool_response>."""
    trim: tuple[str, ...] = ()
    """Roles whose contents lose the white space at both ends, as in some models' own templates."""
    tokens: tuple[str, ...] = ()
    """Tokens that must be in the tokenizer's vocabulary, each as one token."""

    def __post_init__(self) -> None:
        for name, mark in _MARKS:
            part = getattr(self, name)
            if part is not None and part.count(mark) != 1:
                raise TemplateError(
                    f"template part {name}={part!r} must hold {mark} exactly once; write it where "
                    "the message's text belongs"
                )
        if self.system is not None and self.first_user is not None:
            raise TemplateError(
                "template parts system and first_user are both given; a format writes the system "
                "prompt either as a turn of its own or inside the first user turn: keep one"
            )


@dataclass(frozen=True)
class JinjaTemplate:
    """A preset whose format the parts cannot say: a .jinja file of this package."""

    file: str
    """Its name, beside this module."""
    tokens: tuple[str, ...] = ()
    """Tokens that must be in the tokenizer's vocabulary, each as one token."""

    @property
    def source(self) -> str:
        """The jinja text."""
        return (Path(__file__).parent / self.file).read_text(encoding="utf-8").rstrip("\n")


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
        if name in ("tokens", "trim"):
            parts[name] = tuple(value)
        elif name == "always_thought":
            if not isinstance(value, bool):
                raise TemplateError(
                    f"template part {name}={value!r}; allowed: True, False. Correct it."
                )
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
