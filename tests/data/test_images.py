"""Rows with images: where their tokens stand, what is learnt, what is refused, packing, cache."""

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import tiny_tokenizer
from tests.vision_parts import picture, vision_tokenizer
from xtuner_lite.data import cache as cache_module
from xtuner_lite.data.dataloader import build_dataloader
from xtuner_lite.data.dataset import ChatDataset
from xtuner_lite.data.mixture import MixtureDataset
from xtuner_lite.data.preview import render_preview
from xtuner_lite.data.preview_html import render_page
from xtuner_lite.data.row_images import images_in_part
from xtuner_lite.data.sampler import LengthGroupedSampler
from xtuner_lite.data.stream import StreamDataset
from xtuner_lite.structures import IGNORE_INDEX
from xtuner_lite.templates import TemplateError

SHARED = Path(__file__).parents[3] / "shared" / "data" / "vlm"
NUM_TOKENS = 4  # of one image


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tmp_path_factory.mktemp("parts")


@pytest.fixture
def tokenizer(parts):
    return vision_tokenizer(parts)


@pytest.fixture
def folder(tmp_path):
    for name, color, size in (
        ("a", "red", (40, 30)),
        ("b", "blue", (30, 60)),
        ("c", "green", (9, 9)),
    ):
        picture(color, size).save(tmp_path / f"{name}.png")
    return tmp_path


def llava(*turns, image="a.png"):
    roles = ("human", "gpt")
    talk = [{"from": roles[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"image": image, "conversations": talk}


def make(rows, tokenizer, folder, **options):
    options = {"max_length": 256, "cache": False, "image_folder": folder, **options}
    return ChatDataset(rows, tokenizer=tokenizer, **options)


def learnt_text(tokenizer, sample):
    return tokenizer.decode(sample["labels"][sample["labels"] != IGNORE_INDEX])


def test_the_text_is_the_processors_own(tokenizer, folder):
    """Tokens are those of transformers' processor for the same conversation; answers are learnt."""
    rows = [llava("<image>\nWhat is it?", "A red thing.", "And this? <image>", "Blue.")]
    rows[0]["image"] = ["a.png", "b.png"]
    sample = make(rows, tokenizer, folder)[0]
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat is it?"}]},
        {"role": "assistant", "content": "A red thing."},
        {"role": "user", "content": [{"type": "text", "text": "And this? "}, {"type": "image"}]},
        {"role": "assistant", "content": "Blue."},
    ]
    processor = tokenizer.vision.processor
    text = processor.apply_chat_template(chat, tokenize=False)
    images = [picture("red", (40, 30)), picture("blue", (30, 60))]
    whole = processor(text=[text], images=images, add_special_tokens=False)
    assert sample["input_ids"].tolist() == whole["input_ids"][0]
    assert (sample["input_ids"] == tokenizer.vision.image_token_id).sum() == 2 * NUM_TOKENS
    assert learnt_text(tokenizer, sample) == "A red thing.<|im_end|>Blue.<|im_end|>"
    assert [ref.name for ref in sample["images"][0]] == ["a.png", "b.png"]


def test_image_tokens_are_not_learnt_even_with_train_on_all(tokenizer, folder):
    sample = make([llava("<image> Hm?", "Yes.")], tokenizer, folder, train_on="all")[0]
    is_image = sample["input_ids"] == tokenizer.vision.image_token_id
    assert is_image.sum() == NUM_TOKENS
    assert (sample["labels"][is_image] == IGNORE_INDEX).all()
    assert (sample["labels"][~is_image][1:] != IGNORE_INDEX).all()


def test_a_batch_holds_the_pixels_in_the_order_of_the_tokens(tokenizer, folder):
    rows = [
        llava("<image> x", "r"),
        llava("<image> y", "b", image="b.png"),
        llava("hi", "t", image=None),
    ]
    dataset = make(rows, tokenizer, folder)
    assert len(dataset) == 1
    assert dataset.num_images.tolist() == [2]
    batch = next(iter(build_dataloader(dataset, tokenizer=tokenizer, shuffle=False)))[0]
    assert batch["num_images"] == 2
    assert batch["images"]["pixel_values"].shape == (2, 3, 28, 28)
    of_row = [s for s in dataset[0]["images"] if s]
    alone = [tokenizer.vision.model_inputs([refs[0].open()])["pixel_values"] for refs in of_row]
    assert torch.equal(batch["images"]["pixel_values"], torch.cat(alone))
    assert not torch.equal(alone[0], alone[1])


def test_a_batch_of_text_gets_a_filler_that_teaches_nothing(tokenizer, folder):
    rows = [llava("hello there", "t", image=None), llava("hi", "u", image=None)]
    dataset = make(rows, tokenizer, folder, packing="none")
    batch = next(iter(build_dataloader(dataset, 2, tokenizer=tokenizer, shuffle=False)))[0]
    assert batch["num_images"] == 0
    assert batch["images"]["pixel_values"].shape == (1, 3, 28, 28)
    is_image = batch["input_ids"] == tokenizer.vision.image_token_id
    assert is_image.sum() == NUM_TOKENS
    assert (batch["labels"][is_image] == IGNORE_INDEX).all()
    assert batch["num_tokens"] == sum(len(dataset[i]["input_ids"]) for i in range(2))
    borders = batch["cu_seqlens"].tolist()
    first = int(is_image.reshape(-1).nonzero()[0])
    assert first in borders
    assert first + NUM_TOKENS in borders
    assert int(batch["position_ids"].reshape(-1)[first]) == 0
    labels = [batch["labels"][i][batch["labels"][i] != IGNORE_INDEX].tolist() for i in range(2)]
    assert labels == [
        dataset[i]["labels"][dataset[i]["labels"] != IGNORE_INDEX].tolist() for i in range(2)
    ]


def test_a_tokenizer_of_text_refuses_images(folder):
    with pytest.raises(ValueError, match="images need a tokenizer that reads them.*load_processor"):
        ChatDataset([llava("<image> x", "y")], tokenizer=tiny_tokenizer(), cache=False)
    with pytest.raises(ValueError, match="with a tokenizer that reads text only"):
        make([llava("x", "y", image=None)], tiny_tokenizer(), folder)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (llava("no mark", "y"), "0 x <image> in the conversation, but 1 images"),
        (llava("<image><image>", "y"), "2 x <image> in the conversation, but 1 images"),
        (llava("<image>", "y", image=None), "1 x <image> in the conversation, but 0 images"),
        (llava("<image>", "y", image="none.png"), r"none\.png does not exist in image_folder"),
        (llava("<image>", "y", image="../a.png"), "lies outside image_folder"),
        (llava("<image>", "y", image="http://x/a.png"), "is a web address"),
        (llava("<image>", "It is <image>."), "2 x <image>"),
    ],
)
def test_bad_rows_are_named(tokenizer, folder, row, message):
    with pytest.raises(ValueError, match=f"rows:1: .*{message}"):
        make([row], tokenizer, folder)


