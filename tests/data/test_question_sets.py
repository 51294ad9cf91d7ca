"""Questions with known answers: three forms of rows, images found below their folder."""

import base64
import io
import json

import pytest
from PIL import Image

from xtuner_lite.data.question_sets import (
    MMBenchDataset,
    Question,
    QuestionDataset,
    RefCOCODataset,
)

LLAVA = {
    "id": "a",
    "image": "red.png",
    "kind": "colour",
    "conversations": [
        {"from": "human", "value": "<image>\nWhich colour?"},
        {"from": "gpt", "value": "Red"},
    ],
}


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4), colour).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/red.png").write_bytes(png("red"))
    (tmp_path / "images/000000581857.jpg").write_bytes(png("blue"))
    return tmp_path / "images"


def test_the_last_turn_is_the_answer(images):
    rows = [LLAVA, {**LLAVA, "id": "b", "answers": ["Crimson"]}]
    questions = QuestionDataset(rows, image_folder=images)
    assert len(questions) == 2
    first = questions[0]
    assert (first.name, first.kind, first.answers) == ("a", "colour", ("Red",))
    assert questions[1].answers == ("Red", "Crimson")
    (message,) = questions.opened(first)
    assert message["content"][0]["image"].getpixel((0, 0)) == (255, 0, 0)
    assert message["content"][1] == {"type": "text", "text": "\nWhich colour?"}
    assert first.messages[0]["content"][0]["image"] == "red.png"  # the question itself holds names


def test_earlier_turns_are_given():
    turns = [("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    (question,) = QuestionDataset(rows)
    assert [message["content"] for message in question.messages] == ["One?", "1", "Two?"]
    assert (question.answers, question.kind) == (("2",), None)
    assert question.name == "rows:1"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}]}, "rows:1: .*no answer to compare"),
        ({**LLAVA, "image": None}, "rows:1: 1 x <image> .*0 images"),
    ],
)
def test_rows_that_ask_nothing(row, message):
    with pytest.raises(ValueError, match=message):
        QuestionDataset([row], map_fn="llava" if "image" in row else "openai")


def test_images_stay_below_their_folder(images):
    row = {**LLAVA, "image": "../secret.png"}
    with pytest.raises(ValueError, match="rows:1: .*lies outside image_folder"):
        QuestionDataset([row], image_folder=images)


def test_a_missing_image_is_told_before_the_training(images):
    rows = [LLAVA, {**LLAVA, "image": "b.png"}]
    with pytest.raises(ValueError, match=r":2: b\.png does not exist in image_folder"):
        QuestionDataset(rows, image_folder=images)
    questions = QuestionDataset([LLAVA], image_folder=images)
    (images / "red.png").unlink()
    with pytest.raises(ValueError, match=r"question a: red\.png does not exist"):
        questions.opened(questions[0])


def test_a_limit_and_a_fingerprint(images):
    rows = [{**LLAVA, "id": str(number)} for number in range(5)]
    whole, again, part = (
        QuestionDataset(some, image_folder=images) for some in (rows, rows, rows[:4])
    )
    assert len(QuestionDataset(rows, image_folder=images, limit=2)) == 2
    assert whole.fingerprint == again.fingerprint != part.fingerprint
    with pytest.raises(ValueError, match="limit=0 is too small"):
        QuestionDataset(rows, limit=0)


# --------------------------------------------------------------- MMBench


def mmbench(tmp_path, *rows):
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    lines = ["\t".join(columns)]
    lines += ["\t".join(str(row.get(column, "")) for column in columns) for row in rows]
    file = tmp_path / "bench.tsv"
    file.write_text("\n".join(lines) + "\n")
    return file


CHOICE = {
    "index": 7, "question": "What is it?", "A": "a cat", "B": "a dog", "answer": "B",
    "category": "animals", "image": base64.b64encode(png("green")).decode(),
}  # fmt: skip


