"""Batched replies are those made one by one, and leave the model as it was."""

import pytest
import torch

from tests.tiny import tiny_llama, tiny_speaker, tiny_tokenizer
from xtuner_lite.models.generate import generate_reply
from xtuner_lite.models.generate_batch import _Prompt, generate_replies

TOKENIZER = tiny_tokenizer()
QUESTIONS = (
    "Who are you?",
    "Tell me a short story about a cat and the sky and the grass, and about two plus two.",
    "Hello!",
    "One two three four five.",
    "What is the capital of France?",
)
CONVERSATIONS = [[{"role": "user", "content": question}] for question in QUESTIONS]


@pytest.mark.parametrize("attn", ["packed_sdpa", "sdpa", "eager"])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_equal_to_one_by_one(attn, batch_size):
    model = tiny_llama(attn=attn)
    wanted = [
        generate_reply(model, TOKENIZER, messages, max_new_tokens=12) for messages in CONVERSATIONS
    ]
    assert len(set(wanted)) == len(wanted), "the prompts must make a difference"
    replies = generate_replies(
        model, TOKENIZER, CONVERSATIONS, batch_size=batch_size, max_new_tokens=12
    )
    assert replies == wanted


def test_replies_end_each_where_its_turn_ends():
    model = tiny_speaker(TOKENIZER, "Hi!")
    assert generate_replies(model, TOKENIZER, CONVERSATIONS) == ["Hi!"] * len(CONVERSATIONS)
    assert generate_replies(model, TOKENIZER, CONVERSATIONS, stop_words=["!"]) == ["Hi"] * 5


def test_the_model_is_left_as_it_was():
    model = tiny_llama()
    before = model.generation_config
    generate_replies(model, TOKENIZER, CONVERSATIONS, max_new_tokens=2)
    assert model.training
    assert model.generation_config is before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bad_input():
    model = tiny_llama()
    assert generate_replies(model, TOKENIZER, []) == []
    with pytest.raises(ValueError, match="batch_size is 0"):
        generate_replies(model, TOKENIZER, CONVERSATIONS, batch_size=0)
    small = tiny_llama(max_position_embeddings=16)
    with pytest.raises(ValueError, match="the model sees 16 at once"):
        generate_replies(small, TOKENIZER, CONVERSATIONS)
    image = [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]
    with pytest.raises(ValueError, match="part of type 'image'.*reads text only"):
        generate_replies(model, TOKENIZER, [image])


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """(model, vision tokenizer) of tiny parts, drawn wide enough for images to matter."""
    from tests.tiny_parts import write_tiny_llm, write_tiny_tower
    from xtuner_lite.methods.llava import LLaVAModel
    from xtuner_lite.models.llava import load_visual_encoder
    from xtuner_lite.models.loading import load_causal_lm
    from xtuner_lite.models.processors import load_llava_processor

    llm = write_tiny_llm(tmp_path_factory.mktemp("llm"))
    tower = write_tiny_tower(tmp_path_factory.mktemp("tower"))
    tokenizer = load_llava_processor(llm, tower)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        method = LLaVAModel(load_causal_lm(llm), load_visual_encoder(tower), tokenizer=tokenizer)
        for parameter in method.projector.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return method.llm, tokenizer


def showing(text, *colours):
    from PIL import Image

    pictures = [Image.new("RGB", (28, 28), colour) for colour in colours]
    for picture in pictures:
        picture.putpixel((3, 9), (0, 255, 0))
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_images_reach_their_own_conversations(seeing):
    model, tokenizer = seeing
    conversations = [
        showing("What?", "red"),
        showing("Tell me a short story about it.", "blue"),
        [{"role": "user", "content": "Hello there!"}],  # no image among those with
        showing("What?", "white", "black"),
        showing("What?", "black", "white"),
        showing("What?", "black"),
    ]
    wanted = [
        generate_reply(model, tokenizer, messages, max_new_tokens=10) for messages in conversations
    ]
    assert len(set(wanted)) == len(wanted), "the images must make a difference"
    for batch_size in (2, 6):
        replies = generate_replies(
            model, tokenizer, conversations, batch_size=batch_size, max_new_tokens=10
        )
        assert replies == wanted


def test_images_of_unlike_layouts_do_not_stand_in_one_batch():
    """LLaVA-OneVision's have [images, crops, 3, H, W]: of one number of crops only."""
    narrow = dict(pixel_values=torch.zeros(1, 2, 3, 8, 8), image_sizes=torch.zeros(1, 2))
    two_narrow = dict(pixel_values=torch.zeros(2, 2, 3, 8, 8), image_sizes=torch.zeros(2, 2))
    wide = dict(pixel_values=torch.zeros(1, 3, 3, 8, 8), image_sizes=torch.zeros(1, 2))
    layouts = [_Prompt(0, [1], images).layout for images in (narrow, two_narrow, wide)]
    assert layouts[0] == layouts[1] != layouts[2]
