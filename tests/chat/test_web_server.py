"""The page over HTTP: who comes in, what is refused, and that visitors do not mix."""

import argparse
import socket
import threading

import httpx
import pytest

pytest.importorskip("gradio", reason="the page needs: pip install gradio")

from gradio_client import Client

from tests.chat.web_pages import TOKENIZER, Parrot, served
from tests.tiny import tiny_speaker
from xtuner_lite.chat.listening import ListenError
from xtuner_lite.chat.web.answerer import Answerer
from xtuner_lite.chat.web.guard import MAX_BODY_BYTES
from xtuner_lite.chat.web.page import ChatPage, PageOptions
from xtuner_lite.chat.web.server import WebPageError, check_access, listen
from xtuner_lite.cli import web_demo

#: system, temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed
SETTINGS = ("", 0, 1, 0, 1, 32, "")
#: Where the outputs of a button stand.
BOX, CHAT, BASE, NOTICE = range(4)


@pytest.fixture(scope="module")
def parrot_page():
    with served(Parrot(), max_characters=50) as (url, page):
        yield url, page


def client(url, **options):
    return Client(url, verbose=False, **options)


def ask(visitor, text, *, compare=False, settings=SETTINGS, to="/ask"):
    """The last outputs of a button."""
    given = [text] if to == "/ask" else []
    job = visitor.submit(*given, compare, *settings, api_name=to)
    job.result(timeout=20)
    return job.outputs()


def texts(outputs, column=CHAT):
    """What a column showed last."""
    shown = [step[column] for step in outputs if isinstance(step[column], list)]
    return [part["text"] for message in shown[-1] for part in message["content"]]


def notice(outputs):
    """What was said last."""
    return [step[NOTICE] for step in outputs if isinstance(step[NOTICE], str)][-1]


def test_a_model_answers_and_goes_on_after_an_error():
    with served(Answerer(tiny_speaker(TOKENIZER, "Hi!"), TOKENIZER)) as (url, _):
        visitor = client(url)
        assert texts(ask(visitor, "Hello")) == ["Hello", "Hi!"]
        outputs = ask(visitor, "one two " * 300)
        assert "No answer: the conversation has" in notice(outputs)
        assert texts(outputs) == ["Hello", "Hi!"]
        outputs = ask(visitor, "x", settings=("", 0, 1, 0, 1, 32, "seven"))
        assert "The settings cannot be used: invalid literal" in notice(outputs)
        assert texts(ask(visitor, "Again")) == ["Hello", "Hi!", "Again", "Hi!"]
        visitor.predict(api_name="/clear")
        assert texts(ask(visitor, "Anew")) == ["Anew", "Hi!"]


