"""Cutting and splitting rows: no learnt token lost unseen, none learnt twice."""

import numpy as np
import pytest

from tests.tiny import tiny_tokenizer
from xtuner_lite.data.dataset import ChatDataset, TextDataset
from xtuner_lite.data.overlong import keep_beginning, keep_end, split_exchanges, split_tokens
from xtuner_lite.structures import IGNORE_INDEX
from xtuner_lite.templates import ChatTemplate, apply_template
from xtuner_lite.templates.tokenise import Encoded

BOS = 99


def row(*learnt: int, size: int = 10, bos: bool = False, weights=None) -> Encoded:
    """Tokens 0, 1, 2, ... (or BOS, 1, 2, ...), learnt where named."""
    ids = np.arange(size, dtype=np.int32)
    if bos:
        ids[0] = BOS
    mask = np.zeros(size, dtype=bool)
    mask[list(learnt)] = True
    return Encoded(ids, mask, weights, eos_learnt=True)


def shown(piece: Encoded) -> tuple[list[int], list[int]]:
    """(ids, ids of the learnt ones)."""
    return piece.input_ids.tolist(), piece.input_ids[piece.learnt].tolist()


def test_keep_beginning_by_hand():
    piece = keep_beginning(row(2, 3, 8), 4)
    assert shown(piece) == ([0, 1, 2, 3], [2, 3])
    assert not piece.eos_learnt
    assert keep_beginning(row(2, 3), 4).eos_learnt  # nothing learnt was cut off


def test_keep_end_by_hand():
    # The first token that is left has nothing before it to predict it from.
    assert shown(keep_end(row(6, 7, 8), 4)) == ([6, 7, 8, 9], [7, 8])
    assert shown(keep_end(row(6, 7, 8, bos=True), 4, BOS)) == ([BOS, 7, 8, 9], [8])
    assert shown(keep_end(row(8, bos=True), 4)) == ([6, 7, 8, 9], [8])


def test_windows_by_hand():
    # Prompt 0-1, answer 2-9, windows of 5 with 2 tokens of context.
    windows = split_tokens(row(*range(2, 10)), 5, context=2)
    assert [shown(w) for w in windows] == [
        ([0, 1, 2, 3, 4], [2, 3, 4]),
        ([3, 4, 5, 6, 7], [5, 6, 7]),
        ([5, 6, 7, 8, 9], [8, 9]),  # nothing follows: the room goes to context
    ]


def test_windows_behind_bos_by_hand():
    windows = split_tokens(row(*range(2, 10), bos=True), 5, context=2, bos_token_id=BOS)
    assert [shown(w) for w in windows] == [
        ([BOS, 1, 2, 3], [2, 3]),
        ([BOS, 2, 3, 4, 5], [4, 5]),
        ([BOS, 4, 5, 6, 7], [6, 7]),
        ([BOS, 6, 7, 8, 9], [8, 9]),
    ]


def test_a_prompt_longer_than_a_window_keeps_its_end():
    windows = split_tokens(row(8, 9), 5, context=2)
    assert [shown(w) for w in windows] == [([5, 6, 7, 8, 9], [8, 9])]


def test_windows_at_random_learn_each_token_once():
    rng = np.random.default_rng(0)
    for _ in range(500):
        size = int(rng.integers(3, 80))
        learnt = np.flatnonzero(rng.random(size) < rng.random())
        learnt = learnt[learnt > 0]
        if not len(learnt):
            continue
        bos = bool(rng.integers(2))
        weights = rng.random(size).astype(np.float32)
        whole = row(*learnt, size=size, bos=bos, weights=weights)
        limit, context = int(rng.integers(3, size + 2)), int(rng.integers(0, 10))
        windows = split_tokens(whole, limit, context=context, bos_token_id=BOS)
        taught = np.concatenate([w.input_ids[w.learnt] for w in windows])
        assert taught.tolist() == learnt.tolist()
        kept_weights = np.concatenate([w.weights[w.learnt] for w in windows])
        assert kept_weights.tolist() == weights[learnt].tolist()
        for window in windows:
            assert len(window) <= limit
            assert not window.learnt[0]
            ids = window.input_ids[1:] if bos else window.input_ids
            assert (np.diff(ids) == 1).all(), "a window is a stretch of the row"
            if bos:
                assert window.input_ids[0] == BOS


def chat(num_exchanges: int, words: int = 6, system: bool = True) -> list[dict]:
    messages = [{"role": "system", "content": "Be brief."}] if system else []
    for n in range(num_exchanges):
        messages.append({"role": "user", "content": f"Question {n}?"})
        messages.append({"role": "assistant", "content": f"{n} " * words})
    return messages


def split(messages, limit, tokenizer=None, **options):
    template = ChatTemplate(tokenizer or tiny_tokenizer())
    whole = template.encode(messages, options.get("tools"), options.get("train_on", "assistant"))
    options = {"tools": None, "train_on": "assistant", **options}
    return whole, split_exchanges(template, messages, whole=whole, limit=limit, **options)


def test_exchanges_become_conversations_of_their_own():
    tokenizer = tiny_tokenizer()
    template = ChatTemplate(tokenizer)
    messages = chat(6)
    length = [len(template.encode(messages[: 1 + 2 * n])) for n in range(1, 7)]
    limit = length[1]  # the system prompt and two exchanges
    whole, pieces = split(messages, limit, tokenizer)
    assert len(whole) > 2 * limit
    texts = [tokenizer.decode(piece.input_ids) for piece in pieces]
    begin = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQuestion "
    assert [text.startswith(begin) for text in texts] == [True] * len(pieces)
    assert all(len(piece) <= limit for piece in pieces)
    assert all(piece.eos_learnt for piece in pieces)
    learnt = [tokenizer.decode(p.input_ids[p.learnt]) for p in pieces]
    assert learnt == [f"{'0 ' * 6}<|im_end|>{'1 ' * 6}<|im_end|>"] + [
        f"{n} " * 6 + "<|im_end|>" + f"{n + 1} " * 6 + "<|im_end|>" for n in (2, 4)
    ]


