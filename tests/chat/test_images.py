"""Chat about images: sessions, every form of a model that sees, the commands, batches."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig

from tests.chat.seeing import COLOURS, image, save_seeing
from tests.cli.test_chat import dialogue, refused, run
from xtuner_lite.chat.load import load_for_chat
from xtuner_lite.chat.session import ChatSession
from xtuner_lite.data.dataset import ChatDataset
from xtuner_lite.export.llava import export_llava
from xtuner_lite.images.vision_inputs import save_tokenizer
from xtuner_lite.methods.image_text import ImageTextFinetune
from xtuner_lite.models.generate import generate_reply
from xtuner_lite.models.image_text import load_image_text_model
from xtuner_lite.models.llava_xtuner import PUT_TOGETHER
from xtuner_lite.models.processors import load_processor
from xtuner_lite.models.sampling import Sampling

TOKENS = 8
#: Tokens of an image: 28 x 28 pixels in patches of 14.
IMAGE_TOKENS = 4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return {name: str(path) for name, path in save_seeing(tmp_path_factory.mktemp("see")).items()}


@pytest.fixture(scope="module")
def whole(files):
    return load_for_chat(files["whole"])


def session(loaded):
    return ChatSession(*loaded, sampling=Sampling(max_new_tokens=TOKENS))


def answer(loaded, *images):
    return session(loaded).reply("What?", images)


def test_a_reply_depends_on_the_image_and_history_keeps_it(whole, files):
    red, blue = (answer(whole, files[colour]) for colour in COLOURS)
    assert red != blue
    chat = session(whole)
    assert chat.reads_images
    assert chat.reply("What?", [files["red"]]) == red
    chat.reply("And now?")
    question = [image(files["red"]), {"type": "text", "text": "What?"}]
    asked = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": red},
        {"role": "user", "content": "And now?"},
    ]
    expected = generate_reply(*whole, asked, max_new_tokens=TOKENS)
    assert chat.messages == [*asked, {"role": "assistant", "content": expected}]


def test_retry_shows_the_image_again(whole, files):
    chat = session(whole)
    first = chat.reply("What?", [files["blue"]])
    assert "".join(chat.retry()) == first
    assert len(chat.messages) == 2
    chat.clear()
    assert not chat.has_asked


def test_a_turn_whose_image_cannot_be_read_leaves_no_trace(whole, files):
    chat = session(whole)
    with pytest.raises(ValueError, match="no image that Pillow can read"):
        chat.reply("What?", [files["damaged"]])
    assert chat.messages == []


def test_a_text_that_holds_the_image_token_is_refused(whole):
    with pytest.raises(ValueError, match="message 1 holds the text '<image>', which stands for"):
        session(whole).reply("a <image> b")


def test_what_is_saved_trains(whole, files, tmp_path):
    chat = session(whole)
    chat.reply("What?", [files["red"]])
    folder = tmp_path / "talk"
    folder.mkdir()
    (folder / "red.png").write_bytes((Path(files["red"])).read_bytes())
    chat.messages[0]["content"][0]["image"] = str(folder / "red.png")
    saved = chat.save(folder / "talk.json")
    (row,) = json.loads(saved.read_text(encoding="utf-8"))
    assert row["messages"][0]["content"][0] == {"type": "image", "image": "red.png"}
    data = ChatDataset(str(saved), tokenizer=whole[1], max_length=128, packing="none", cache=False)
    assert len(data) == 1
    assert len(data[0]["images"]) == 1


# ------------------------------------------------------------------ what a model is named by


def test_a_run_is_put_together_of_its_parts(files, capsys):
    loaded = load_for_chat(files["run"])
    assert answer(loaded, files["red"]) != answer(loaded, files["blue"])
    first = load_for_chat(files["first"])
    assert answer(first, files["red"]) != answer(first, files["blue"])


def test_parts_that_lie_elsewhere_are_named(files, tmp_path, capsys):
    expected = answer(load_for_chat(files["run"]), files["red"])
    for part in ("llm", "tower"):
        (tmp_path / part).symlink_to(files[part])
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in sorted(Path(files["run"]).iterdir()):
        if path.name != "llava.json":
            (moved / path.name).symlink_to(path)
    note = json.loads((Path(files["run"]) / "llava.json").read_text())
    lost = {**note, "llm": "/none/llm", "visual_encoder": "/none/tower"}
    (moved / "llava.json").write_text(json.dumps(lost))
    ask = ("-p", "What?", "--image", files["red"], "--max-new-tokens", str(TOKENS))
    assert f"--llava {moved} --visual-encoder TOWER" in refused(capsys, str(moved), *ask)
    places = ("--llava", str(moved), "--visual-encoder", str(tmp_path / "tower"))
    assert run(str(tmp_path / "llm"), *places, *ask) == 0
    assert capsys.readouterr().out == expected + "\n"


@pytest.fixture(scope="module")
def published(files, tmp_path_factory):
    """The run in XTuner's layout, as our export writes it and as XTuner published its own."""
    root = tmp_path_factory.mktemp("xtuner")
    export_llava(files["run"], root / "ours", form="xtuner")
    for part in ("projector", "llm_adapter"):
        shutil.copytree(root / "ours" / part, root / "theirs" / part)
    config = root / "theirs" / "projector" / "config.json"
    saved = json.loads(config.read_text())
    for name in PUT_TOGETHER:
        del saved[name]
    config.write_text(json.dumps(saved))
    return root