def test_unreadable_images_are_counted_apart(tokenizer, folder):
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:60])
    rows = [
        llava("<image>", "y"),
        llava("<image>", "y", image="cut.png"),
        llava("<image>", "y", image="no"),
    ]
    ledger = make(rows, tokenizer, folder, on_bad_row="skip").ledger
    assert ledger.rows_kept == 1
    assert ledger.images == 1
    entry = ledger.skipped["an image cannot be read"]
    assert entry.count == 2
    assert "rows:2" in entry.examples[0]
    assert "cut.png" in entry.examples[0]


def test_a_kept_data_set_tells_the_images_it_lacks(tokenizer, folder, tmp_path, monkeypatch):
    """An image that is there by now is no reason for another entry: nothing else would tell."""
    told = []
    monkeypatch.setattr(cache_module, "_say", lambda text, level=0: told.append((level, text)))
    rows = [llava("<image>", "y"), llava("<image>", "y", image="late.png")]
    (folder / "rows.json").write_text(json.dumps(rows))
    options = dict(on_bad_row="skip", cache=str(tmp_path / "kept"))
    make(str(folder / "rows.json"), tokenizer, folder, **options)
    picture().save(folder / "late.png")
    told.clear()
    make(str(folder / "rows.json"), tokenizer, folder, **options)
    level, text = told[-1]
    assert level == logging.WARNING
    assert "lacks 1 row(s) whose images could not be read" in text
    assert f"delete {tmp_path / 'kept'}" in text


