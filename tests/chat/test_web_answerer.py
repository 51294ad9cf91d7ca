"""One model for many: the adapter is off for exactly the answers of the base model."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from peft import LoraConfig

from tests.tiny import tiny_llama, tiny_speaker, tiny_tokenizer
from xtuner_lite.models.adapters import add_adapter
from xtuner_lite.models.generate import generate_reply
from xtuner_lite.models.sampling import ReplyStats, Sampling

pytest.importorskip("gradio", reason="the page needs: pip install gradio")

from tests.chat.web_pages import adapted_llama
from xtuner_lite.chat.web.answerer import Answerer

TOKENIZER = tiny_tokenizer()
SAMPLING = Sampling(max_new_tokens=8)


def asked(text):
    return [{"role": "user", "content": text}]


def test_many_threads_get_the_answers_of_their_own_side():
    questions = [f"{word} two" for word in ("one", "three", "four", "five")]
    base, adapted = tiny_llama().eval(), adapted_llama()
    right = {
        (side, text): generate_reply(model, TOKENIZER, asked(text), max_new_tokens=8)
        for side, model in (("base", base), ("model", adapted))
        for text in questions
    }
    assert all(right["base", text] != right["model", text] for text in questions)
    answerer = Answerer(adapted_llama(), TOKENIZER)

    def answer(key):
        return "".join(answerer.stream(asked(key[1]), SAMPLING, side=key[0]))

    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            assert dict(zip(right, pool.map(answer, right))) == right
    assert answerer.num_asking == 0


def test_an_abandoned_answer_of_the_base_leaves_the_adapter_on():
    answerer = Answerer(adapted_llama(), TOKENIZER)
    expected = "".join(answerer.stream(asked("one"), SAMPLING))
    for _ in range(3):
        pieces = answerer.stream(asked("one"), Sampling(max_new_tokens=200), side="base")
        next(piece for piece in pieces if piece)
        pieces.close()
    assert "".join(answerer.stream(asked("one"), SAMPLING)) == expected


def test_who_leaves_the_line_is_not_answered():
    model, gate = tiny_speaker(TOKENIZER, "Hi!"), threading.Event()
    model.register_forward_pre_hook(lambda *_: gate.wait(10) and None)
    answerer = Answerer(model, TOKENIZER)
    first = answerer.stream(asked("one"), SAMPLING)
    assert next(first) == ""  # nothing yet, but a chance to leave
    stats = ReplyStats()
    second = answerer.stream(asked("two"), SAMPLING, stats=stats)
    assert next(second) == ""
    assert answerer.num_asking == 2
    second.close()
    gate.set()
    assert "".join(first) == "Hi!"
    assert "".join(answerer.stream(asked("three"), SAMPLING)) == "Hi!"
    assert stats.completion_tokens == 0


def test_closing_ends_the_answers_that_come_and_those_that_wait():
    model, gate = tiny_speaker(TOKENIZER, "Hi!"), threading.Event()
    model.register_forward_pre_hook(lambda *_: gate.wait(10) and None)
    answerer = Answerer(model, TOKENIZER)
    readers = [answerer.stream(asked(text), SAMPLING) for text in ("one", "two")]
    assert [next(reader) for reader in readers] == ["", ""]
    threading.Timer(0.2, gate.set).start()
    answerer.close()
    assert answerer.num_asking == 0
    came, waited = ("".join(reader) for reader in readers)
    assert "Hi!".startswith(came)
    assert came != "Hi!"
    assert waited == ""


def test_a_failure_is_raised_where_the_answer_is_read():
    answerer = Answerer(tiny_llama(max_position_embeddings=16).eval(), TOKENIZER)
    with pytest.raises(ValueError, match="sees 16 at once"):
        list(answerer.stream(asked("one two " * 20), SAMPLING))
    assert answerer.num_asking == 0


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, None),
        ({"use_dora": True}, None),
        ({"init_lora_weights": "pissa"}, "starts from 'pissa', which takes weights out"),
        ({"init_lora_weights": "olora"}, "starts from 'olora'"),
        ({"bias": "lora_only"}, "trains biases of the base model"),
    ],
)
def test_a_base_that_is_not_there_is_not_offered(config, why):
    model = add_adapter(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], **config))
    answerer = Answerer(model.eval(), TOKENIZER)
    assert answerer.has_base is (why is None)
    if why is not None:
        with pytest.raises(ValueError, match=why):
            next(answerer.stream(asked("one"), SAMPLING, side="base"))


def test_a_model_without_adapter_has_no_base_beside_it():
    answerer = Answerer(tiny_llama().eval(), TOKENIZER)
    assert not answerer.has_base
    with pytest.raises(ValueError, match="no adapter to switch off"):
        next(answerer.stream(asked("one"), SAMPLING, side="base"))