def test_earlier_exchanges_are_context_and_not_learnt():
    tokenizer = tiny_tokenizer()
    messages = chat(8, words=1)
    one = len(ChatTemplate(tokenizer).encode(messages[:3]))
    whole, pieces = split(messages, 4 * one, tokenizer)
    assert 1 < len(pieces) < 8
    second = tokenizer.decode(pieces[1].input_ids)
    questions = [n for n in range(8) if f"Question {n}?" in second]
    learnt = tokenizer.decode(pieces[1].input_ids[pieces[1].learnt])
    answers = [n for n in range(8) if f"{n} <|im_end|>" in learnt]
    assert questions[0] < answers[0], "an exchange before it stands there as context"
    assert questions[-len(answers) :] == answers


@pytest.mark.parametrize("train_on", ["assistant", "last"])
@pytest.mark.parametrize("limit", [24, 40, 64, 100])
def test_split_exchanges_at_random_learn_each_answer_once(train_on, limit):
    rng = np.random.default_rng(limit)
    for _ in range(12):
        messages = chat(int(rng.integers(2, 9)), int(rng.integers(1, 12)), bool(rng.integers(2)))
        if rng.integers(2):
            messages[-3]["loss"] = 0.5
        whole, pieces = split(messages, limit, train_on=train_on)
        if len(whole) <= limit or pieces is None:
            continue
        assert all(len(piece) <= limit for piece in pieces)
        taught = np.concatenate([piece.input_ids[piece.learnt] for piece in pieces])
        assert taught.tolist() == whole.input_ids[whole.learnt].tolist()


def test_a_conversation_of_one_exchange_is_left_to_windows():
    assert split(chat(1, words=100), 50)[1] is None
    assert split(chat(5), 50, train_on="all")[1] is None


def test_a_template_that_writes_a_piece_otherwise_is_left_to_windows():
    # Answers carry the number of messages before them: a piece would teach another number.
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{{ loop.index0 }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    messages = chat(6)
    assert split(messages, 60, tokenizer)[1] is None
    dataset = ChatDataset(
        [{"messages": messages}], tokenizer=tokenizer, max_length=60, overlong="split"
    )
    assert dataset.ledger.supervised_truncated == 0
    assert dataset.ledger.rows_split == 1


def test_tools_stand_in_every_piece():
    tokenizer = apply_template(tiny_tokenizer(None), "chatml")
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    whole, pieces = split(chat(40), 900, tokenizer, tools=tools)
    assert len(pieces) > 1
    assert all("weather" in tokenizer.decode(piece.input_ids) for piece in pieces)


def rows(*conversations):
    return [{"messages": messages} for messages in conversations]


def learnt_of(dataset) -> list[int]:
    return sorted(
        int(i) for s in dataset for i in s["labels"][s["labels"] != IGNORE_INDEX].tolist()
    )


def test_a_data_set_that_splits_learns_what_an_unlimited_one_does():
    data = rows(chat(9), chat(1, words=150), chat(1), chat(4, words=40, system=False))
    options = dict(tokenizer=tiny_tokenizer(), map_fn="openai")
    unlimited = ChatDataset(data, max_length=None, packing="none", **options)
    dataset = ChatDataset(data, max_length=64, overlong="split", **options)
    assert learnt_of(dataset) == learnt_of(unlimited)
    ledger = dataset.ledger
    assert (ledger.rows_kept, ledger.rows_split, ledger.rows_truncated) == (4, 3, 0)
    assert dataset.num_rows == 4
    assert ledger.supervised_truncated == 0
    assert ledger.rows_eos_learnt == 4
    assert ledger.tokens_repeated > 0
    assert (dataset.lengths <= 64).all()
    assert {r for s in dataset for r in s["row_ids"]} == {f"rows:{n}" for n in range(1, 5)}


def test_truncate_left_keeps_the_answer():
    data = [{"messages": [{"role": "user", "content": "why " * 200},
                          {"role": "assistant", "content": "so"}]}]  # fmt: skip
    options = dict(tokenizer=tiny_tokenizer(), map_fn="openai", max_length=32)
    dataset = ChatDataset(data, overlong="truncate_left", **options)
    assert dataset.ledger.rows_truncated == dataset.ledger.rows_eos_learnt == 1
    assert dataset.ledger.supervised_truncated == 0
    data[0]["messages"].append({"role": "user", "content": "why " * 200})
    message = "1 x nothing learnt is left within max_length .*tokens stand behind the last learnt"
    with pytest.raises(ValueError, match=message):
        ChatDataset(data, overlong="truncate_left", **options)


def test_long_texts_are_split_without_losing_a_token():
    data = [{"text": "one two three four five " * 20}, {"text": "six"}]
    tokenizer = tiny_tokenizer(None)
    options = dict(tokenizer=tokenizer, max_length=16, packing="best_fit")
    dataset = TextDataset(data, overlong="split", **options)
    whole = TextDataset(data, tokenizer=tokenizer, max_length=None, packing="none")
    assert learnt_of(dataset) == learnt_of(whole)
    # Each later piece repeats one token, to predict its first one from.
    pieces = sum(len(s["lengths"]) for s in dataset)
    assert dataset.ledger.tokens_repeated <= pieces - 2 + 16
    with pytest.raises(ValueError, match=r"max_length is 16. Raise max_length, or set overlong='s"):
        TextDataset(data, overlong="raise", **options)