@pytest.mark.parametrize("form", ["ours", "theirs"])
def test_xtuners_layout_is_put_together_of_its_parts(files, published, capsys, form):
    expected = answer(load_for_chat(files["run"]), files["red"])
    parts = ("--llava", str(published / form), "--visual-encoder", files["tower"])
    ask = ("-p", "What?", "--image", files["red"], "--max-new-tokens", str(TOKENS))
    assert run(files["llm"], *parts, *ask) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert "name it: visual_encoder=" in refused(capsys, files["llm"], *parts[:2], *ask)


def test_an_adapter_on_a_model_that_sees(files, tmp_path):
    tokenizer = load_processor(files["whole"])
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    method = ImageTextFinetune(
        load_image_text_model(files["whole"]), tokenizer=tokenizer, lora=config
    )
    method.save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    alone = load_for_chat(tmp_path)
    assert answer(alone, files["red"]) == answer(
        load_for_chat(files["whole"], adapter=tmp_path), files["red"]
    )
    assert answer(alone, files["red"]) != answer(load_for_chat(files["whole"]), files["red"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"path": "llm", "llava": "whole"}, "is no folder of a LLaVA run (it has no llava.json)"),
        ({"path": "run", "adapter": "run"}, "holds what it trained itself; leave --adapter out"),
        ({"path": "run", "offload_folder": "llm"}, "cannot be offloaded; export it"),
        ({"path": "llm", "visual_encoder": "tower"}, "name the run's checkpoint: --llava DIR"),
    ],
)
def test_parts_that_do_not_go_together(files, options, told):
    options = {name: files[value] for name, value in options.items()}
    with pytest.raises(ValueError, match=re.escape(told)):
        load_for_chat(options.pop("path"), **options)


# ------------------------------------------------------------------ the command


def see(files, *argv):
    return run(files["whole"], "--max-new-tokens", str(TOKENS), *argv)


def test_one_shot(whole, files, capsys):
    assert see(files, "-p", "What?", "--image", files["red"], files["blue"]) == 0
    assert capsys.readouterr().out == answer(whole, files["red"], files["blue"]) + "\n"


def test_an_image_for_a_model_of_text_is_refused_before_it_loads(files, capsys, monkeypatch):
    monkeypatch.setattr("xtuner_lite.chat.load.load_for_chat", lambda *args, **options: 1 / 0)
    told = refused(capsys, files["llm"], "-p", "What?", "--image", files["red"])
    assert "llm reads text only; name an image-text model" in told


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("--image", "none.png"), "the image none.png does not exist"),
        (("--image", "{damaged}"), "no image that Pillow can read"),
        (("--llava", "./none"), "--llava ./none: no model folder 'none'"),
        (("--visual-encoder", "./none"), "no model folder 'none'"),
        (("--image", "{red}", "--batch", "x.json"), "the rows of --batch name their own"),
    ],
)
def test_mistakes_are_told_before_the_model_loads(files, capsys, monkeypatch, argv, told):
    monkeypatch.setattr("xtuner_lite.chat.load.load_for_chat", lambda *args, **options: 1 / 0)
    words = [word.format(**files) for word in argv]
    more = [] if "--batch" in argv else ["-p", "What?"]
    assert told in refused(capsys, files["whole"], *more, *words)


