"""The preview shows what is learnt, with and without colour."""

import numpy as np

from tests.tiny import tiny_tokenizer
from xtuner_lite.data.dataset import ChatDataset
from xtuner_lite.data.preview import render_preview

ROWS = [
    {"instruction": "Who are you?", "output": "A cat."},
    {"instruction": "Hi", "output": "Hello"},
]


def sample_and_tokenizer():
    tokenizer = tiny_tokenizer()
    return ChatDataset(ROWS, tokenizer=tokenizer, max_length=100)[0], tokenizer


def test_without_colour():
    sample, tokenizer = sample_and_tokenizer()
    text = render_preview(sample, tokenizer, color=False)
    learnt = int((sample["labels"] != -100).sum())
    total = len(sample["input_ids"])
    assert text.startswith(f"{total} tokens, {learnt} learnt ({learnt / total:.0%}), 2 segment(s)")
    assert "--- segment 2/2: rows:2, " in text
    assert (
        "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n[[A cat.<|im_end|>]]\n"
    ) in text


def test_with_colour_and_cut_short():
    sample, tokenizer = sample_and_tokenizer()
    text = render_preview(sample, tokenizer)
    assert "\033[1;32mA cat.<|im_end|>\033[0m" in text
    text = render_preview(sample, tokenizer, color=False, max_tokens=4)
    assert text.endswith(f"... {len(sample['input_ids']) - 4} more tokens")
    assert "segment 2/2" not in text


def test_data_cannot_steer_the_terminal():
    tokenizer = tiny_tokenizer()
    ids = np.array(tokenizer("a\x1b[2Jb")["input_ids"])
    sample = dict(input_ids=ids, labels=ids, lengths=[len(ids)], row_ids=["x:1"])
    assert "\x1b" not in render_preview(sample, tokenizer, color=False)