def test_a_text_with_the_image_token_is_refused(tokenizer, folder):
    row = {"messages": [{"role": "user", "content": "what does <image> mean?"},
                        {"role": "assistant", "content": "A place."}]}  # fmt: skip
    with pytest.raises(ValueError, match="<image>"):
        make([row], tokenizer, folder, map_fn=as_is)


def as_is(row):
    return row


@pytest.mark.parametrize("cls", [ChatDataset, StreamDataset])
def test_plain_text_with_the_image_token_is_refused(tokenizer, folder, cls):
    """It would stand for an image that no batch has, and stop the run at its step."""
    row = {"text": "the tag <image> of a page"}
    with pytest.raises(ValueError, match="text holds the text '<image>'"):
        cls([row], tokenizer=tokenizer, max_length=256, cache=False, image_folder=folder)[0]


def test_what_only_the_template_writes_holds_no_image_token(tokenizer, folder):
    """Reasoning, tool calls and tools are no contents, and are written all the same."""
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "(message.reasoning_content or '') + message['content']"
    )
    asked = {"role": "user", "content": "hi"}
    said = {"role": "assistant", "content": "yes", "reasoning_content": "an <image>?"}
    with pytest.raises(ValueError, match="what the template writes holds the text '<image>'"):
        make([{"messages": [asked, said]}], tokenizer, folder)


@pytest.mark.parametrize("images", [{"image": "a.png"}, {"images": ["a.png"]}])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
        {"instruction": "hi", "input": "", "output": "yes"},
        {"prompt": "hi", "completion": "yes"},
    ],
    ids=["openai", "alpaca", "prompt_completion"],
)
def test_a_rows_image_is_never_left_out_without_a_word(tokenizer, folder, row, images):
    with pytest.raises(ValueError, match="but 1 images|the model would never see it"):
        make([{**row, **images}], tokenizer, folder)
    assert len(make([{**row, "image": "", "images": None}], tokenizer, folder)) == 1


@pytest.mark.parametrize("empty", [{}, {"text": None, "image": None}])
def test_image_parts_without_names_take_the_rows_images(tokenizer, folder, empty):
    """As transformers' templates and TRL's data have them; tables fill absent keys with None."""
    parts = [{"type": "image", **empty}, {"type": "text", "text": "or"}, {"type": "image", **empty}]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]
    sample = make([{"images": ["b.png", "a.png"], "messages": talk}], tokenizer, folder)[0]
    assert [ref.name for ref in sample["images"][0]] == ["b.png", "a.png"]
    with pytest.raises(ValueError, match="2 x <image> in the conversation, but 1 images"):
        make([{"images": ["b.png"], "messages": talk}], tokenizer, folder)


def test_a_template_without_images_stops_the_run(tokenizer, folder):
    tokenizer.chat_template = tiny_tokenizer().chat_template
    with pytest.raises((TemplateError, ValueError), match="image token|concatenate|refuses"):
        make([llava("<image>", "y")], tokenizer, folder)


# ------------------------------------------------------------------------------------------ length


@pytest.mark.parametrize("overlong", ["truncate", "truncate_left"])
@pytest.mark.parametrize("max_length", range(8, 60, 3))
def test_no_image_is_ever_cut(tokenizer, folder, overlong, max_length):
    row = llava("<image> a b c", "one two", "more <image>", "three four", "<image>", "five")
    row["image"] = ["a.png", "b.png", "c.png"]
    least = 20 if overlong == "truncate" else 8  # below it nothing learnt is left
    if max_length < least:
        with pytest.raises(ValueError, match="nothing is supervised"):
            make([row], tokenizer, folder, overlong=overlong, max_length=max_length)
        return
    dataset = make([row], tokenizer, folder, overlong=overlong, max_length=max_length)
    sample = dataset[0]
    assert len(sample["input_ids"]) <= max_length
    count = int((sample["input_ids"] == tokenizer.vision.image_token_id).sum())
    names = [ref.name for ref in sample.get("images", [[]])[0]]
    assert count == NUM_TOKENS * len(names)
    all_names = ["a.png", "b.png", "c.png"]
    assert names == (
        all_names[: len(names)] if overlong == "truncate" else all_names[3 - len(names) :]
    )
    assert dataset.ledger.images == len(names)
    assert dataset.ledger.images_cut == 3 - len(names)
    build = build_dataloader(dataset, tokenizer=tokenizer)
    batch = next(iter(build))[0]
    assert batch["num_images"] == len(names)


