"""A server in a thread of the test's process, on a free port."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai

from xtuner_lite.chat.listening import open_socket
from xtuner_lite.chat.server.app import build_app
from xtuner_lite.chat.server.model import ServedModel
from xtuner_lite.chat.server.replies import ReplyLine
from xtuner_lite.chat.server.run import Server

USER = [{"role": "user", "content": "Hello"}]


@dataclass
class Running:
    """A server that runs: its address, its parts, and OpenAI's client for it."""

    port: int
    line: ReplyLine
    server: Server
    thread: threading.Thread
    api_key: str = "anything"

    def client(self, **options: Any) -> openai.OpenAI:
        options = {"api_key": self.api_key, "max_retries": 0, "timeout": 30, **options}
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", **options)

    def create(self, messages: Any = USER, **options: Any) -> Any:
        """A chat completion, greedy."""
        options = {"model": "tiny", "temperature": 0, **options}
        return self.client().chat.completions.create(messages=messages, **options)

    def send(self, request: bytes) -> bytes:
        """What the server answers to these bytes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))


@contextmanager
def serving(model, tokenizer, *, max_waiting: int = 8, **options: Any) -> Iterator[Running]:
    """Serves a model as 'tiny' inside the block."""
    opened = open_socket("127.0.0.1", 0)
    line = ReplyLine(model, tokenizer, max_waiting=max_waiting)
    server = Server(build_app(ServedModel(model, tokenizer, "tiny"), line, **options), line)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
    port = opened.getsockname()[1]
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield Running(port, line, server, thread, options.get("api_key") or "anything")
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def slow_steps(model, seconds: float = 0.01) -> Iterator[list[int]]:
    """Makes each of a model's steps slow; the list grows by one number a step."""
    steps: list[int] = []

    def hook(*args: Any) -> None:
        steps.append(len(steps))
        time.sleep(seconds)

    handle = model.register_forward_hook(hook)
    try:
        yield steps
    finally:
        handle.remove()


def wait_until(condition, seconds: float = 20) -> None:
    """Waits for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)
