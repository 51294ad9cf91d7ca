import sys
from types import SimpleNamespace

import numpy as np
import torch

from tests.tiny import tiny_tokenizer
from xtuner_lite.data.collate import packed_collate
from xtuner_lite.engine.hooks.dataset_preview_hook import DatasetPreviewHook, first_sample


def sample(tokenizer, *texts):
    """A packed sample of 'ask|answer' texts; the answers are learnt."""
    ids, labels, lengths = [], [], []
    for text in texts:
        ask, answer = (tokenizer(part)["input_ids"] for part in text.split("|"))
        ids += ask + answer
        labels += [-100] * len(ask) + answer
        lengths.append(len(ask) + len(answer))
    return {
        "input_ids": np.array(ids),
        "labels": np.array(labels),
        "lengths": lengths,
        "row_ids": [f"a.json:{n + 1}" for n in range(len(texts))],
    }


def show(tmp_path, monkeypatch, is_terminal):
    tokenizer = tiny_tokenizer()
    first = sample(tokenizer, "Who are you?|a small helper", "two plus two|four")
    longer = sample(tokenizer, "Tell me a short story|" + "about a cat " * 20)
    batch = packed_collate([first, longer], pad_token_id=0)
    logged = []
    runner = SimpleNamespace(
        rank=0,
        tokenizer=tokenizer,
        work_dir=str(tmp_path),
        logger=SimpleNamespace(info=logged.append),
    )
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    hook = DatasetPreviewHook()
    for _ in range(2):
        hook.before_train_iter(runner, 0, [batch])
    assert len(logged) == 1  # the first step only
    return first, batch, logged[0]


def test_the_log_and_the_file_mark_what_is_learnt(tmp_path, monkeypatch, capsys):
    first, batch, logged = show(tmp_path, monkeypatch, is_terminal=False)
    assert "Who are you?[[a small helper]]" in logged
    assert "a.json:2" in logged
    assert "\x1b" not in logged
    assert "two plus two[[four]]" in (tmp_path / "dataset_preview.txt").read_text()
    assert capsys.readouterr().out == ""
    # Read back from the padded batch, the sample is what the data set gave.
    again = first_sample(batch)
    assert again["lengths"] == first["lengths"]
    assert again["row_ids"] == first["row_ids"]
    np.testing.assert_array_equal(again["input_ids"], first["input_ids"])
    np.testing.assert_array_equal(again["labels"], first["labels"])


def test_a_terminal_gets_colours_and_the_log_does_not(tmp_path, monkeypatch, capsys):
    _, _, logged = show(tmp_path, monkeypatch, is_terminal=True)
    assert "\x1b[1;32ma small helper\x1b[0m" in capsys.readouterr().out
    assert "\x1b" not in logged
    assert "\x1b" not in (tmp_path / "dataset_preview.txt").read_text()


def test_other_batches_are_no_error(tmp_path):
    logged = []
    runner = SimpleNamespace(
        rank=0, tokenizer=None, work_dir=str(tmp_path), logger=SimpleNamespace(info=logged.append)
    )
    DatasetPreviewHook().before_train_iter(runner, 0, [{"x": torch.zeros(1)}])
    assert logged == ["no preview: the run has no tokenizer, or its batches no input_ids"]
    assert list(tmp_path.iterdir()) == []
