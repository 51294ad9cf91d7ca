"""Every file of ../shared/data but vlm/ trains from a copied config, and its ledger is right.

The ledgers are counted here a second time, from the JSON and the text of ChatML alone.
"""

import json
import re
from pathlib import Path

import pytest

from tests.end_to_end.conftest import ROOT
from tests.tiny import tiny_tokenizer
from xtuner_lite.cli.main import main
from xtuner_lite.data.dataset import ChatDataset
from xtuner_lite.data.segments import walk_segments
from xtuner_lite.templates.apply import apply_template

SHARED = ROOT.parent / "shared/data"
LIMIT = 1024  # tokens of a row
END = "<|im_end|>"

pytestmark = pytest.mark.skipif(
    not SHARED.is_dir(), reason="../shared/data (the real data) is not beside this checkout"
)

CHATS = {
    "sft/alpaca_en.json": lambda row: alpaca(row),
    "sft/identity.json": lambda row: alpaca(row),
    "preference/pairs_en.json": lambda row: chosen(row),
    "preference/unpaired_en.json": lambda row: labelled(row),
}
TOOLS = ("tools/glaive_en.json", "tools/moss_plugins.jsonl", "tools/moss_no_plugins.jsonl")
TEXT = "pretrain/c4.jsonl"


def read(file: str) -> list[dict]:
    text = (SHARED / file).read_text(encoding="utf-8")
    return json.loads(text) if file.endswith("json") else list(map(json.loads, text.splitlines()))


# ---------------------------------------------------------------- what each format says, by hand
# A conversation is a list of (role, content, learnt); None: the row is not for fine-tuning.


def alpaca(row):
    question = row["instruction"] + (f"\n{row['input']}" if row["input"] else "")
    return [("user", question, False), ("assistant", row["output"], True)]


def chosen(row):
    role = {"human": "user", "gpt": "assistant", "system": "system"}
    prompt = [(role[turn["from"]], turn["value"], False) for turn in row["conversations"]]
    return [*prompt, ("assistant", row["chosen"]["value"], True)]


def labelled(row):
    if not row["label"]:
        return None
    *prompt, answer = [(message["role"], message["content"]) for message in row["messages"]]
    return [(*message, False) for message in prompt] + [(*answer, True)]


def count(conversations: list, tokenizer) -> dict:
    """The ledger of ChatML conversations of which LIMIT tokens are kept."""
    found = dict(rows_kept=0, tokens=0, tokens_supervised=0, tokens_truncated=0, rows_truncated=0)
    for conversation in conversations:
        if conversation is None:
            continue
        mask = []  # per token: learnt or not
        for role, content, learnt in conversation:
            mask += [False] * len(tokenizer(f"<|im_start|>{role}\n")["input_ids"])
            mask += [learnt] * len(tokenizer(content + END)["input_ids"])
            mask += [False] * len(tokenizer("\n")["input_ids"])
        kept = mask[:LIMIT]
        if not any(kept):
            continue
        found["rows_kept"] += 1
        found["tokens"] += len(kept)
        found["tokens_supervised"] += sum(kept)
        found["tokens_truncated"] += len(mask) - len(kept)
        found["rows_truncated"] += len(mask) > LIMIT
    return found


# ---------------------------------------------------------------- the runs