def test_pictures_in_the_dialogue(whole, files, capsys, monkeypatch, tmp_path):
    (tmp_path / "my cat.png").write_bytes((Path(files["blue"])).read_bytes())
    turns = [
        "/image none.png", f"/image {files['damaged']}", "/image",
        f"/image {files['red']}", f"/image '{tmp_path}/my cat.png'", "What?",
        "/retry", "/clear", f"/image {files['red']}", "/image -", "Hello",
        "/clear", f"/image {tmp_path}/my\\ cat.png", "/clear", "Hello", "/help", "/exit",
    ]  # fmt: skip
    dialogue(monkeypatch, turns)
    assert see(files, "--image", files["blue"]) == 0
    out = capsys.readouterr().out
    assert "with the next question: blue.png\n" in out
    assert "error: the image none.png does not exist" in out
    assert "error: " + files["damaged"] + " is no image" in out
    assert "with the next question: blue.png, red.png, my cat.png\n" in out
    together = answer(whole, files["blue"], files["red"], files["blue"])
    assert out.count(f"bot> {printed(together)}") == 2  # and by /retry
    assert "with the next question: no picture; /image FILE adds one" in out
    assert out.count(f"bot> {printed(session(whole).reply('Hello'))}") == 2
    assert "/image FILE" in out


def printed(text):
    """The first line of a reply, as a terminal shows it."""
    return text.partition("\n")[0]


def test_a_dialogue_with_a_model_of_text_refuses_pictures(files, capsys, monkeypatch):
    dialogue(monkeypatch, [f"/image {files['red']}", "/exit"])
    assert run(files["llm"]) == 0
    assert "error: this model reads text only" in capsys.readouterr().out


def test_piped_pictures(whole, files, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {files['red']}\nWhat?\n"))
    assert see(files) == 0
    captured = capsys.readouterr()
    assert captured.out == answer(whole, files["red"]) + "\n"
    assert captured.err.endswith("with the next question: red.png\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("/image none.png\nWhat?\n"))
    assert see(files) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "the image none.png does not exist" in captured.err


# ------------------------------------------------------------------ batches


def test_a_batch_with_images(whole, files, capsys, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "red.png").write_bytes(Path(files["red"]).read_bytes())
    parts = [image("sub/red.png"), {"type": "text", "text": "What?"}]
    rows = [
        {"prompt": "What?", "image": "sub/red.png"},
        {"prompt": "<image>\nWhat?", "images": ["sub/red.png"]},
        {"messages": [{"role": "user", "content": parts}]},
        {"messages": [{"role": "user", "content": "<image>What?"}], "images": ["sub/red.png"]},
        {"prompt": "What?", "images": [files["damaged"]]},
        {"prompt": "What?"},
    ]
    (tmp_path / "ask.json").write_text(json.dumps(rows), encoding="utf-8")
    assert see(files, "--batch", str(tmp_path / "ask.json")) == 1
    replies = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["reply"] for row in replies[:4]] == [answer(whole, files["red"])] * 4
    assert replies[0]["image"] == "sub/red.png"  # the row as it was
    assert "no image that Pillow can read" in replies[4]["error"]
    assert replies[5]["reply"] == answer(whole)
    assert replies[0]["prompt_tokens"] - replies[5]["prompt_tokens"] >= IMAGE_TOKENS


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "x", "image": "https://example.com/a.png"}, "web address"),
        ({"prompt": "<image> <image>", "images": ["a.png"]}, "2 x <image> in the conversation"),
        ({"messages": [{"role": "user", "content": "x"}], "image": "a.png"}, "but 1 images"),
        ({"prompt": "x", "images": [3]}, "names no image"),
    ],
)
def test_rows_whose_images_cannot_be_meant(files, capsys, tmp_path, row, told):
    (tmp_path / "ask.jsonl").write_text(json.dumps(row))
    problem = refused(capsys, files["whole"], "--batch", str(tmp_path / "ask.jsonl"))
    assert told in problem
    assert "ask.jsonl:1: " in problem
