"""Turns with images: made, shown as text, saved with names that are found again."""

import re
from pathlib import Path

import pytest

from tests.vision_parts import picture
from xtuner_lite.images.files import ImageError, image_name
from xtuner_lite.images.turns import (
    local_image,
    local_name,
    shown_text,
    user_turn,
    with_named_images,
    with_saved_images,
)

URI = "data:image/png;base64,AAAA"


def test_a_turn_without_images_is_text_and_with_them_parts_in_front():
    assert user_turn("Hi") == {"role": "user", "content": "Hi"}
    first, second, text = user_turn("What?", ["a.png", "b.png"])["content"]
    assert (first["image"], second["image"], text["text"]) == ("a.png", "b.png", "What?")
    assert user_turn("", ["a.png"])["content"] == [{"type": "image", "image": "a.png"}]


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ("Hi", "Hi"),
        (None, ""),
        (user_turn("What?", ["/far/away/a.png", URI])["content"], "[a.png] [image] What?"),
        (user_turn("", [picture()])["content"], "[image of 40x30 pixels]"),
    ],
)
def test_what_a_person_reads(content, shown):
    assert shown_text(content) == shown


def test_a_named_image_is_found_and_read(tmp_path, monkeypatch):
    picture(size=(7, 5)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    found = (str(tmp_path / "a.png"), (7, 5))
    assert local_image("a.png") == local_image(f"file://{tmp_path}/a.png") == found


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("none.png", "the image none.png does not exist; give the path of a picture"),
        (".", "the image . is no file"),
        ("empty.png", "is empty (0 bytes)"),
        ("text.png", "is no image that Pillow can read"),
        ("https://example.com/a.png", "is a web address, which is not fetched"),
    ],
)
def test_an_image_that_cannot_be_read_is_told(tmp_path, monkeypatch, name, told):
    monkeypatch.chdir(tmp_path)
    Path("empty.png").touch()
    Path("text.png").write_text("hello")
    with pytest.raises(ImageError, match=re.escape(told)):
        local_image(name)


def test_names_in_a_file_begin_from_its_folder():
    assert local_name("a/b.png", Path("/data")) == "/data/a/b.png"
    assert local_name("/c.png", Path("/data")) == "/c.png"
    assert local_name(URI, Path("/data")) == URI
    with pytest.raises(ImageError, match="web address, which is not fetched"):
        local_name("HTTP://example.com/a.png", Path("/data"))


def test_messages_for_a_log_and_for_a_file():
    messages = [user_turn("What?", ["/data/x/a.png", "/other/b.png", picture()]), user_turn("Hi")]
    (logged, plain) = with_named_images(messages)
    names = [part["image"] for part in logged["content"][:3]]
    assert names == ["/data/x/a.png", "/other/b.png", "image of 40x30 pixels"]
    assert plain == messages[1]
    (saved, _) = with_saved_images(messages, Path("/data"))
    names = [part["image"] for part in saved["content"][:3]]
    assert names == ["x/a.png", "/other/b.png", image_name(picture())]
    assert messages[0]["content"][0]["image"] == "/data/x/a.png"  # left as they were
