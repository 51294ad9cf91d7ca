"""The server as OpenAI's own client sees it: answers, streams, errors, cancelling, its end."""

import json
import threading

import openai
import pytest

from tests.chat.serving import USER, serving, slow_steps, wait_until
from tests.tiny import tiny_llama, tiny_speaker, tiny_tokenizer
from xtuner_lite.models.generate import generate_reply
from xtuner_lite.models.turns import turns_of
from xtuner_lite.templates import ChatTemplate

TOKENIZER = tiny_tokenizer()
PROMPT_TOKENS = len(ChatTemplate(TOKENIZER).prompt_ids(USER))


@pytest.fixture(scope="module")
def server():
    """A model that says 'Hi!', and how many tokens that is: H, i, ! and the end of the turn."""
    with serving(tiny_speaker(TOKENIZER, "Hi!"), TOKENIZER, max_request_bytes=20_000) as running:
        yield running


@pytest.fixture(scope="module")
def babbler():
    """A model whose reply fills its context of 512 tokens; one request may wait."""
    model = tiny_llama(eos_token_id=None).eval()
    with serving(model, TOKENIZER, max_waiting=1) as running:
        yield running


# ------------------------------------------------------------------------------------- answers


def test_a_whole_answer(server):
    answer = server.create()
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == "Hi!"
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"
    assert answer.model == "tiny"
    assert answer.usage.prompt_tokens == PROMPT_TOKENS
    assert answer.usage.completion_tokens == 4
    assert answer.usage.total_tokens == PROMPT_TOKENS + 4


def test_a_streamed_answer(server):
    chunks = list(server.create(stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].delta.content for c in chunks[1:-1]] == ["H", "i", "!"]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_with_token_counts(server):
    *chunks, last = server.create(stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (PROMPT_TOKENS, 4)
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_longest_answer(server, name):
    (choice,) = server.create(**{name: 2}).choices
    assert (choice.message.content, choice.finish_reason) == ("Hi", "length")


@pytest.mark.parametrize("stop", ["!", ["x", "!"]])
def test_stop(server, stop):
    (choice,) = server.create(stop=stop).choices
    assert (choice.message.content, choice.finish_reason) == ("Hi", "stop")
    pieces = [c.choices[0].delta.content or "" for c in server.create(stop=stop, stream=True)]
    assert "".join(pieces) == "Hi"


def test_a_seed_gives_the_same_answer_and_another_one_another(babbler):
    options = {"temperature": 2, "max_tokens": 12, "top_p": 0.99, "extra_body": {"top_k": 50}}
    texts = [
        babbler.create(seed=seed, **options).choices[0].message.content for seed in (1, 1, 2, -1)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_sampling_is_the_default(babbler):
    texts = {babbler.create(temperature=None, max_tokens=12).choices[0].message.content
             for _ in range(3)}  # fmt: skip
    assert len(texts) == 3  # greedy would be one; 384 tokens, 12 times


def test_earlier_turns_parts_and_developer_messages_reach_the_template(server):
    answer = server.create([
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("Hel", "lo")]},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Again"},
    ])  # fmt: skip
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Again"},
    ]
    assert answer.usage.prompt_tokens == len(ChatTemplate(TOKENIZER).prompt_ids(messages))


