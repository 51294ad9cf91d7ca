"""How a mistake in a config is told: every problem with its place, in one report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One mistake in a config."""

    key: str  # dotted path, 'model.lora.r'; '' for the file as a whole
    message: str  # what was given, what is allowed, what to do
    place: str = ""  # 'file:line' or 'command line'

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.place, self.key) if part)
        return f"{where}: {self.message}" if where else self.message


class ConfigError(ValueError):
    """A config that cannot be used as it is; the message holds every problem found.

    ``exit_code`` tells the command line that this is the user's to mend: the message is printed
    without a traceback.
    """

    exit_code = 2

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__(report_problems(self.problems))


def report_problems(problems: Sequence[Problem]) -> str:
    """All problems in one text, one paragraph each, in the order of files and lines."""
    if len(problems) == 1:
        return str(problems[0])
    lines = [f"{len(problems)} problems in the config:"]
    lines += [f"  {number}. {problem}" for number, problem in enumerate(problems, 1)]
    return "\n".join(lines)