def test_images_in_part_by_hand():
    spans = [(2, 6), (10, 14)]
    assert images_in_part(spans, 20, 12, from_end=False) == (10, [0])
    assert images_in_part(spans, 20, 14, from_end=False) == (14, [0, 1])
    assert images_in_part(spans, 20, 3, from_end=False) == (2, [])
    assert images_in_part(spans, 20, 16, from_end=True) == (14, [1])
    assert images_in_part(spans, 20, 18, from_end=True) == (18, [0, 1])


def test_splitting_and_concatenating_rows_with_images_is_refused(tokenizer, folder):
    row = llava("<image> a b c", "one two three four five six seven eight")
    with pytest.raises(ValueError, match="a row with images cannot be split"):
        make([row], tokenizer, folder, overlong="split", max_length=20)
    with pytest.raises(ValueError, match="packing='concat' cuts rows anywhere"):
        make([row], tokenizer, folder, packing="concat")


# ------------------------------------------------------------------------------------------- cache


def write(folder, rows):
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


def same(one, other):
    assert len(one) == len(other)
    for left, right in zip(one, other):
        assert np.array_equal(left["input_ids"], right["input_ids"])
        assert np.array_equal(left["labels"], right["labels"])
        assert left["images"] == right["images"]
    assert one.fingerprint == other.fingerprint


def rows_of_all_kinds(count=40):
    rows = []
    for n in range(count):
        marks = n % 3
        row = llava("<image>" * marks + f"question {n}", f"answer {n}")
        row["image"] = ["a.png", "b.png"][:marks]
        rows.append(row)
    return rows


def test_cache_processes_and_memory_give_the_same(tokenizer, folder, tmp_path):
    path = write(folder, rows_of_all_kinds())
    options = {"image_folder": None, "max_length": 128}  # None: beside the data file
    plain = make(str(path), tokenizer, folder, **options)
    for more in ({"cache": str(tmp_path / "c")}, {"cache": str(tmp_path / "c")}, {"num_proc": 2}):
        same(plain, make(str(path), tokenizer, folder, **options, **more))
    assert plain.num_images.sum() == sum(n % 3 for n in range(40))
    same(plain, pickle.loads(pickle.dumps(plain)))


def test_the_fingerprint_tells_images(tokenizer, folder):
    one = make([llava("<image> x", "y")], tokenizer, folder)
    other = make([llava("<image> x", "y", image="b.png")], tokenizer, folder)
    assert np.array_equal(one[0]["input_ids"], other[0]["input_ids"])
    assert one.fingerprint != other.fingerprint


def test_another_image_size_is_another_entry_of_the_cache(parts, folder, tmp_path):
    path, cache = write(folder, [llava("<image> x", "y")]), str(tmp_path / "c")
    small = make(str(path), vision_tokenizer(parts), folder, cache=cache)
    large = make(str(path), vision_tokenizer(parts, image_size=56), folder, cache=cache)
    assert len(large[0]["input_ids"]) == len(small[0]["input_ids"]) + 16 - NUM_TOKENS


def test_an_image_replaced_by_one_of_another_size_is_found_when_read(tokenizer, folder):
    dataset = make([llava("<image> x", "y")], tokenizer, folder)
    picture("red", (50, 50)).save(folder / "a.png")
    with pytest.raises(ValueError, match="sample 0 .*was 40x30 when the data was prepared"):
        list(build_dataloader(dataset, tokenizer=tokenizer))


def test_images_in_memory(tokenizer, folder):
    row = {"messages": [{"role": "user", "content": [{"type": "image", "image": picture("blue")},
                                                     {"type": "text", "text": "?"}]},
                        {"role": "assistant", "content": "Blue."}]}  # fmt: skip
    sample = make([row], tokenizer, folder)[0]
    assert sample["images"][0][0].open().getpixel((0, 0)) == (0, 0, 255)


# ----------------------------------------------------------------------------- around the data set