def test_mmbench_rows(tmp_path):
    questions = MMBenchDataset(mmbench(tmp_path, CHOICE, {**CHOICE, "hint": "It barks."}))
    first, second = questions[0], questions[1]
    assert (first.name, first.kind, first.answers) == ("7", "animals", ("B",))
    assert first.choices == (("A", "a cat"), ("B", "a dog"))
    (message,) = questions.opened(first)
    assert message["content"][0]["image"].getpixel((0, 0)) == (0, 128, 0)
    assert message["content"][1]["text"] == (
        "\nWhat is it?\nA. a cat\nB. a dog\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert second.messages[0]["content"][1]["text"].startswith("\nIt barks.\nWhat is it?\n")


@pytest.mark.parametrize(("answer", "shown"), [("D", "'D'"), ("", "''")])
def test_mmbench_without_an_answer(tmp_path, answer, shown):
    with pytest.raises(ValueError, match=f"bench.tsv:2: the answer is {shown}.*options A, B"):
        MMBenchDataset(mmbench(tmp_path, {**CHOICE, "answer": answer}))


def test_mmbench_with_damaged_base64(tmp_path):
    with pytest.raises(ValueError, match="bench.tsv:2: .*base64 is damaged"):
        MMBenchDataset(mmbench(tmp_path, {**CHOICE, "image": "?!"}))


def test_mmbench_rows_may_share_an_image(tmp_path):
    again = {**CHOICE, "index": 1000007, "image": 7}
    questions = MMBenchDataset(mmbench(tmp_path, CHOICE, again, {**again, "image": 1000007}))
    images = [questions[place].messages[0]["content"][0]["image"] for place in range(3)]
    assert images[0] == images[1] == images[2]
    with pytest.raises(ValueError, match="bench.tsv:2: .*that of the row with index 7, and no row"):
        MMBenchDataset(mmbench(tmp_path, again, CHOICE))


# --------------------------------------------------------------- RefCOCO

PIXELS = {
    "img_id": "COCO_train2014_000000581857_2", "sents": "the blue box", "height": 400, "width": 200,
    "bbox": [50, 100, 100, 200],
}  # fmt: skip


def test_refcoco_in_pixels(images):
    questions = RefCOCODataset([PIXELS], image_folder=images)
    first = questions[0]
    # left 50 / 200, top 100 / 400, right (50 + 100) / 200, bottom (100 + 200) / 400
    assert first.box == (0.25, 0.25, 0.75, 0.75)
    assert first.answers == ("{<25><25><75><75>}",)
    (message,) = questions.opened(first)
    assert message["content"][0]["text"] == "[refer] give me the location of the blue box\n"
    assert message["content"][1]["image"].getpixel((0, 0))[2] > 250


def test_refcoco_in_percent(images, tmp_path):
    row = {"id": "x", "image": "red.png", "sents": "all", "bbox": [0, 0, 100, 50]}
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps([row]))
    questions = RefCOCODataset(file, image_folder=images, instruction="Where is {}?")
    assert questions[0].box == (0, 0, 1, 0.5)
    assert questions.opened(questions[0])[0]["content"][0]["text"] == "Where is all?\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [1, 2, 3]}, "rows:1: bbox is .* four numbers"),
        ({"bbox": [150, 100, 100, 200]}, "rows:1: bbox .* no box inside the image"),
        ({"img_id": "581857"}, "rows:1: img_id '581857' is not of the form"),
        ({"sents": None, "bbox": [0, 0, 0, 0]}, "no box inside"),
    ],
)
def test_rows_that_are_no_boxes(change, message):
    with pytest.raises(ValueError, match=message):
        RefCOCODataset([{**PIXELS, **change}])


def test_a_missing_column_is_named():
    row = {key: value for key, value in PIXELS.items() if key != "sents"}
    with pytest.raises(ValueError, match="rows:1: the row has no 'sents'; it has: img_id"):
        RefCOCODataset([row])
    with pytest.raises(ValueError, match="has no {} for the thing"):
        RefCOCODataset([PIXELS], instruction="Where?")


def test_a_question_is_plain_data():
    assert repr(Question("a", (), ("x",))) == repr(Question("a", (), ("x",)))
