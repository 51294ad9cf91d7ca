"""ChatDataset and TextDataset: samples, ledger, policies; packed equals unpacked."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import tiny_tokenizer
from xtuner_lite.data.dataset import ChatDataset, TextDataset
from xtuner_lite.data.encode import RowEncoder
from xtuner_lite.data.map_fns.recognise import NUM_LOOKED_AT
from xtuner_lite.structures import IGNORE_INDEX
from xtuner_lite.templates import ChatTemplate, TemplateError, apply_template

SHARED = Path(__file__).parents[3] / "shared" / "data"


def alpaca(n: int, words: int = 3) -> dict:
    return {"instruction": f"Question {n}?", "output": "word " * (words + n % 7) + "end"}


def make(rows, **options):
    options.setdefault("max_length", 64)
    return ChatDataset(rows, tokenizer=tiny_tokenizer(), **options)


def test_a_sample_by_hand():
    dataset = make([alpaca(0), alpaca(1)], max_length=200)
    assert len(dataset) == 1
    sample = dataset[0]
    template = ChatTemplate(tiny_tokenizer())
    rows = []
    for n in range(2):
        chat = [{"role": "user", "content": alpaca(n)["instruction"]},
                {"role": "assistant", "content": alpaca(n)["output"]}]  # fmt: skip
        rows.append(template.encode(chat))
    assert sample["input_ids"].tolist() == [*rows[0].input_ids, *rows[1].input_ids]
    assert sample["labels"].tolist() == [*rows[0].labels, *rows[1].labels]
    assert sample["lengths"] == [len(rows[0]), len(rows[1])]
    assert sample["row_ids"] == ["rows:1", "rows:2"]
    assert set(sample) == {"input_ids", "labels", "lengths", "row_ids"}
    assert sample["input_ids"].dtype == sample["labels"].dtype == np.int32


def test_packed_equals_unpacked_row_by_row():
    rows = [alpaca(n) for n in range(60)]
    unpacked = make(rows, packing="none", max_length=200)
    by_row = {s["row_ids"][0]: (s["input_ids"].tolist(), s["labels"].tolist()) for s in unpacked}
    packed = make(rows, packing="best_fit", max_length=200)
    assert len(packed) < len(unpacked) == 60
    seen = {}
    for sample in packed:
        at = 0
        for row, length in zip(sample["row_ids"], sample["lengths"]):
            piece = slice(at, at + length)
            seen[row] = (sample["input_ids"][piece].tolist(), sample["labels"][piece].tolist())
            at += length
    assert seen == by_row
    assert packed.ledger.tokens_supervised == unpacked.ledger.tokens_supervised


def test_the_ledger_counts_what_the_samples_hold():
    dataset = make([alpaca(n, words=n) for n in range(40)])
    ledger = dataset.ledger
    samples = list(dataset)
    assert ledger.tokens == sum(len(s["input_ids"]) for s in samples) == dataset.lengths.sum()
    labels = np.concatenate([s["labels"] for s in samples])
    assert ledger.tokens_supervised == (labels != IGNORE_INDEX).sum()
    assert ledger.num_samples == len(samples)
    assert ledger.rows_kept == dataset.num_rows == sum(len(s["lengths"]) for s in samples)
    assert ledger.rows_truncated > 0
    assert ledger.rows_eos_learnt == ledger.rows_kept - ledger.rows_truncated
    assert "recognised as 'alpaca'" in ledger.notes[0]


def test_overlong_rows():
    short, long = alpaca(0), alpaca(0, words=200)
    prompt = {"instruction": "why " * 200, "output": "end"}
    rows = [short, long, prompt]
    cut = make(rows).ledger
    assert (cut.rows_kept, cut.rows_truncated) == (2, 1)
    skipped = cut.skipped["nothing learnt is left within max_length"]
    assert skipped.count == 1
    assert "rows:3: nothing learnt is left within max_length (" in skipped.examples[0]
    dropped = make(rows, overlong="drop").ledger
    assert dropped.skipped["longer than max_length"].count == 2
    with pytest.raises(ValueError, match=r"rows:2: \d+ tokens, and max_length is 64. Raise"):
        make(rows, overlong="raise")


def test_max_length_shorter_than_every_prompt():
    with pytest.raises(ValueError, match="nothing is supervised: none of its 3 rows.*max_length=5"):
        make([alpaca(n) for n in range(3)], max_length=5)


def test_a_data_set_in_which_nothing_is_supervised():
    rows = [{"messages": [{"role": "user", "content": "Hi"}]}]
    with pytest.raises(ValueError, match="nothing is supervised.*nothing in it is learnt"):
        make(rows)
    rows = [{"messages": [{"role": "user", "content": "Hi"},
                          {"role": "assistant", "content": "a", "weight": 0}]}]  # fmt: skip
    with pytest.raises(ValueError, match="1 x nothing in it is learnt"):
        make(rows)


def test_bad_rows_raise_or_are_counted(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = [json.dumps(alpaca(0)), "{oops", json.dumps({"instruction": "a", "output": 3}), "7",
             json.dumps({"instruction": "a", "output": " "}), json.dumps(alpaca(1))]  # fmt: skip
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not valid JSON.*on_bad_row='skip'"):
        make(str(file))
    ledger = make(str(file), on_bad_row="skip").ledger
    assert (ledger.rows_read, ledger.rows_kept) == (6, 2)
    assert ledger.skipped["bad row"].count == 3
    assert ledger.skipped["bad row"].examples[1] == (
        f"{file}:3: 'output' is 3, not text; keys found: instruction, output"
    )
    assert ledger.skipped["an assistant message is empty"].count == 1


def test_a_file_of_which_no_row_can_be_read(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("{oops")
    with pytest.raises(ValueError, match=r"none of the first 1 rows can be read.*a\.json:1"):
        make(str(file), on_bad_row="skip")


def own_map_fn(row, prefix=""):
    return {"messages": [{"role": "user", "content": prefix + row["q"]},
                         {"role": "assistant", "content": row["a"]}]}  # fmt: skip


def test_a_map_function_of_ones_own():
    rows = [{"q": "a", "a": "b"}]
    plain = make(rows, map_fn=own_map_fn)[0]["input_ids"].tolist()
    prefixed = make(rows, map_fn=dict(type=own_map_fn, prefix="x"))[0]["input_ids"].tolist()
    assert len(prefixed) == len(plain) + 1
    with pytest.raises(ValueError, match="rows:1: map function own_map_fn raised KeyError: 'q'"):
        make([{"a": "b"}], map_fn=own_map_fn)
    with pytest.raises(ValueError, match=r"KeyError: 'q' .*test_dataset.py:\d+ in own_map_fn: "):
        make([{"a": "b"}], map_fn=dict(type=own_map_fn, prefix="x"))
    with pytest.raises(ValueError, match="returned 'b'; it must return"):
        make(rows, map_fn=lambda row: row["a"])
    with pytest.raises(TypeError, match="map_fn=3 cannot be called"):
        make(rows, map_fn=3)
    with pytest.raises(KeyError, match="unknown map function 'alpca'.*did you mean 'alpaca'"):
        make(rows, map_fn="alpca")


def test_text_data():
    tokenizer = tiny_tokenizer(None)  # no chat template is needed
    rows = [{"text": "one two three four " * 3}, {"text": " "}, {"text": "five"}]
    dataset = TextDataset(rows, tokenizer=tokenizer, max_length=16)
    assert dataset.lengths[:-1].tolist() == [16] * (len(dataset) - 1)
    flat = np.concatenate([s["input_ids"] for s in dataset])
    eos = tokenizer.eos_token
    assert tokenizer.decode(flat) == rows[0]["text"] + eos + "five" + eos
    # Every token is learnt but the first of each of the pieces.
    pieces = sum(len(s["lengths"]) for s in dataset)
    labels = np.concatenate([s["labels"] for s in dataset])
    assert (labels != IGNORE_INDEX).sum() == len(flat) - pieces
    assert dataset.ledger.tokens_supervised == len(flat) - pieces
    assert dataset.ledger.skipped["the text is empty"].count == 1
    assert dataset.ledger.rows_eos_learnt == 2


def test_text_under_another_key_needs_no_chat_template():
    options = dict(tokenizer=tiny_tokenizer(None), max_length=16)
    dataset = TextDataset([{"body": "one"}], map_fn=lambda row: {"text": row["body"]}, **options)
    assert dataset.num_rows == 1
    with pytest.raises(ValueError, match="takes plain text only"):
        TextDataset([{"q": "a", "a": "b"}], map_fn=own_map_fn, **options)


def test_text_is_recognised_too():
    dataset = make([{"text": "one two"}])
    assert (dataset[0]["labels"] != IGNORE_INDEX).sum() == len(dataset[0]["labels"]) - 1


def test_weights():
    rows = [
        {"messages": [{"role": "user", "content": "a"},
                      {"role": "assistant", "content": "b", "loss": 0.5}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]  # fmt: skip
    sample = make(rows)[0]
    learnt = sample["labels"] != IGNORE_INDEX
    assert sample["loss_weights"].dtype == np.float32
    assert sample["loss_weights"][learnt].tolist() == [0.5, 0.5, 1.0, 1.0]  # "b", <|im_end|>


def test_a_template_that_cannot_be_proved_names_the_row():
    tokenizer = tiny_tokenizer("{{ messages | length }}{% for m in messages %}{{ m.content }}"
                               "{% endfor %}")  # fmt: skip
    rows = [{"instruction": "a", "output": "b"}]
    with pytest.raises(TemplateError, match="rows:1: the chat template's mask cannot be proved"):
        ChatDataset(rows, tokenizer=tokenizer, max_length=64)


def test_rows_read_to_recognise_the_format_are_not_lost():
    rows = [alpaca(n) for n in range(NUM_LOOKED_AT + 5)]
    assert make(rows).num_rows == NUM_LOOKED_AT + 5
    assert make(rows, limit=7).num_rows == 7


def test_chunks_do_not_change_anything(monkeypatch):
    rows = [alpaca(n) for n in range(50)]
    whole = make(rows)
    monkeypatch.setattr("xtuner_lite.data.parallel.CHUNK_ROWS", 7)
    chunked = make(rows)
    for one, two in zip(whole, chunked, strict=True):
        assert one["input_ids"].tolist() == two["input_ids"].tolist()
        assert one["row_ids"] == two["row_ids"]
    assert whole.ledger == chunked.ledger


def test_text_and_chats_in_one_data_set_stay_in_order():
    def either(row):
        return row if "text" in row else own_map_fn(row)

    rows = [{"text": "one"}, {"q": "a", "a": "b"}, {"text": "two"}]
    dataset = make(rows, map_fn=either, packing="none")
    assert [s["row_ids"] for s in dataset] == [["rows:1"], ["rows:2"], ["rows:3"]]
    assert len(dataset[1]["input_ids"]) > len(dataset[0]["input_ids"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(packing="tight"), "packing='tight' is unknown"),
        (dict(max_length=None), "packing='best_fit' needs max_length"),
        (dict(max_length=1), "max_length=1 is too small; at least 2"),
        (dict(overlong="cut"), "overlong='cut' is unknown; allowed: 'truncate', 'truncate_left"),
        (dict(train_on="x"), "train_on='x' is unknown"),
        (dict(on_bad_row="x"), "on_bad_row='x' is unknown; allowed: 'raise', 'skip'"),
        (dict(num_proc=0), "num_proc=0 is too small"),
        (dict(limit=0), "limit=0 is too small"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        make([alpaca(0)], **options)


def test_an_index_out_of_range():
    dataset = make([alpaca(0)])
    assert dataset[-1]["row_ids"] == ["rows:1"]
    with pytest.raises(IndexError, match="sample 1 of rows, which has 1"):
        dataset[1]


def shared(name: str) -> str:
    if not (SHARED / name).is_file():
        pytest.skip("the shared data folder is not beside this checkout")
    return str(SHARED / name)


@pytest.mark.parametrize("max_length", [512, 1024, 2048])
def test_alpaca_file_packs_to_97_percent(max_length):
    dataset = make(shared("sft/alpaca_en.json"), max_length=max_length)
    assert dataset.ledger.rows_read == 999
    assert dataset.ledger.fill >= 0.97


def test_tool_file():
    tokenizer = apply_template(tiny_tokenizer(None), "chatml")
    dataset = ChatDataset(shared("tools/glaive_en.json"), tokenizer=tokenizer, max_length=100_000)
    # 300 rows; 746 answers and 211 calls in them are each learnt with their <|im_end|>.
    assert dataset.ledger.rows_kept == dataset.ledger.rows_eos_learnt == 300
    ends = sum((s["labels"] == tokenizer.eos_token_id).sum() for s in dataset)
    assert ends == 746 + 211


def test_text_file():
    dataset = TextDataset(shared("pretrain/c4.jsonl"), tokenizer=tiny_tokenizer(), max_length=512)
    assert dataset.ledger.rows_kept == 300
    assert dataset.ledger.fill > 0.99


def test_the_encoder_of_plain_text_refuses_conversations():
    encoder = RowEncoder(template=None, encode_text=lambda texts: [], map_fn=own_map_fn)
    from xtuner_lite.data.sources import Row

    with pytest.raises(ValueError, match="takes plain text only"):
        encoder.encode([Row("rows", 1, {"q": "a", "a": "b"})])


def test_the_fingerprint_is_that_of_the_tokens_and_their_mask():
    def fingerprint(answer, **options):
        row = {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        }
        return ChatDataset([row], tokenizer=tiny_tokenizer(), max_length=64, **options).fingerprint

    assert fingerprint("b") == fingerprint("b")
    assert fingerprint("b") != fingerprint("c")
    assert fingerprint("b") != fingerprint("b", train_on="all")


def test_thinking_is_read_not_learnt_and_counted():
    thought = {"role": "assistant", "content": "Hello", "reasoning_content": "They greet."}
    rows = [{"messages": [{"role": "user", "content": "Hi"}, thought]}]
    tokenizer = tiny_tokenizer()
    dropped = ChatDataset(rows, tokenizer=tokenizer, packing="none")
    assert (dropped.ledger.rows_with_thinking, dropped.ledger.rows_thinking_unwritten) == (1, 1)
    assert "rows with thinking" in dropped.ledger.report()
    written = {}
    for train_thinking in (False, True):
        dataset = ChatDataset(
            rows, tokenizer=tokenizer, packing="none", template="chatml",
            train_thinking=train_thinking,
        )  # fmt: skip
        assert dataset.ledger.rows_thinking_unwritten == 0
        labels = dataset[0]["labels"]
        written[train_thinking] = tokenizer.decode(labels[labels != -100])
    assert written == {
        False: "<think>\n\n</think>\n\nHello<|im_end|>",
        True: "<think>\nThey greet.\n</think>\n\nHello<|im_end|>",
    }


def test_the_map_functions_older_name_is_understood_alone():
    rows = [{"instruction": "a", "output": "b"}]
    options = dict(tokenizer=tiny_tokenizer(), max_length=64)
    by_name = ChatDataset(rows, dataset_map_fn="alpaca", **options)
    assert by_name.fingerprint == ChatDataset(rows, map_fn="alpaca", **options).fingerprint
    with pytest.raises(ValueError, match="two names of one option"):
        ChatDataset(rows, map_fn="alpaca", dataset_map_fn="auto", **options)