def test_workers_read_the_same(tokenizer, folder):
    dataset = make(rows_of_all_kinds(9), tokenizer, folder, packing="none")
    alone = [b for step in build_dataloader(dataset, 2, tokenizer=tokenizer) for b in step]
    loader = build_dataloader(dataset, 2, tokenizer=tokenizer, num_workers=2)
    beside = [b for step in loader for b in step]
    assert len(alone) == len(beside) == 5
    for one, other in zip(alone, beside):
        assert torch.equal(one["images"]["pixel_values"], other["images"]["pixel_values"])
        assert torch.equal(one["input_ids"], other["input_ids"])


def test_mixtures_and_streams(tokenizer, folder):
    path = write(folder, rows_of_all_kinds(20))
    text = [{"instruction": f"q{n}", "output": "a"} for n in range(4)]
    options = {"type": ChatDataset, "cache": False, "max_length": 64}
    mixture = MixtureDataset(
        [dict(dataset={**options, "data": str(path)}), dict(dataset={**options, "data": text})],
        tokenizer=tokenizer,
    )  # fmt: skip
    assert mixture.num_images.sum() == 20 - 1
    batches = [b for step in build_dataloader(mixture, 2, tokenizer=tokenizer) for b in step]
    assert sum(b["num_images"] for b in batches) == 19
    assert all(len(b["segment_sources"]) == len(b["cu_seqlens"]) - 1 for b in batches)
    stream = StreamDataset(
        str(path), tokenizer=tokenizer, max_length=64, window_rows=20, cache=False, shuffle=False
    )
    plain = make(str(path), tokenizer, folder, max_length=64)
    for index in range(len(plain)):
        assert stream[index]["images"] == plain[index]["images"]


def test_steps_of_one_modality():
    class Some:
        lengths = np.array([5] * 40)
        num_images = np.array([1, 0] * 20)

    sampler = LengthGroupedSampler(40, dataset=Some(), group_size=4, by_modality=True, seed=3)
    steps = Some.num_images[sampler.order(0)].reshape(-1, 4)
    assert sorted(sampler.order(0)) == list(range(40))
    assert {tuple(set(step)) for step in steps.tolist()} == {(0,), (1,)}
    plain = LengthGroupedSampler(40, dataset=Some(), group_size=4, seed=3)
    assert not all(
        len(set(step)) == 1 for step in Some.num_images[plain.order(0)].reshape(-1, 4).tolist()
    )
    Some.num_images = None
    with pytest.raises(ValueError, match="needs the images of each sample"):
        LengthGroupedSampler(40, dataset=Some(), by_modality=True)


def test_previews_show_the_images(tokenizer, folder):
    dataset = make([llava("<image>\nWhat?", "<b>Red</b>.")], tokenizer, folder)
    text = render_preview(dataset[0], tokenizer, color=False)
    assert "<image> x4 (a.png, 40x30)" in text
    assert "[[<b>Red</b>.<|im_end|>]]" in text
    page = render_page([("sample 0", dataset[0])], tokenizer, title="t")
    assert page.count("data:image/jpeg;base64,") == 1
    assert "&lt;image&gt; x4" in page
    assert "a.png 40x30" in page
    assert "<b>Red</b>" not in page


def test_a_collator_without_vision_is_refused(tokenizer, folder):
    def plain(samples, *, pad_token_id):
        return samples

    from xtuner_lite.registry import COLLATORS

    dataset = make([llava("<image> x", "y")], tokenizer, folder)
    COLLATORS.register_module(name="plain_collate_of_a_test", module=plain)
    with pytest.raises(ValueError, match="plain has no parameter vision"):
        build_dataloader(
            dataset, tokenizer=tokenizer, collate_fn={"type": "plain_collate_of_a_test"}
        )


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data folder is not beside the checkout")
def test_real_files_of_others(tokenizer, tmp_path):
    for name, count, images in (("eye_exam", 6, 6), ("mllm", 6, 8)):
        for alias in ("test_img", "mllm_demo_data"):
            if not (tmp_path / alias).exists():
                (tmp_path / alias).symlink_to(SHARED / "images")
        dataset = make(str(SHARED / f"{name}.json"), tokenizer, tmp_path, max_length=8192)
        assert dataset.num_rows == count
        assert dataset.ledger.images == images
        batch = next(iter(build_dataloader(dataset, tokenizer=tokenizer)))[0]
        is_image = batch["input_ids"] == tokenizer.vision.image_token_id
        assert is_image.sum() == images * NUM_TOKENS
        assert batch["num_images"] == images
