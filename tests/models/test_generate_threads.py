"""Several threads on one model: one reply at a time, each as if it were alone."""

import threading
import time

import pytest
import torch

from tests.tiny import tiny_llama, tiny_tokenizer
from xtuner_lite.models.generate import generate_reply, stream_reply
from xtuner_lite.models.sampling import ReplyStats
from xtuner_lite.models.turns import GaveUpWaiting, Turns, turns_of

TOKENIZER = tiny_tokenizer()


def asked(number):
    return [{"role": "user", "content": f"Question {number}"}]


def in_threads(*functions):
    """What each function returned; they start at the same time."""
    results, barrier = [None] * len(functions), threading.Barrier(len(functions))

    def work(index):
        barrier.wait()
        results[index] = functions[index]()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_streams_of_several_threads_do_not_mix():
    model = tiny_llama()
    model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    own = model.generation_config
    options = [
        {"max_new_tokens": 12 + number, "temperature": number % 3, "seed": number}
        for number in range(6)
    ]

    def reply(number):
        return list(stream_reply(model, TOKENIZER, asked(number), **options[number]))

    alone = [reply(number) for number in range(6)]
    assert len({"".join(pieces) for pieces in alone}) == 6
    state = torch.get_rng_state()
    together = in_threads(*(lambda number=number: reply(number) for number in range(6)))
    assert together == alone
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is own
    assert [module.training for module in model.modules()] == modes


def test_replies_without_a_seed_differ():
    model = tiny_llama()
    options = {"temperature": 3.0, "max_new_tokens": 16}
    assert len({generate_reply(model, TOKENIZER, asked(1), **options) for _ in range(3)}) == 3


def test_a_waiting_stream_can_be_closed():
    model = tiny_llama()
    first = stream_reply(model, TOKENIZER, asked(1), max_new_tokens=400)
    next(first)
    stats, should_stop = ReplyStats(), threading.Event()

    def wait():
        return generate_reply(
            model, TOKENIZER, asked(2), should_stop=should_stop, stats=stats, max_new_tokens=3
        )

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive()
    should_stop.set()
    waiting.join(5)
    assert not waiting.is_alive()
    assert (stats.finish_reason, stats.completion_tokens) == ("cancelled", 0)
    first.close()
    assert generate_reply(model, TOKENIZER, asked(2), max_new_tokens=3)


def test_a_failure_gives_the_turn_back(monkeypatch):
    model = tiny_llama()
    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", lambda **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate_reply(model, TOKENIZER, asked(1))
    assert generate_reply(model, TOKENIZER, asked(1), max_new_tokens=2)


def test_turns_come_in_the_order_of_arrival():
    turns, order = Turns(), []

    def work(number):
        with turns.taken():
            order.append(number)

    with turns.taken():
        threads = []
        for number in range(5):
            threads.append(threading.Thread(target=work, args=(number,)))
            threads[-1].start()
            while len(turns._queue) < number + 2:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4]


def test_waiting_is_given_up():
    turns, stop = Turns(), threading.Event()
    stop.set()
    with turns.taken(), pytest.raises(GaveUpWaiting), turns.taken(stop):
        pass
    with turns.taken(stop):  # nobody is ahead: no waiting
        assert len(turns._queue) == 1


def test_each_model_has_turns_of_its_own():
    model, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    assert turns_of(model) is turns_of(model)
    assert turns_of(model) is not turns_of(other)
