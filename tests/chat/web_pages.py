"""Pages for the tests: served in a thread, answered by a tiny model or by a parrot."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig

from tests.tiny import tiny_llama, tiny_tokenizer
from xtuner_lite.chat.listening import local_hosts
from xtuner_lite.chat.web.answerer import Answerer
from xtuner_lite.chat.web.page import ChatPage, PageOptions
from xtuner_lite.chat.web.server import build_app, build_server, listen
from xtuner_lite.models.adapters import add_adapter

TOKENIZER = tiny_tokenizer()


class Parrot(Answerer):
    """Repeats the question word by word, with the number of questions so far in front.

    The base side says so. A question with 'fail' in it fails.
    """

    def __init__(self, *, pause_s: float = 0.02) -> None:
        super().__init__(adapted_llama(), TOKENIZER)
        self.pause_s = pause_s

    def stream(self, messages, sampling, *, side="model", stats=None) -> Iterator[str]:
        count = sum(message["role"] == "user" for message in messages)
        if "fail" in messages[-1]["content"]:
            raise ValueError("the conversation has 900 tokens and the model sees 512 at once")
        yield f"{'base ' if side == 'base' else ''}{count}:"
        for word in messages[-1]["content"].split(" "):
            time.sleep(self.pause_s)
            yield f" {word}"


def adapted_llama():
    """A tiny random model with a random adapter, which changes what it says."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = add_adapter(tiny_llama(), config, for_training=False)
    return model.eval().requires_grad_(False)


@contextmanager
def served(
    answerer: Answerer, *, password: str | None = None, **options: object
) -> Iterator[tuple[str, ChatPage]]:
    """(address, page) of a page that runs until the block ends."""
    page = ChatPage(answerer, PageOptions(bot_name="Parrot", **options))
    listening = listen("127.0.0.1", None)
    hosts = None if password else local_hosts("127.0.0.1")
    server = build_server(build_app(page, password=password, hosts=hosts))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", page
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listening.close()
