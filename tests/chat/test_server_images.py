"""Images in requests to the server, as OpenAI's own client sends them."""

import io
import re

import openai
import pytest

from tests.chat.seeing import COLOURS, save_seeing
from tests.chat.serving import serving
from tests.vision_parts import picture
from xtuner_lite.chat.load import load_for_chat
from xtuner_lite.chat.server import images as server_images
from xtuner_lite.chat.server.errors import ApiError
from xtuner_lite.chat.server.images import check_images
from xtuner_lite.chat.session import ChatSession
from xtuner_lite.images.files import image_name
from xtuner_lite.models.sampling import Sampling

TOKENS = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_seeing(tmp_path_factory.mktemp("see"))


@pytest.fixture(scope="module")
def loaded(files):
    return load_for_chat(files["whole"])


@pytest.fixture(scope="module")
def server(loaded):
    with serving(*loaded) as running:
        yield running


def part(url, **more):
    return {"type": "image_url", "image_url": {"url": url, **more}}


def user(*content):
    return [{"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_about_an_image(server, loaded, files, stream):
    replies = []
    for colour in COLOURS:
        given = user(part(image_name(files[colour].read_bytes()), detail="auto"))
        answer = server.create(given, max_tokens=TOKENS, stream=stream)
        if stream:
            replies.append("".join(chunk.choices[0].delta.content or "" for chunk in answer))
        else:
            replies.append(answer.choices[0].message.content)
        session = ChatSession(*loaded, sampling=Sampling(max_new_tokens=TOKENS))
        assert replies[-1] == session.reply("What?", [files[colour]])
        if not stream:
            assert answer.usage.prompt_tokens == session.stats.prompt_tokens
    assert replies[0] != replies[1]


def test_images_in_several_turns_and_text_alone(server, files):
    red, blue = (part(image_name(files[colour].read_bytes())) for colour in COLOURS)
    talk = [*user(red, blue), {"role": "assistant", "content": "Two."}, *user(blue)]
    with_images = server.create(talk, max_tokens=2).usage.prompt_tokens
    texts = [{**m, "content": "What?"} if m["role"] == "user" else m for m in talk]
    assert with_images - server.create(texts, max_tokens=2).usage.prompt_tokens >= 3 * 4


def huge():
    """A picture of 60 million pixels in a few bytes."""
    file = io.BytesIO()
    picture(0, size=(10_000, 6_000), mode="L").save(file, format="PNG")
    return image_name(file.getvalue())


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://example.com/a.png", "fetches no addresses and opens no files"),
        ("http://127.0.0.1:1/a.png", "fetches no addresses"),
        ("file:///etc/passwd", "opens no files"),
        ("/etc/passwd", "opens no files: send the image itself"),
        ("{red}", "opens no files"),
        ("data:image/png;base64,????", "its base64 is damaged"),
        ("data:image/png,abc", "is a data URI without base64"),
        ("data:image/png;base64,aGVsbG8=", "is no image that Pillow can read"),
        ("data:image/png;base64,", "is empty (0 bytes)"),
        ("{damaged}", "opens no files"),
    ],
)
def test_what_is_no_image_in_the_request_is_refused(server, files, url, told):
    url = url.format(**files)
    with pytest.raises(openai.BadRequestError, match=re.escape(told)) as caught:
        server.create(user(part(url)))
    assert caught.value.param == "messages[0].content[0]"
    assert caught.value.code == "unsupported_content"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([part("data:image/png;base64,AAAA", detail="low")], "asks for the detail 'low'"),
        ([{"type": "image_url", "image_url": "data:image/png;base64,AAAA"}], "without a URL"),
        ([{"type": "image", "image": "/etc/passwd"}], "of type 'image'; this model reads parts"),
        ([{"type": "input_audio", "input_audio": {}}], "of type 'input_audio'; this model reads"),
    ],
)
def test_other_parts_are_refused(server, content, told):
    with pytest.raises(openai.BadRequestError, match=re.escape(told)):
        server.create([{"role": "user", "content": content}])


def test_limits(server, files):
    uri = image_name(files["red"].read_bytes())
    with pytest.raises(openai.BadRequestError, match="more than 16 images in one request"):
        server.create(user(*[part(uri)] * 17))
    with pytest.raises(openai.BadRequestError, match="10000x6000 pixels; at most 50,000,000"):
        server.create(user(part(huge())))
    with pytest.raises(openai.BadRequestError, match="is no image that Pillow"):
        server.create(user(part(image_name(files["damaged"].read_bytes()))))


def test_images_of_a_request_have_a_limit_together(files, monkeypatch):
    """They are decoded one by one and held together."""
    monkeypatch.setattr(server_images, "MAX_PIXELS_TOGETHER", 100)
    image = {"type": "image", "image": image_name(picture(size=(6, 10)))}
    ask = [{"role": "user", "content": [image]}]
    assert check_images(ask) == [(6, 10)]
    with pytest.raises(ApiError, match="more than 100 pixels together"):
        check_images(ask * 2)


def test_texts_that_hold_the_image_token_and_other_roles(server, files):
    for content in ("a <image> b", [{"type": "text", "text": "<image>"}]):
        with pytest.raises(openai.BadRequestError, match="holds the text '<image>', which stands"):
            server.create([{"role": "user", "content": content}])
    image = part(image_name(files["red"].read_bytes()))
    with pytest.raises(openai.BadRequestError, match="images stand in user messages"):
        server.create([{"role": "system", "content": [image]}, {"role": "user", "content": "x"}])


def test_images_count_for_the_context(server, files):
    uri = image_name(files["red"].read_bytes())
    talk = [{"role": "user", "content": "one two " * 120}, *user(*[part(uri)] * 16)]
    server.create(talk[1:], max_tokens=1)
    with pytest.raises(openai.BadRequestError) as caught:
        server.create(talk)
    assert caught.value.code == "context_length_exceeded"
