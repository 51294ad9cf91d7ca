"""Random conversations with images: tokens, masks and cuts hold for all of them."""

import random

import numpy as np
import pytest

from tests.vision_parts import picture, vision_tokenizer
from xtuner_lite.data.dataset import ChatDataset
from xtuner_lite.structures import IGNORE_INDEX

WORDS = (
    "cat",
    "two  spaces",
    "\n",
    "猫",
    "🙂",
    "<b>",
    "{{x}}",
    "im_end",
    "<imag ",
    "ge>",
    " ",
    "Paris",
)
SIZES = {"a.png": (40, 30), "b.png": (30, 60), "c.png": (9, 9)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, size in SIZES.items():
        picture("red", size).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return vision_tokenizer(tmp_path_factory.mktemp("parts"))


def text(rng):
    return "".join(rng.choice(WORDS) for _ in range(rng.randint(1, 6))) + "."


def conversation(rng):
    messages = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": text(rng)})
    for _ in range(rng.randint(1, 4)):
        parts = []
        for _ in range(rng.randint(1, 4)):
            if rng.random() < 0.4:
                parts.append({"type": "image", "image": rng.choice(list(SIZES))})
            else:
                parts.append({"type": "text", "text": text(rng)})
        if rng.random() < 0.3:
            parts = text(rng)
        messages.append({"role": "user", "content": parts})
        answer = {"role": "assistant", "content": text(rng)}
        if rng.random() < 0.2:
            answer["loss"] = False
        messages.append(answer)
    if not any(m.get("loss", True) for m in messages if m["role"] == "assistant"):
        messages[-1].pop("loss", None)
    return messages


def names_in(messages):
    lists = [m["content"] for m in messages if isinstance(m["content"], list)]
    return [p["image"] for parts in lists for p in parts if p["type"] == "image"]


def as_is(row):
    return row


@pytest.mark.parametrize("seed", range(25))
def test_random_conversations(tokenizer, folder, seed):
    rng = random.Random(seed)
    rows = [{"messages": conversation(rng)} for _ in range(5)]
    options = dict(tokenizer=tokenizer, map_fn=as_is, image_folder=folder, cache=False)
    dataset = ChatDataset(rows, packing="none", max_length=None, **options)
    vision = tokenizer.vision
    assert len(dataset) == len(rows)
    for row, sample in zip(rows, dataset):
        messages, names = row["messages"], names_in(row["messages"])
        plain = [{k: v for k, v in m.items() if k != "loss"} for m in messages]
        rendered = vision.processor.apply_chat_template(plain, tokenize=False)
        images = [picture("red", SIZES[name]) for name in names] or None
        whole = vision.processor(text=[rendered], images=images, add_special_tokens=False)
        assert sample["input_ids"].tolist() == whole["input_ids"][0]
        learnt = sample["labels"] != IGNORE_INDEX
        answers = [m for m in messages if m["role"] == "assistant" and m.get("loss", True)]
        said = "".join(m["content"] + "<|im_end|>" for m in answers)
        assert tokenizer.decode(sample["input_ids"][learnt]) == said
        assert not (sample["input_ids"][learnt] == vision.image_token_id).any()
        assert [ref.name for refs in sample.get("images", []) for ref in refs] == names
    packed = ChatDataset(rows, max_length=2048, **options)
    assert packed.num_images.sum() == dataset.num_images.sum()
    assert packed.ledger.tokens_supervised == dataset.ledger.tokens_supervised
    limit = rng.randint(30, 150)
    cut = ChatDataset(
        rows, packing="none", max_length=limit, on_bad_row="skip",
        overlong=rng.choice(["truncate", "truncate_left", "drop"]), **options,
    ) if any(len(s["input_ids"]) <= limit for s in dataset) else []  # fmt: skip
    for sample in cut:
        assert len(sample["input_ids"]) <= limit
        refs = [ref for refs in sample.get("images", []) for ref in refs]
        wanted = sum(vision.num_image_tokens(ref.size) for ref in refs)
        assert int(np.sum(sample["input_ids"] == vision.image_token_id)) == wanted