def train(file: str, folder: Path, config: str, options: list[str]) -> dict:
    """Trains two steps from a copy of a shipped config; returns the ledger the run has kept."""
    assert main(["copy-cfg", config, str(folder)]) == 0
    (copy,) = folder.glob("*_copy.py")
    work_dir = folder / "run"
    data = [f"data_path={str(SHARED / file)!r}", f"max_length={LIMIT}"]
    steps = ["train_cfg.max_epochs=None", "train_cfg.max_iters=2", "log_level='ERROR'"]
    small = ["optim_wrapper.accumulative_counts=1", "train_dataloader.batch_size=1"]
    words = ["train", str(copy), "--work-dir", str(work_dir), "--cfg-options"]
    assert main([*words, *data, *steps, *small, *options]) == 0
    lines = (work_dir / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    assert len(losses) == 2
    assert all(0 < loss < 100 for loss in losses)
    (ledger,) = work_dir.glob("*/train_dataloader_ledger.json")
    return json.loads(ledger.read_text())


def check_sums(ledger: dict, num_rows: int) -> None:
    assert ledger["rows_read"] == num_rows == ledger["rows_kept"] + ledger["rows_skipped"]
    assert ledger["rows_skipped"] == sum(entry["rows"] for entry in ledger["skipped"].values())


def test_no_file_is_left_out():
    files = {
        str(path.relative_to(SHARED)) for path in SHARED.rglob("*.json*") if "vlm" not in path.parts
    }
    assert files == {*CHATS, *TOOLS, TEXT}


@pytest.mark.parametrize("file", CHATS)
def test_chats(file, tmp_path, model_folder):
    rows = read(file)
    options = [f"model_path={str(model_folder)!r}"]
    ledger = train(file, tmp_path, "smollm2_135m_sft_lora_custom", options)
    check_sums(ledger, len(rows))
    expected = count([CHATS[file](row) for row in rows], tiny_tokenizer())
    assert {name: ledger[name] for name in expected} == expected
    # Every kept row ends with a learnt <|im_end|> but those that were cut.
    assert ledger["rows_eos_learnt"] >= ledger["rows_kept"] - ledger["rows_truncated"]
    if "unpaired" in file:
        bad = sum(not row["label"] for row in rows)
        assert bad == 150
        assert ledger["skipped"]["the answer is labelled as bad"]["rows"] == bad


def test_text(tmp_path, model_folder):
    rows = read(TEXT)
    options = [f"model_path={str(model_folder)!r}"]
    ledger = train(TEXT, tmp_path, "smollm2_135m_pretrain_full_text", options)
    check_sums(ledger, len(rows))
    tokenizer = tiny_tokenizer()
    sizes = [len(tokenizer(row["text"])["input_ids"]) + 1 for row in rows]  # EOS behind each
    assert ledger["rows_kept"] == 300
    assert ledger["tokens"] == sum(sizes)
    assert ledger["tokens_truncated"] == 0  # joined and cut, nothing is lost
    assert ledger["num_samples"] == -(-sum(sizes) // LIMIT)
    # No label on the first token of a document, nor of the piece behind each cut inside one.
    ends = set()
    total = 0
    for size in sizes:
        total += size
        ends.add(total)
    cuts = [cut for cut in range(LIMIT, total, LIMIT) if cut not in ends]
    assert ledger["tokens_supervised"] == total - len(rows) - len(cuts)


@pytest.mark.parametrize("file", TOOLS)
def test_tools(file, tmp_path, model_folder):
    rows = read(file)
    options = [f"model_path={str(model_folder)!r}", "tokenizer.template='chatml'"]
    # MOSS begins with a thousand tokens of system prompt: more than LIMIT leaves of a row
    options.append("train_dataloader.dataset.overlong='truncate_left'")
    ledger = train(file, tmp_path, "smollm2_135m_sft_lora_custom", options)
    check_sums(ledger, len(rows))
    assert ledger["rows_kept"] == len(rows)


def learnt_of(file: str, limit: int) -> list[str]:
    """What each row teaches, as text."""
    tokenizer = apply_template(tiny_tokenizer(), "chatml")
    path = str(SHARED / file)
    dataset = ChatDataset(
        path, tokenizer=tokenizer, limit=limit, max_length=None, packing="none", cache=False
    )
    assert len(dataset) == limit
    return [
        tokenizer.decode(segment.input_ids[segment.learnt]) for segment in walk_segments(dataset)
    ]


def test_what_glaive_teaches():
    for row, learnt in zip(read(TOOLS[0])[:60], learnt_of(TOOLS[0], 60)):
        expected = ""
        for turn in row["conversations"]:
            if turn["from"] == "function_call":
                call = json.loads(turn["value"])
                arguments = json.dumps(call["arguments"], ensure_ascii=False)
                text = f'{{"name": "{call["name"]}", "arguments": {arguments}}}'
                expected += f"<tool_call>\n{text}\n</tool_call>{END}"
            elif turn["from"] == "gpt":
                expected += turn["value"] + END
        assert learnt == expected


@pytest.mark.parametrize("file", TOOLS[1:])
def test_what_moss_teaches(file):
    """Answers and commands are learnt, in order; questions, thoughts and results are not."""
    num_calls = 0
    for row, learnt in zip(read(file)[:60], learnt_of(file, 60)):
        turns = [
            {
                part: re.sub(r"^\s*<\|[^|]+\|>:|<eo[htcrm]>\s*$", "", text).strip()
                for part, text in row["chat"][f"turn_{number}"].items()
            }
            for number in range(1, len(row["chat"]) + 1)
        ]
        at = 0
        for turn in turns:
            for name in re.findall(r'(\w+)\("', turn["Commands"]):
                num_calls += 1
                at = learnt.index(f'"name": "{name}"', at)
            at = learnt.index(turn["MOSS"] + END, at)
        for turn in turns:  # an answer may repeat the thought before it
            learnt = learnt.replace(turn["MOSS"], "")
        for turn in turns:
            for part in ("Human", "Inner Thoughts", "Tool Responses"):
                assert len(turn[part]) < 40 or turn[part] not in learnt
    assert (num_calls > 20) == ("no_plugins" not in file)
