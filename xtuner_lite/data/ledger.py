"""The ledger: what became of every row and what its tokens teach."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Places named for each reason.
NUM_EXAMPLES = 3

_SUMS = (
    "rows_read", "rows_kept", "rows_truncated", "tokens_truncated", "tokens", "tokens_supervised",
    "rows_eos_learnt",
)  # fmt: skip


@dataclass
class Skipped:
    """Rows that were skipped for one reason."""

    count: int = 0
    examples: list[str] = field(default_factory=list)
    """The first few: 'file:line: what is wrong with this one'."""


@dataclass
class Ledger:
    """Counts over the rows of one data set. ``rows_read == rows_kept + rows skipped``, always."""

    name: str = "dataset"
    rows_read: int = 0
    rows_kept: int = 0
    skipped: dict[str, Skipped] = field(default_factory=dict)
    """reason -> rows."""
    rows_truncated: int = 0
    tokens_truncated: int = 0
    """Tokens that max_length cut off."""
    tokens: int = 0
    """Tokens of the kept rows, after truncation."""
    tokens_supervised: int = 0
    """Tokens with a label."""
    rows_eos_learnt: int = 0
    """Kept rows whose learnt turns all end with a learnt end-of-turn or EOS token."""
    num_samples: int = 0
    """Samples after packing."""
    capacity: int = 0
    """max_length x samples when packed; 0 otherwise."""
    notes: list[str] = field(default_factory=list)
    """Sentences to read before training: the recognised format, what the template leaves out."""

    def skip(self, reason: str, place: str, detail: str = "") -> None:
        """Counts one skipped row."""
        entry = self.skipped.setdefault(reason, Skipped())
        entry.count += 1
        if len(entry.examples) < NUM_EXAMPLES:
            entry.examples.append(f"{place}: {detail or reason}")

    def keep(self, num_tokens: int, num_supervised: int, num_cut: int, eos_learnt: bool) -> None:
        """Counts one kept row.

        Args:
            num_tokens: tokens kept.
            num_supervised: those with a label.
            num_cut: tokens truncated.
            eos_learnt: see ``rows_eos_learnt``.
        """
        self.rows_kept += 1
        self.tokens += num_tokens
        self.tokens_supervised += num_supervised
        self.tokens_truncated += num_cut
        self.rows_truncated += num_cut > 0
        self.rows_eos_learnt += eos_learnt

    def add(self, other: Ledger) -> None:
        """Adds the row counts of another ledger: of a chunk, or of another data set."""
        for reason, entry in other.skipped.items():
            mine = self.skipped.setdefault(reason, Skipped())
            mine.count += entry.count
            mine.examples += entry.examples[: NUM_EXAMPLES - len(mine.examples)]
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def rows_skipped(self) -> int:
        """Rows skipped for any reason."""
        return sum(entry.count for entry in self.skipped.values())

    @property
    def fill(self) -> float | None:
        """Share of the packed length that holds tokens; None when not packed."""
        return self.tokens / self.capacity if self.capacity else None

    def check(self) -> None:
        """Raises AssertionError if the sums do not agree: a bug of ours, never the data's."""
        assert self.rows_read == self.rows_kept + self.rows_skipped, (
            f"{self.name}: {self.rows_read} rows read, but {self.rows_kept} kept and "
            f"{self.rows_skipped} skipped"
        )
        assert self.tokens_supervised <= self.tokens, f"{self.name}: more labels than tokens"
        assert self.rows_eos_learnt <= self.rows_kept, f"{self.name}: more ends than rows"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON data."""
        return {
            "name": self.name,
            "rows_read": self.rows_read,
            "rows_kept": self.rows_kept,
            "rows_skipped": self.rows_skipped,
            "skipped": {
                reason: {"rows": entry.count, "examples": entry.examples}
                for reason, entry in self.skipped.items()
            },
            "rows_truncated": self.rows_truncated,
            "tokens_truncated": self.tokens_truncated,
            "tokens": self.tokens,
            "tokens_supervised": self.tokens_supervised,
            "rows_eos_learnt": self.rows_eos_learnt,
            "num_samples": self.num_samples,
            "fill": self.fill,
            "notes": self.notes,
        }

    def report(self) -> str:
        """The ledger as a table to read before training."""
        lines = [f"{self.name}: what each row teaches"]
        lines += [f"  note: {note}" for note in self.notes]
        lines.append(_line("rows read", self.rows_read))
        lines.append(_line("rows kept", self.rows_kept, self.rows_read))
        lines.append(_line("rows skipped", self.rows_skipped, self.rows_read))
        for reason, entry in sorted(self.skipped.items(), key=lambda item: -item[1].count):
            lines.append(_line(f"  {reason}", entry.count, self.rows_read))
            lines += [f"      {example}" for example in entry.examples]
        lines.append(_line("rows truncated", self.rows_truncated, self.rows_kept))
        cut_of = self.tokens + self.tokens_truncated
        lines.append(_line("tokens cut off", self.tokens_truncated, cut_of))
        lines.append(_line("tokens", self.tokens))
        lines.append(_line("tokens supervised", self.tokens_supervised, self.tokens))
        lines.append(_line("rows with their end learnt", self.rows_eos_learnt, self.rows_kept))
        lines.append(_line("samples", self.num_samples))
        if self.fill is not None:
            lines.append(f"  {'packed full to':<40} {self.fill:>20.1%}")
        return "\n".join(lines)


def _line(label: str, count: int, whole: int | None = None) -> str:
    share = f"{count / whole:>7.1%}" if whole else ""
    return f"  {label:<40} {count:>12,} {share}".rstrip()
