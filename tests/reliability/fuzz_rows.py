"""Rows of known truth: good, bad or useless, in files as users bring them.

    python tests/reliability/fuzz_rows.py --rows 10000 --seed 0

writes files of every format, reads them with ChatDataset(on_bad_row='skip') and compares what the
ledger says with the truth: each bad row is reported as ``file:line: reason``, no other is, and the
good rows come out byte for byte as from a file that holds nothing else. Prints the counts as JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

GOOD, BAD, USELESS = "good", "bad", "useless"
MAX_LENGTH = 512


class FuzzRow(NamedTuple):
    """One line of a file, without its line end."""

    line: bytes
    truth: str
    kind: str
    """The name of what was done to it."""


TEXTS = [
    "Who are you?", "I am a small helper.", "你好，世界", "🙂 ok", "a\u0000b", "\u2028line\u2029",
    "tabs\tand\nnewlines\r\n", "<|im_end|>\n<|im_start|>assistant\n", "e\u0301\u200d\ufeff",
    "'\"\\", "x\x85",
]  # fmt: skip


def text(rng: random.Random) -> str:
    return " ".join(rng.choices(TEXTS, k=rng.randint(1, 4)))


# ------------------------------------------------------------------ good rows


def openai_row(rng: random.Random) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.3:
        messages.append({"role": rng.choice(["system", "developer"]), "content": text(rng)})
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": text(rng)})
        messages.append({"role": "assistant", "content": text(rng)})
    return {"messages": messages}


def sharegpt_row(rng: random.Random) -> dict[str, Any]:
    turns = []
    for _ in range(rng.randint(1, 3)):
        turns.append({"from": rng.choice(["human", "user"]), "value": text(rng)})
        turns.append({"from": rng.choice(["gpt", "assistant"]), "value": text(rng)})
    return {"conversations": turns}


def alpaca_row(rng: random.Random) -> dict[str, Any]:
    context = rng.choice(["", text(rng)])
    return {"instruction": text(rng), "input": context, "output": text(rng)}


def pair_row(rng: random.Random) -> dict[str, Any]:
    return {"prompt": text(rng), "chosen": text(rng), "rejected": text(rng)}


def text_row(rng: random.Random) -> dict[str, Any]:
    return {"text": text(rng)}


class Source(NamedTuple):
    """A format: its map function, how a good row is made, where its texts and answers are."""

    map_fn: str
    make: Callable[[random.Random], dict[str, Any]]
    texts: Callable[[dict[str, Any]], list[tuple[Any, Any]]]
    """(container, key) of each required text."""
    answers: Callable[[dict[str, Any]], list[tuple[Any, Any]]]
    required: tuple[str, ...]
    turns: str = ""
    """Key of the list of turns."""
    role: str = ""


def _of_turns(key: str, content: str, role: str, *wanted: str) -> Callable[..., Any]:
    return lambda row: [(turn, content) for turn in row[key] if not wanted or turn[role] in wanted]


def _of_keys(*keys: str) -> Callable[..., Any]:
    return lambda row: [(row, key) for key in keys]


SOURCES = {
    "openai": Source(
        "openai", openai_row, _of_turns("messages", "content", "role"),
        _of_turns("messages", "content", "role", "assistant"), ("messages",), "messages", "role",
    ),
    "sharegpt": Source(
        "sharegpt", sharegpt_row, _of_turns("conversations", "value", "from"),
        _of_turns("conversations", "value", "from", "gpt", "assistant"), ("conversations",),
        "conversations", "from",
    ),
    "alpaca": Source(
        "alpaca", alpaca_row, _of_keys("instruction", "output"), _of_keys("output"),
        ("instruction", "output"),
    ),
    "pairs": Source(
        "chosen", pair_row, _of_keys("prompt", "chosen"), _of_keys("chosen"),
        ("prompt", "chosen", "rejected"),
    ),
    "pretrain": Source(
        "pretrain", text_row, _of_keys("text"), _of_keys("text"), ("text",),
    ),
}  # fmt: skip

# ------------------------------------------------------------------ what is done to a row
# Each takes (rng, a good row, its source) and returns the row, or the bytes of its line.

Change = Callable[[random.Random, dict[str, Any], Source], Any]


def _set_text(value: Callable[[random.Random], Any], answer: bool = False) -> Change:
    def change(rng: random.Random, row: dict[str, Any], source: Source) -> Any:
        container, key = rng.choice((source.answers if answer else source.texts)(row))
        container[key] = value(rng)
        return row

    return change


def _drop_key(rng: random.Random, row: dict[str, Any], source: Source) -> Any:
    del row[rng.choice(source.required)]
    return row


def _line(make: Callable[[random.Random, bytes], bytes]) -> Change:
    return lambda rng, row, source: make(rng, dumped(row))


def _turn(change: Callable[[random.Random, list[Any], Source], None]) -> Change:
    def changed(rng: random.Random, row: dict[str, Any], source: Source) -> Any:
        if not source.turns:
            return None
        change(rng, row[source.turns], source)
        return row

    return changed


def _openai(change: Callable[[random.Random, dict[str, Any]], None]) -> Change:
    def changed(rng: random.Random, row: dict[str, Any], source: Source) -> Any:
        if source.map_fn != "openai":
            return None
        change(rng, row)
        return row

    return changed


def _replace_turn(*values: Any) -> Change:
    def change(rng: random.Random, turns: list[Any], source: Source) -> None:
        turns[rng.randrange(len(turns))] = rng.choice(values)

    return _turn(change)


def _set_role(*values: Any) -> Change:
    def change(rng: random.Random, turns: list[Any], source: Source) -> None:
        rng.choice(turns)[source.role] = rng.choice(values)

    return _turn(change)


def _drop_from_turn(rng: random.Random, turns: list[Any], source: Source) -> None:
    turn = rng.choice(turns)
    del turn[rng.choice(list(turn))]


def _answer_of(row: dict[str, Any]) -> dict[str, Any]:
    return row["messages"][-1]


_SURROGATES = ["\ud800", "x\udfff", "\udc00\ud800"]
_DEEP = b"[" * 100_000

GOOD_CHANGES: dict[str, Change] = {
    "nothing": lambda rng, row, source: row,
    "huge text": _set_text(lambda rng: "word " * rng.randint(20_000, 60_000), answer=True),
    "one huge word": _set_text(lambda rng: "x" * rng.randint(20_000, 60_000), answer=True),
    "NUL": _set_text(lambda rng: "\u0000" * rng.randint(1, 9)),
    "surrogate pair, escaped": _line(
        lambda rng, line: line.replace(b'": "', b'": "\\ud83d\\ude00 ', 1)
        if line.count(b'": "') and b'"role"' not in line and b'"from"' not in line else line
    ),
    "strange columns": lambda rng, row, source: {
        "id": float("nan"), "": None, "meta": {"a": [[[{}]]]}, "\ud800": "\udfff", **row
    },
    "nested column": lambda rng, row, source: {"meta": json.loads("[" * 200 + "]" * 200), **row},
    "spaces around": _line(lambda rng, line: b" \t" + line + b"  "),
    "not escaped": lambda rng, row, source: json.dumps(row, ensure_ascii=False).encode(),
    "repeated key": _line(lambda rng, line: b'{"zz": 1, "zz": 2, ' + line[1:]),
    "text parts": _openai(
        lambda rng, row: row["messages"][0].update(
            content=[{"type": "text", "text": "a"}, {"type": "text", "text": text(rng)}]
        )
    ),
    "loss weights": _openai(lambda rng, row: row["messages"][-1].update(loss=rng.choice([1, 0.5]))),
    "None beside": _openai(
        lambda rng, row: row["messages"][-1].update(name=None, tool_calls=None, loss=None)
    ),
    "empty question": _turn(lambda rng, turns, source: turns[-2].update({_content(source): ""})),
}  # fmt: skip


def _content(source: Source) -> str:
    return "content" if source.map_fn == "openai" else "value"


BAD_CHANGES: dict[str, Change] = {
    "cut off": _line(lambda rng, line: line[: rng.randint(1, len(line) - 1)]),
    "trailing comma": _line(lambda rng, line: line[:-1] + b",}"),
    "single quotes": _line(lambda rng, line: line.replace(b'"', b"'")),
    "two values": _line(lambda rng, line: line + b" " + line),
    "raw control character": _line(lambda rng, line: line[:2] + b"\x01" + line[2:]),
    "not UTF-8": _line(lambda rng, line: line[:3] + rng.choice([b"\xff", b"\xc3(", b"\xed\xa0\x80"])
                       + line[3:]),
    "UTF-16": _line(lambda rng, line: line.decode().replace("\n", " ").encode("utf-16-le")
                    .replace(b"\n", b"\x0b")),
    "deep nesting": _line(lambda rng, line: _DEEP),
    "deep nesting in a column": _line(lambda rng, line: b'{"meta": ' + _DEEP + b", " + line[1:]),
    "huge number": _line(lambda rng, line: b'{"n": ' + b"9" * 5000 + b", " + line[1:]),
    "no object": lambda rng, row, source: rng.choice(
        [b"5", b'"text"', b"null", b"true", b"[]", b"[{}]", b"NaN", b"-0.0"]
    ),
    "empty object": lambda rng, row, source: {},
    "missing key": _drop_key,
    "wrong type": _set_text(lambda rng: rng.choice([5, True, {}, 0.5, {"a": "b"}])),
    "None": _set_text(lambda rng: None),
    "list of junk": _set_text(lambda rng: rng.choice([[5], [None], [["a"]], [{"type": "image"}]])),
    "nested junk": _set_text(lambda rng: json.loads("[" * 300 + "5" + "]" * 300)),
    "lone surrogate": _set_text(lambda rng: "ok " + rng.choice(_SURROGATES)),
    "bad role": _set_role("bot", "", 3, None, True, ["user"], {"a": 1}, "USER", "\ud800"),
    "turn is no object": _replace_turn(5, None, "Hi", [], True, [{}]),
    "turn without a key": _turn(_drop_from_turn),
    "turns are no list": lambda rng, row, source: (
        {**row, source.turns: rng.choice([5, "Hi", {}, True, {"0": {}}])} if source.turns else None
    ),
    "bad loss": _openai(
        lambda rng, row: _answer_of(row).update(
            loss=rng.choice(["no", -1, float("inf"), float("nan"), [], {}])
        )
    ),
    "bad tool calls": _openai(
        lambda rng, row: _answer_of(row).update(
            tool_calls=rng.choice(
                [5, [5], [{}], [{"function": {"name": 3}}],
                 [{"function": {"name": "f", "arguments": "{"}}],
                 [{"function": {"name": "f", "arguments": [1]}}],
                 [{"function": {"name": "f", "arguments": {"a": "\udfff"}}}]]
            )
        )
    ),
    "tool calls of a user": _openai(
        lambda rng, row: row["messages"][-2].update(tool_calls=[{"function": {"name": "f"}}])
    ),
    "bad tools": _openai(
        lambda rng, row: row.update(tools=rng.choice([5, "[", "{}x", [5], [{"name": 3}], {"a": 1}]))
    ),
    "bad thinking": _openai(
        lambda rng, row: _answer_of(row).update(reasoning_content=rng.choice([5, ["a"], "\ud800"]))
    ),
}  # fmt: skip

USELESS_CHANGES: dict[str, Change] = {
    "empty answer": _set_text(lambda rng: rng.choice(["", " ", "\n\t"]), answer=True),
    "no turns": lambda rng, row, source: {**row, source.turns: []} if source.turns else None,
    "nothing learnt": _openai(
        lambda rng, row: [m.update(loss=False) for m in row["messages"]] and None
    ),
}


def dumped(row: Any) -> bytes:
    return json.dumps(row).encode()


def make_row(rng: random.Random, source: Source) -> FuzzRow:
    """A random row: half are good."""
    while True:
        truth, changes = rng.choices(
            [(GOOD, GOOD_CHANGES), (BAD, BAD_CHANGES), (USELESS, USELESS_CHANGES)], [5, 4, 1]
        )[0]
        kind = rng.choice(list(changes))
        changed = changes[kind](rng, copy.deepcopy(source.make(rng)), source)
        if changed is None:
            continue
        line = changed if isinstance(changed, bytes) else dumped(changed)
        if b"\n" not in line and line.strip():
            return FuzzRow(line, truth, kind)


def make_lines(path: Path, rows: list[FuzzRow], rng: random.Random) -> dict[str, FuzzRow]:
    """Writes a jsonl file with BOM, CRLF and blank lines here and there; place -> row."""
    lines: dict[str, FuzzRow] = {}
    number = 0
    with path.open("wb") as file:
        if rng.random() < 0.5:
            file.write(b"\xef\xbb\xbf")
        for row in rows:
            while rng.random() < 0.03:
                number += 1
                file.write(rng.choice([b"\n", b"\r\n", b"  \n"]))
            number += 1
            lines[str(number)] = row
            file.write(row.line + rng.choice([b"\n", b"\n", b"\r\n"]))
        last = dumped({"text": "cut off", "messages": [], "instruction": ""})
        lines[str(number + 1)] = FuzzRow(last[:-5], BAD, "cut-off last line")
        file.write(last[:-5])
    return lines


def make_array(path: Path, rows: list[FuzzRow], rng: random.Random) -> dict[str, FuzzRow]:
    """Writes the rows that are JSON as one array, cut off in its last row; place -> row."""
    lines: dict[str, FuzzRow] = {}
    rows = [row for row in rows if _is_json(row.line)]
    cut = b'{"text": "cut o'
    rows.append(FuzzRow(cut, BAD, "cut-off last row"))
    line, last = 1, 0
    with path.open("wb") as file:
        file.write(rng.choice([b"", b"\xef\xbb\xbf"]) + b"[")
        for number, row in enumerate(rows, start=1):
            gap = rng.choice([b"", b" ", b"\n", b"\n", b"\r\n", b"\n\n  "])
            line += gap.count(b"\n")
            lines[f"{line} (row {number})" if line == last else str(line)] = row
            last = line
            file.write(gap + row.line + (b"," if row.line != cut else b""))
    return lines


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line.decode())
    except (ValueError, RecursionError):
        return False
    return True


# ------------------------------------------------------------------ the comparison


def compare(
    folder: Path, name: str, num_rows: int, seed: int, *, suffix: str = ".jsonl", num_proc: int = 1
) -> dict[str, Any]:
    """Reads one file of a format and compares ledger and tokens with the truth.

    Args:
        suffix: ".jsonl", or ".json" for an array.

    Returns:
        counts, and under 'wrong' every difference in words.
    """
    import xtuner_lite.data.ledger as ledger_module
    from tests.tiny import tiny_tokenizer
    from xtuner_lite.data.dataset import ChatDataset
    from xtuner_lite.templates import apply_template

    ledger_module.NUM_EXAMPLES = sys.maxsize  # name every skipped row, not three of a reason
    rng = random.Random(f"{name}-{seed}")
    source = SOURCES[name]
    rows = [make_row(rng, source) for _ in range(num_rows - 1)]
    path, clean = folder / f"{name}{suffix}", folder / f"{name}_clean.jsonl"
    lines = (make_lines if suffix == ".jsonl" else make_array)(path, rows, rng)
    clean.write_bytes(b"".join(row.line + b"\n" for row in lines.values() if row.truth == GOOD))
    options: dict[str, Any] = dict(
        tokenizer=apply_template(tiny_tokenizer(None), "chatml"), map_fn=source.map_fn,
        max_length=MAX_LENGTH, packing="none", on_bad_row="skip", cache=False,
    )  # fmt: skip
    started = time.monotonic()
    dataset = ChatDataset(str(path), num_proc=num_proc, **options)
    seconds = time.monotonic() - started
    reference = ChatDataset(str(clean), **options)
    wrong = _wrong_rows(dataset, lines, path) + _wrong_tokens(dataset, reference)
    return {
        "format": name + suffix, "rows": len(lines), **Counter(row.truth for row in lines.values()),
        "kinds": len({row.kind for row in lines.values()}), "seconds": round(seconds, 1),
        "wrong": wrong,
    }  # fmt: skip


def _wrong_rows(dataset: Any, lines: dict[str, FuzzRow], path: Path) -> list[str]:
    reported: dict[str, str] = {}
    wrong = []
    for reason, entry in dataset.ledger.skipped.items():
        truth = BAD if reason == "bad row" else USELESS
        for example in entry.examples:
            found = re.match(re.escape(str(path)) + r":(\d+(?: \(row \d+\))?): \S", example)
            if found is None:
                wrong.append(f"not 'file:line: reason': {example[:200]}")
            else:
                reported[found[1]] = truth
    for place, row in lines.items():
        said = reported.pop(place, GOOD)
        if said != row.truth:
            wrong.append(
                f"line {place} ({row.kind}) is {row.truth}, said {said}: {row.line[:200]!r}"
            )
    return wrong + [f"line {place} is no row, said {said}" for place, said in reported.items()]


def _wrong_tokens(dataset: Any, reference: Any) -> list[str]:
    if len(dataset) != len(reference):
        return [f"{len(dataset)} rows kept, {len(reference)} from the clean file"]
    for index in range(len(dataset)):
        one, two = dataset[index], reference[index]
        if any(one[key].tobytes() != two[key].tobytes() for key in ("input_ids", "labels")):
            return [f"{one['row_ids']}: not the tokens of {two['row_ids']} in the clean file"]
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000, help="of all formats together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-proc", type=int, default=1)
    arguments = parser.parse_args()
    share = arguments.rows // len(SOURCES) // 2
    with tempfile.TemporaryDirectory() as folder:
        found = [
            compare(
                Path(folder),
                name,
                share,
                arguments.seed,
                suffix=suffix,
                num_proc=arguments.num_proc,
            )
            for name in SOURCES
            for suffix in (".jsonl", ".json")
        ]
    print(json.dumps(found, indent=1))
    return int(any(result["wrong"] for result in found))


if __name__ == "__main__":
    sys.exit(main())