def test_models_and_health(server):
    assert [model.id for model in server.client().models.list()] == ["tiny"]
    assert server.client().models.retrieve("tiny").owned_by == "xtuner_lite"
    answer = server.send(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.endswith(b'{"status":"ok","waiting":0}')


def test_answers_of_many_clients_do_not_mix(babbler):
    questions = [f"number {index}" for index in range(2)]
    alone = [
        generate_reply(babbler.line.model, TOKENIZER, [{"role": "user", "content": q}],
                       max_new_tokens=20)
        for q in questions
    ]  # fmt: skip
    got = {}

    def ask(question):
        stream = babbler.create([{"role": "user", "content": question}], max_tokens=20, stream=True)
        got[question] = "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    threads = [threading.Thread(target=ask, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[question] for question in questions] == alone
    assert len(set(alone)) == len(alone)


# -------------------------------------------------------------------------------------- errors


def refused(running, error=openai.BadRequestError, messages=USER, **options):
    with pytest.raises(error) as caught:
        running.create(messages, **options)
    return caught.value


def test_an_unknown_model(server):
    error = refused(server, openai.NotFoundError, model="gpt-4o")
    assert error.code == "model_not_found"
    assert error.param == "model"
    assert "does not exist here; this server has 'tiny'" in error.message
    with pytest.raises(openai.NotFoundError, match="does not exist here"):
        server.client().models.retrieve("gpt-4o")


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context(server, stream):
    long = [{"role": "user", "content": "one two " * 300}]
    error = refused(server, messages=long, stream=stream)
    assert error.code == "context_length_exceeded"
    assert "and the model sees 512 at once" in error.message


def test_an_image_for_a_text_model(server):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    parts = [{"type": "text", "text": "What is this?"}, image]
    error = refused(server, messages=[{"role": "user", "content": parts}])
    assert error.param == "messages[0].content[1]"
    assert "a part of type 'image_url'; this model reads text only" in error.message


def test_a_large_request_is_refused_before_it_is_read(server):
    error = refused(server, openai.APIStatusError, [{"role": "user", "content": "x" * 30_000}])
    assert error.status_code == 413
    assert error.code == "request_too_large"
    assert "at most 20000 are allowed" in error.message


def test_a_large_request_that_does_not_tell_its_size(server):
    head = (b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n")  # fmt: skip
    body = b"2710\r\n" + b"x" * 10_000 + b"\r\n"
    answer = server.send(head + 4 * body + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"more than 20000 bytes" in answer


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"{", "the body is not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"[" * 10_000, "error parsing the body"),
        (b'{"model": "tiny"}', "messages is missing; give it"),
    ],
)
def test_a_body_that_is_no_request(server, body, text):
    head = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n")  # fmt: skip
    status, _, rest = server.send(head.encode() + body).partition(b"\r\n")
    assert status == b"HTTP/1.1 400 Bad Request"
    error = json.loads(rest.partition(b"\r\n\r\n")[2])["error"]
    assert text in error["message"]
    assert error["type"] == "invalid_request_error"


def test_paths_that_are_not_there_answer_in_the_same_form(server):
    with pytest.raises(openai.NotFoundError, match="no such path; there are /v1/chat"):
        server.client().embeddings.create(model="tiny", input="x", encoding_format="float")


def test_a_reply_that_fails_is_told_and_the_next_one_is_served(server, monkeypatch):
    def fail(*args, **options):
        options["on_text"]("Hi")
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("xtuner_lite.chat.server.replies.generate_reply", fail)
        error = refused(server, openai.InternalServerError)
        assert error.code == "reply_failed"
        assert "out of memory" not in error.message  # the log's, not the client's
        with pytest.raises(openai.APIError, match="the reply failed; the server's log says why"):
            list(server.create(stream=True))
    assert server.create().choices[0].message.content == "Hi!"


def test_api_key():
    model = tiny_speaker(TOKENIZER, "Hi!")
    with serving(model, TOKENIZER, api_key="secret") as running:
        assert running.create().choices[0].message.content == "Hi!"
        for key, text in (("wrong", "a wrong API key"), ("secre", "a wrong API key")):
            with pytest.raises(openai.AuthenticationError, match=text) as caught:
                running.client(api_key=key).models.list()
            assert caught.value.code == "invalid_api_key"
        for path, status in ((b"/v1/models", b"401"), (b"/health", b"200")):
            answer = running.send(
                b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            )
            assert answer.startswith(b"HTTP/1.1 " + status)


def test_a_page_that_renamed_this_machine_is_kept_out():
    model = tiny_speaker(TOKENIZER, "Hi!")
    with serving(model, TOKENIZER, hosts={"localhost", "127.0.0.1", "[::1]"}) as running:
        assert running.create().choices[0].message.content == "Hi!"
        for host, status in ((b"evil.example:80", b"403"), (b"[::1]:80", b"200"),
                             (b"LOCALHOST", b"200")):  # fmt: skip
            answer = running.send(
                b"GET /v1/models HTTP/1.1\r\nConnection: close\r\nHost: " + host + b"\r\n\r\n"
            )
            assert answer.startswith(b"HTTP/1.1 " + status)


# ---------------------------------------------------------------------------------- cancelling


@pytest.mark.parametrize("stream", [True, False])
def test_the_model_stops_when_the_client_leaves(babbler, stream):
    with slow_steps(babbler.line.model) as steps:
        if stream:
            with babbler.create(stream=True) as chunks:
                next(chunks), next(chunks)
        else:
            with pytest.raises(openai.APITimeoutError):
                babbler.client(timeout=0.3).chat.completions.create(model="tiny", messages=USER)
        (choice,) = babbler.create(max_tokens=3).choices
        assert choice.finish_reason == "length"
        assert len(steps) < 200  # of about 500 that the first reply would have taken


def test_a_client_that_leaves_while_it_waits_frees_its_place(babbler):
    with slow_steps(babbler.line.model):
        with babbler.create(stream=True) as first:
            next(first), next(first)
            with pytest.raises(openai.APITimeoutError):
                babbler.client(timeout=0.2).chat.completions.create(model="tiny", messages=USER)
            wait_until(lambda: babbler.line.num_waiting == 0)
    assert babbler.create(max_tokens=1).usage.completion_tokens == 1


def test_a_full_line_answers_503_and_says_when(babbler):
    with slow_steps(babbler.line.model):
        with babbler.create(stream=True) as first:
            next(first), next(first)
            with babbler.create(stream=True):
                wait_until(lambda: babbler.line.num_waiting == 1)
                error = refused(babbler, openai.InternalServerError)
    assert error.status_code == 503
    assert error.code == "server_busy"
    assert 1 <= int(error.response.headers["retry-after"]) <= 60
    assert babbler.create(max_tokens=1).usage.completion_tokens == 1


def test_the_server_ends_with_open_streams():
    model = tiny_llama(eos_token_id=None).eval()
    with serving(model, TOKENIZER) as running:
        with slow_steps(model, 0.05) as steps:
            first = running.create(stream=True)
            next(first), next(first)
            second = running.create(stream=True)  # waits
            running.server.should_exit = True
            for stream in (first, second):
                with pytest.raises(openai.APIError, match="the server is shutting down"):
                    list(stream)
            running.thread.join(20)
            assert not running.thread.is_alive()
            assert running.line.wait_closed(20)
            assert len(steps) < 200
    assert not turns_of(model)._queue  # nobody holds the model
