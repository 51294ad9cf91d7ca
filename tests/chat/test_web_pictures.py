"""Pictures on the page: uploaded, answered, remembered; what is no picture is told."""

from pathlib import Path

import httpx
import pytest

pytest.importorskip("gradio", reason="the page needs: pip install gradio")

from gradio_client import handle_file

from tests.chat.seeing import COLOURS, save_seeing
from tests.chat.test_web_server import CHAT, client, notice, texts
from tests.chat.test_web_server import ask as press
from tests.chat.web_pages import served
from tests.vision_parts import picture
from xtuner_lite.chat.load import load_for_chat
from xtuner_lite.chat.session import ChatSession
from xtuner_lite.chat.web.answerer import Answerer
from xtuner_lite.chat.web.guard import MAX_UPLOAD_BYTES, MAX_UPLOADED_BYTES, Guard
from xtuner_lite.models.sampling import Sampling

TOKENS = 8
SETTINGS = ("", 0, 1, 0, 1, TOKENS, "")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_seeing(tmp_path_factory.mktemp("see"))


@pytest.fixture(scope="module")
def loaded(files):
    return load_for_chat(files["whole"])


@pytest.fixture(scope="module")
def url(loaded):
    with served(Answerer(*loaded)) as (url, _):
        yield url


def ask(visitor, text, *pictures):
    """The last outputs of a question with pictures."""
    given = {"text": text, "files": [handle_file(str(path)) for path in pictures]}
    return press(visitor, given, settings=SETTINGS)


def shown(outputs):
    """The messages that the column showed last: texts, and files in brackets."""
    column = [step[CHAT] for step in outputs if isinstance(step[CHAT], list)][-1]
    return [[_shown_part(part) for part in message["content"]] for message in column]


def _shown_part(part):
    if "file" not in part:
        return part["text"]
    path = part["file"] if isinstance(part["file"], str) else part["file"]["path"]
    return f"[{Path(path).name}]"


def test_answers_about_pictures_and_memory_of_them(url, loaded, files):
    visitor = client(url)
    outputs = ask(visitor, "What?", files["red"])
    session = ChatSession(*loaded, sampling=Sampling(max_new_tokens=TOKENS))
    first = session.reply("What?", [files["red"]])
    assert shown(outputs) == [["[red.png]", "What?"], [first]]
    second = session.reply("And now?", [files["blue"], files["red"]])
    outputs = ask(visitor, "And now?", files["blue"], files["red"])
    assert shown(outputs)[2:] == [["[blue.png]", "[red.png]", "And now?"], [second]]
    outputs = press(visitor, "", settings=SETTINGS, to="/retry")
    assert shown(outputs)[2:] == [["[blue.png]", "[red.png]", "And now?"], [second]]
    assert shown(ask(visitor, "So?"))[4:] == [["So?"], [session.reply("So?")]]
    visitor.predict(api_name="/clear")
    alone = ChatSession(*loaded, sampling=Sampling(max_new_tokens=TOKENS))
    expected = alone.reply("", [files["red"]])
    assert shown(ask(visitor, "", files["red"])) == [["[red.png]"], [expected]]


def test_two_colours_get_two_answers(url, files):
    answers = [shown(ask(client(url), "What?", files[colour]))[1] for colour in COLOURS]
    assert answers[0] != answers[1]


def test_what_cannot_be_seen_is_told_and_asks_nothing(url, files, tmp_path):
    visitor = client(url)
    told = notice(ask(visitor, "What?", files["damaged"]))
    assert "The picture cannot be used: damaged.png is no image that Pillow can read" in told
    picture(0, size=(10_000, 6_000), mode="L").save(tmp_path / "huge.png")
    told = notice(ask(visitor, "What?", tmp_path / "huge.png"))
    assert "huge.png has 10000x6000 pixels; at most 50,000,000" in told
    assert "9 pictures; at most 8 are taken" in notice(ask(visitor, "What?", *[files["red"]] * 9))
    assert "&lt;image&gt;&#x27;, which stands for an image" in notice(ask(visitor, "a <image>"))
    assert texts(ask(visitor, "Hello"))[0] == "Hello"


def test_files_of_the_server_and_addresses_are_not_taken(url, files):
    visitor = client(url)
    for path in ("/etc/passwd", str(files["red"]), "https://example.com/red.png", "../red.png"):
        named = {"path": path, "meta": {"_type": "gradio.FileData"}}
        session = httpx.post(
            f"{url}/gradio_api/call/ask",
            json={"data": [{"text": "What?", "files": [named]}, False, *SETTINGS]},
        )
        event = session.json()["event_id"]
        answer = httpx.get(f"{url}/gradio_api/call/ask/{event}", timeout=20).text
        assert "event: error" in answer, answer
        assert "event: complete" not in answer
    assert texts(ask(visitor, "Hello"))[0] == "Hello"


def test_uploads_have_limits(url):
    upload = f"{url}/gradio_api/upload"
    huge = b"x" * (MAX_UPLOAD_BYTES + 1)
    assert httpx.post(upload, files={"files": huge}).status_code == 413
    assert httpx.post(upload, content=iter([huge])).status_code >= 400


def test_uploads_do_not_fill_the_disk(monkeypatch):
    guard = Guard(None, takes_pictures=True)
    assert guard._has_room()
    guard._uploads.append((0.0, MAX_UPLOADED_BYTES))
    monkeypatch.setattr("time.monotonic", lambda: 3600.0)
    assert not guard._has_room()
    monkeypatch.setattr("time.monotonic", lambda: 25 * 3600.0)
    assert guard._has_room()


def test_a_password_guards_uploads_too(loaded):
    with served(Answerer(*loaded), password="sesame") as (url, _):
        answer = httpx.post(f"{url}/gradio_api/upload", files={"files": b"x"})
        assert answer.status_code == 401
