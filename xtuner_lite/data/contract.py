"""The data contract: limits a config sets on what may become of its rows, checked on the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from xtuner_lite.data.ledger import Ledger
from xtuner_lite.suggestions import did_you_mean


class DataContractError(ValueError):
    """The data breaks the config's ``data_contract``: the run has to stop."""


@dataclass(frozen=True)
class DataContract:
    """Limits on a ledger. A float is a share from 0 to 1, an int a number; None sets no limit.

    Args:
        max_skipped: rows skipped for any reason, of the rows read.
        max_truncated: rows that lost tokens to max_length, of the rows kept.
        require_eos: every learnt turn must end with a learnt end-of-turn or EOS token. Ends that
            max_length cut off do not count here: max_truncated limits them.
        min_supervised: tokens that are learnt, of all tokens in the samples.
        require_tools: the template must write the tools of every row that offers some.
    """

    max_skipped: float | int | None = None
    max_truncated: float | int | None = None
    require_eos: bool = False
    min_supervised: float | int | None = None
    require_tools: bool = False

    def __post_init__(self) -> None:
        for name in ("max_skipped", "max_truncated", "min_supervised"):
            _check_limit(name, getattr(self, name))
        for name in ("require_eos", "require_tools"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"data_contract: {name}={getattr(self, name)!r}; allowed: True or False"
                )

    @classmethod
    def of(cls, given: DataContract | Mapping[str, Any] | None) -> DataContract:
        """The contract that a config's ``data_contract`` describes; None is one without limits.

        Raises:
            TypeError: neither a dict nor a contract, or a value of the wrong type.
            ValueError: an unknown key, or a number out of its range.
        """
        if isinstance(given, DataContract):
            return given
        if given is None:
            return cls()
        if not isinstance(given, Mapping):
            raise TypeError(
                f"data_contract={given!r}; allowed: a dict such as "
                "dict(max_skipped=0.01, require_eos=True), or None"
            )
        known = [field.name for field in fields(cls)]
        for key in given:
            if key not in known:
                raise ValueError(
                    f"data_contract has no key {key!r}{did_you_mean(str(key), known)} "
                    f"Allowed: {', '.join(known)}"
                )
        return cls(**given)

    def check(self, ledger: Ledger) -> None:
        """Holds a ledger against the limits.

        Raises:
            DataContractError: with every limit that is broken: figure, limit and what to do.
        """
        found = [*self._rows(ledger), *self._learnt(ledger)]
        if found:
            raise DataContractError(
                f"{ledger.name} breaks the data_contract of the config:\n  " + "\n  ".join(found)
            )

    def _rows(self, ledger: Ledger) -> list[str]:
        found = []
        if _over(ledger.rows_skipped, ledger.rows_read, self.max_skipped):
            reasons = sorted(ledger.skipped.items(), key=lambda item: -item[1].count)
            shown = "; ".join(
                f"{entry.count} x {reason}, such as {entry.examples[0]}"
                for reason, entry in reasons[:3]
            )
            found.append(
                f"max_skipped={self.max_skipped!r}: "
                f"{_figure(ledger.rows_skipped, ledger.rows_read, 'rows')} were skipped ({shown}). "
                "Correct these rows, or raise max_skipped."
            )
        if _over(ledger.rows_truncated, ledger.rows_kept, self.max_truncated):
            found.append(
                f"max_truncated={self.max_truncated!r}: "
                f"{_figure(ledger.rows_truncated, ledger.rows_kept, 'rows')} were truncated and "
                f"lost {ledger.tokens_truncated:,} tokens, {ledger.supervised_truncated:,} of them "
                "supervised. Raise max_length, set overlong='split' or 'drop', or raise "
                "max_truncated."
            )
        return found

    def _learnt(self, ledger: Ledger) -> list[str]:
        found = []
        if self.require_eos and ledger.rows_eos_missing:
            found.append(
                "require_eos=True: in "
                f"{_figure(ledger.rows_eos_missing, ledger.rows_kept, 'rows')} a learnt turn has "
                "no learnt end-of-turn or EOS token: the model would not learn to stop. Name a "
                "template that ends its turns (xtuner-lite list templates), or set "
                "require_eos=False."
            )
        if _under(ledger.tokens_supervised, ledger.tokens, self.min_supervised):
            found.append(
                f"min_supervised={self.min_supervised!r}: "
                f"{_figure(ledger.tokens_supervised, ledger.tokens, 'tokens')} are supervised. "
                "Look at what is learnt (xtuner-lite preview-data), correct map_fn or train_on, or "
                "lower min_supervised."
            )
        if self.require_tools and ledger.rows_tools_unwritten:
            found.append(
                "require_tools=True: the template does not write the tools of "
                f"{_figure(ledger.rows_tools_unwritten, ledger.rows_with_tools, 'rows')} that "
                "offer some. Name a template that does, such as template='chatml', or set "
                "require_tools=False."
            )
        return found


def _measure(count: int, whole: int, limit: float | int) -> float:
    """The share if the limit is one, else the count."""
    return (count / whole if whole else 0.0) if isinstance(limit, float) else count


def _over(count: int, whole: int, limit: float | int | None) -> bool:
    return limit is not None and _measure(count, whole, limit) > limit


def _under(count: int, whole: int, limit: float | int | None) -> bool:
    return limit is not None and _measure(count, whole, limit) < limit


def _figure(count: int, whole: int, what: str) -> str:
    share = f" ({count / whole:.2%})" if whole else ""
    return f"{count:,} of {whole:,} {what}{share}"


def _check_limit(name: str, value: Any) -> None:
    """Raises TypeError or ValueError for what is neither None, a share nor a count."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"data_contract: {name}={value!r}; allowed: a float from 0 to 1 (a share), an int from "
            "0 on (a number), or None"
        )
    in_range = 0 <= value <= 1 if isinstance(value, float) else value >= 0
    if not in_range:
        raise ValueError(
            f"data_contract: {name}={value!r} is out of range; a float is a share from 0 to 1, an "
            "int a number from 0 on"
        )