def test_two_visitors_at_once_do_not_mix(parrot_page):
    url, _ = parrot_page
    visitors = [client(url), client(url)]
    seen = {}

    def talk(number):
        for word in ("red", "green", "blue"):
            seen[number] = texts(ask(visitors[number], f"{word} {number}"))

    threads = [threading.Thread(target=talk, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    for number in (0, 1):
        assert seen[number] == [
            f"red {number}", f"1: red {number}", f"green {number}", f"2: green {number}",
            f"blue {number}", f"3: blue {number}",
        ]  # fmt: skip


def test_both_sides_stream_and_retry(parrot_page):
    visitor = client(parrot_page[0])
    outputs = ask(visitor, "a b c d e f g h", compare=True)
    assert len(outputs) >= 4
    assert texts(outputs) == ["a b c d e f g h", "1: a b c d e f g h"]
    assert texts(outputs, BASE) == ["a b c d e f g h", "base 1: a b c d e f g h"]
    assert texts(ask(visitor, "", to="/retry")) == ["a b c d e f g h", "1: a b c d e f g h"]
    assert "no question to answer again" in notice(ask(client(parrot_page[0]), "", to="/retry"))


def test_an_empty_message_asks_nothing(parrot_page):
    visitor = client(parrot_page[0])
    ask(visitor, "  ")
    assert texts(ask(visitor, "one")) == ["one", "1: one"]


def test_a_comparison_without_a_base_is_refused():
    answerer = Answerer(tiny_speaker(TOKENIZER, "Hi!"), TOKENIZER)
    with pytest.raises(WebPageError, match="no adapter to switch off; leave --compare out"):
        ChatPage(answerer, PageOptions(compare=True))


def test_a_long_message_is_refused_in_the_page(parrot_page):
    assert "51 characters; at most 50" in notice(ask(client(parrot_page[0]), "x" * 51))


def test_responses_keep_the_browser_at_home(parrot_page):
    response = httpx.get(parrot_page[0])
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert "connect-src 'self'" in response.headers["content-security-policy"]
    assert "fonts.googleapis" not in response.text
    assert '"analytics_enabled":false' in response.text.replace(" ", "")
    for path in ("docs", "openapi.json", "monitoring"):
        assert httpx.get(f"{parrot_page[0]}/{path}").status_code in (403, 404), path


def test_uploads_and_huge_requests_are_refused(parrot_page):
    url = f"{parrot_page[0]}/gradio_api"
    assert httpx.post(f"{url}/upload", files={"files": b"x"}).status_code == 403
    huge = b"x" * (MAX_BODY_BYTES + 1)
    assert httpx.post(f"{url}/queue/join", content=huge).status_code == 413
    assert httpx.post(f"{url}/queue/join", content=iter([huge])).status_code >= 400


def test_a_password_is_asked_of_everyone():
    with served(Parrot(), password="sesame") as (url, _):
        with pytest.raises(Exception, match="credentials were not provided"):
            client(url)
        assert httpx.post(f"{url}/gradio_api/queue/join", json={}).status_code == 401
        wrong = httpx.post(f"{url}/login", data={"username": "a", "password": "open"})
        assert wrong.status_code == 400
        visitor = client(url, auth=("anyone", "sesame"))
        assert texts(ask(visitor, "one")) == ["one", "1: one"]


@pytest.mark.parametrize(
    ("host", "password", "is_open", "problem"),
    [
        ("127.0.0.1", None, False, None),
        ("localhost", None, False, None),
        ("::1", None, False, None),
        ("0.0.0.0", "word", False, None),
        ("0.0.0.0", None, True, None),
        ("0.0.0.0", None, False, "--host 0.0.0.0 lets other machines in, and there is no password"),
        ("192.168.1.5", None, False, "give --password"),
        ("no.such.host.invalid", None, False, "give an address of this machine"),
        ("0.0.0.0", "", False, "the password is empty"),
        ("0.0.0.0", "word", True, "leave one of them out"),
    ],
)
def test_other_machines_come_in_with_a_password_only(host, password, is_open, problem):
    if problem is None:
        check_access(host, password, is_open=is_open)
    else:
        with pytest.raises(ListenError, match=problem):
            check_access(host, password, is_open=is_open)


def test_a_page_without_a_password_answers_to_local_names_only():
    with served(Parrot()) as (url, _):
        port = url.rpartition(":")[2]
        for name, code in [("localhost", 200), ("127.0.0.1", 200), ("evil.example", 403)]:
            answer = httpx.get(url, headers={"Host": f"{name}:{port}"})
            assert answer.status_code == code, name
        assert "start it with --password WORD" in answer.text


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(WebPageError, match=f"port {port} is taken .* --port") as failure:
            listen("127.0.0.1", port)
        assert failure.value.exit_code == 2
    with pytest.raises(WebPageError, match="allowed: 1 to 65535"):
        listen("127.0.0.1", 70000)
    with pytest.raises(ListenError, match="--host 203.0.113.1 .*give an address of this machine"):
        listen("203.0.113.1", None)


def test_without_a_port_the_next_free_one_is_taken():
    with listen("127.0.0.1", None) as first, listen("127.0.0.1", None) as second:
        assert 7860 <= first.getsockname()[1] < second.getsockname()[1] < 7960


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--host", "0.0.0.0"], "no password; give --password"),
        (["--temperature", "-1"], "temperature is -1.0; it must be 0 or more"),
        (["--max-characters", "0"], "--max-characters is 0"),
        (["--adapter", "nowhere"], "no adapter folder 'nowhere'"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(words, problem, tmp_path, monkeypatch):
    monkeypatch.delenv(web_demo.PASSWORD_VARIABLE, raising=False)
    parser = argparse.ArgumentParser()
    web_demo.add_arguments(parser)
    with pytest.raises(ValueError, match=problem) as failure:
        web_demo.run(parser.parse_args([str(tmp_path), *words]))
    assert failure.value.exit_code == 2


def test_without_gradio_the_command_names_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    parser = argparse.ArgumentParser()
    web_demo.add_arguments(parser)
    with pytest.raises(web_demo.WebDemoError, match=r"pip install 'xtuner_lite\[web\]'"):
        web_demo.run(parser.parse_args(["model"]))
