"""The ledger: what became of every row and what its tokens teach."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Places named for each reason.
NUM_EXAMPLES = 3

_SUMS = (
    "rows_read", "rows_kept", "rows_truncated", "rows_split", "rows_eos_learnt", "rows_eos_cut",
    "rows_with_tools", "rows_tools_unwritten", "rows_with_thinking", "rows_thinking_unwritten",
    "tokens_encoded", "tokens_truncated", "tokens_repeated", "tokens",
    "supervised_encoded", "supervised_truncated", "tokens_supervised",
    "rows_with_images", "images", "images_cut",
)  # fmt: skip
_PLAIN = (*_SUMS, "name", "num_samples", "capacity")


@dataclass
class Skipped:
    """Rows that were skipped for one reason."""

    count: int = 0
    examples: list[str] = field(default_factory=list)
    """The first few: 'file:line: what is wrong with this one'."""


@dataclass
class Ledger:
    """Counts over the rows of one data set, or of several in sum. ``check`` proves the sums:

    rows_read = rows_kept + rows skipped;
    tokens = tokens_encoded - tokens_truncated + tokens_repeated;
    tokens_supervised = supervised_encoded - supervised_truncated.
    """

    name: str = "dataset"
    rows_read: int = 0
    rows_kept: int = 0
    skipped: dict[str, Skipped] = field(default_factory=dict)
    """reason -> rows."""
    rows_truncated: int = 0
    """Kept rows of which max_length cut tokens off that are lost."""
    rows_split: int = 0
    """Kept rows that became several pieces, no learnt token lost (overlong="split")."""
    rows_eos_learnt: int = 0
    """Kept rows whose learnt turns all end with a learnt end-of-turn or EOS token."""
    rows_eos_cut: int = 0
    """Kept rows that would have, had max_length not cut an end off."""
    rows_with_tools: int = 0
    """Kept rows that offer tools."""
    rows_tools_unwritten: int = 0
    """Those of them whose tools the template does not write: the model never sees them."""
    rows_with_thinking: int = 0
    """Kept rows with reasoning_content in an answer."""
    rows_thinking_unwritten: int = 0
    """Those of them whose thinking the template does not write: the model never sees it."""
    rows_with_images: int = 0
    """Kept rows with images."""
    images: int = 0
    """Images in the samples."""
    images_cut: int = 0
    """Images of kept rows that max_length left out, whole."""
    tokens_encoded: int = 0
    """Tokens of the kept rows as the template wrote them."""
    tokens_truncated: int = 0
    """Of these, tokens that max_length cut off."""
    tokens_repeated: int = 0
    """Tokens shown again, not learnt, as context of a split row's later pieces."""
    tokens: int = 0
    """Tokens in the samples."""
    supervised_encoded: int = 0
    """Learnt tokens of the kept rows as the template wrote them."""
    supervised_truncated: int = 0
    """Of these, cut off by max_length, or left at a cut without a token to predict them from."""
    tokens_supervised: int = 0
    """Tokens with a label in the samples."""
    num_samples: int = 0
    """Samples after packing."""
    capacity: int = 0
    """max_length x samples when packed; 0 otherwise."""
    notes: list[str] = field(default_factory=list)
    """Sentences to read before training: the recognised format, what the template leaves out."""
    parts: list[Ledger] = field(default_factory=list)
    """Ledgers of the sources of a mixture; the counts here are their sum."""

    def skip(self, reason: str, place: str, detail: str = "") -> None:
        """Counts one skipped row."""
        entry = self.skipped.setdefault(reason, Skipped())
        entry.count += 1
        if len(entry.examples) < NUM_EXAMPLES:
            entry.examples.append(f"{place}: {detail or reason}")

    def keep(
        self,
        encoded: tuple[int, int],
        pieces: list[tuple[int, int]],
        *,
        eos_learnt: bool,
        eos_cut: bool = False,
    ) -> None:
        """Counts one kept row.

        Args:
            encoded: (tokens, learnt tokens) as the template wrote the row.
            pieces: (tokens, learnt tokens) of each piece that is kept of it.
            eos_learnt, eos_cut: see ``rows_eos_learnt``, ``rows_eos_cut``.
        """
        tokens = sum(size for size, _ in pieces)
        supervised = sum(learnt for _, learnt in pieces)
        # Of several pieces only the balance is known: some tokens are in none, some in two.
        tokens_truncated = max(encoded[0] - tokens, 0)
        self.rows_kept += 1
        self.rows_split += len(pieces) > 1
        self.rows_truncated += len(pieces) == 1 and tokens_truncated > 0
        self.rows_eos_learnt += eos_learnt
        self.rows_eos_cut += eos_cut
        self.tokens_encoded += encoded[0]
        self.tokens_truncated += tokens_truncated
        self.tokens_repeated += tokens - encoded[0] + tokens_truncated
        self.tokens += tokens
        self.supervised_encoded += encoded[1]
        self.supervised_truncated += encoded[1] - supervised
        self.tokens_supervised += supervised

    def offer_tools(self, written: bool) -> None:
        """Counts one kept row that offers tools, and whether the template writes them."""
        self.rows_with_tools += 1
        self.rows_tools_unwritten += not written

    def show_thinking(self, written: bool) -> None:
        """Counts one kept row with reasoning_content, and whether the template writes it."""
        self.rows_with_thinking += 1
        self.rows_thinking_unwritten += not written

    def show_images(self, kept: int, cut: int) -> None:
        """Counts the images of one kept row: those in its sample, and those max_length cut off."""
        self.rows_with_images += kept + cut > 0
        self.images += kept
        self.images_cut += cut

    def lose_supervised(self, num_tokens: int) -> None:
        """Counts learnt tokens that a cut between samples takes the label of."""
        self.tokens_supervised -= num_tokens
        self.supervised_truncated += num_tokens

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
    def rows_eos_missing(self) -> int:
        """Kept rows with a learnt turn whose end was never written, or not learnt: not cut off."""
        return self.rows_kept - self.rows_eos_learnt - self.rows_eos_cut

    @property
    def fill(self) -> float | None:
        """Share of the packed length that holds tokens; None when not packed."""
        packed = [part for part in self.parts if part.capacity] or [self]
        return sum(part.tokens for part in packed) / self.capacity if self.capacity else None

    def check(self) -> None:
        """Raises AssertionError if the sums do not agree: a bug of ours, never the data's."""
        assert self.rows_read == self.rows_kept + self.rows_skipped, (
            f"{self.name}: {self.rows_read} rows read, but {self.rows_kept} kept and "
            f"{self.rows_skipped} skipped"
        )
        assert self.tokens == self.tokens_encoded - self.tokens_truncated + self.tokens_repeated, (
            f"{self.name}: {self.tokens} tokens, but {self.tokens_encoded} encoded, "
            f"{self.tokens_truncated} truncated, {self.tokens_repeated} repeated"
        )
        assert self.tokens_supervised == self.supervised_encoded - self.supervised_truncated, (
            f"{self.name}: {self.tokens_supervised} tokens supervised, but "
            f"{self.supervised_encoded} encoded and {self.supervised_truncated} truncated"
        )
        counts = {name: getattr(self, name) for name in _SUMS}
        assert min(counts.values()) >= 0, f"{self.name}: a count below 0: {counts}"
        assert self.tokens_supervised <= self.tokens, f"{self.name}: more labels than tokens"
        assert self.rows_eos_missing >= 0, f"{self.name}: more ends than rows"
        assert self.rows_with_tools <= self.rows_kept, f"{self.name}: more tools than rows"
        for part in self.parts:
            part.check()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON data; :meth:`from_dict` takes it back."""
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            "rows_skipped": self.rows_skipped,
            "skipped": {
                reason: {"rows": entry.count, "examples": entry.examples}
                for reason, entry in self.skipped.items()
            },
            "fill": self.fill,
            "notes": self.notes,
            "parts": [part.to_dict() for part in self.parts],
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Ledger:
        """The ledger that ``to_dict`` wrote."""
        return cls(
            **{name: saved[name] for name in _PLAIN if name in saved},  # older ones know fewer
            skipped={
                reason: Skipped(entry["rows"], list(entry["examples"]))
                for reason, entry in saved["skipped"].items()
            },
            notes=list(saved["notes"]),
            parts=[cls.from_dict(part) for part in saved["parts"]],
        )

    def report(self) -> str:
        """The ledger as a table to read before training; that of each source before the sum."""
        lines = [part.report() for part in self.parts]
        lines.append(f"{self.name}: what each row teaches")
        lines += [f"  note: {note}" for note in self.notes]
        lines.append(_line("rows read", self.rows_read))
        lines.append(_line("rows kept", self.rows_kept, self.rows_read))
        lines.append(_line("rows skipped", self.rows_skipped, self.rows_read))
        for reason, entry in sorted(self.skipped.items(), key=lambda item: -item[1].count):
            lines.append(_line(f"  {reason}", entry.count, self.rows_read))
            if not self.parts:
                lines += [f"      {example}" for example in entry.examples]
        lines.append(_line("rows truncated", self.rows_truncated, self.rows_kept))
        lines += self._if_any("rows split into pieces", "rows_split", self.rows_kept)
        lines.append(_line("rows with their end learnt", self.rows_eos_learnt, self.rows_kept))
        lines += self._if_any("  end cut off by max_length", "rows_eos_cut", self.rows_kept)
        lines += self._if_any("  no end token, or not learnt", "rows_eos_missing", self.rows_kept)
        lines += self._if_any("rows with tools", "rows_with_tools", self.rows_kept)
        lines += self._if_any(
            "  not written by the template!", "rows_tools_unwritten", self.rows_kept
        )
        lines += self._if_any("rows with thinking", "rows_with_thinking", self.rows_kept)
        lines += self._if_any(
            "  not written by the template!", "rows_thinking_unwritten", self.rows_kept
        )
        lines += self._if_any("rows with images", "rows_with_images", self.rows_kept)
        lines += self._if_any("  images", "images", None)
        lines += self._if_any("  images cut off by max_length", "images_cut", None)
        lines.append(_line("tokens cut off", self.tokens_truncated, self.tokens_encoded))
        lines += self._if_any("  supervised ones", "supervised_truncated", self.supervised_encoded)
        lines += self._if_any("tokens repeated as context", "tokens_repeated", self.tokens)
        lines.append(_line("tokens", self.tokens))
        lines.append(_line("tokens supervised", self.tokens_supervised, self.tokens))
        lines.append(_line("samples", self.num_samples))
        if self.fill is not None:
            lines.append(f"  {'packed full to':<40} {self.fill:>20.1%}")
        return "\n".join(lines)

    def _if_any(self, label: str, name: str, whole: int | None) -> list[str]:
        count = getattr(self, name)
        return [_line(label, count, whole)] if count else []


def _line(label: str, count: int, whole: int | None = None) -> str:
    share = f"{count / whole:>7.1%}" if whole else ""
    return f"  {label:<40} {count:>12,} {share}".rstrip()
