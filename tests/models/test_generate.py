"""Replies stop where the template says and leave no trace in a running training."""

import math
import random

import pytest
import torch
from peft import LoraConfig

from tests.tiny import tiny_llama, tiny_speaker, tiny_tokenizer
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.generate import _processors, generate_reply, stream_reply
from xtuner_lite.models.sampling import ReplyStats, Sampling
from xtuner_lite.templates import ChatTemplate

TOKENIZER = tiny_tokenizer()
MESSAGES = [{"role": "user", "content": "Who are you?"}]


def speaker(text):
    return tiny_speaker(TOKENIZER, text)


def test_stops_where_the_template_ends_a_turn():
    assert generate_reply(speaker("Hi!"), TOKENIZER, MESSAGES) == "Hi!"


def test_max_new_tokens_ends_a_reply():
    assert generate_reply(speaker("Hi!"), TOKENIZER, MESSAGES, max_new_tokens=1) in ("H", "Hi")


def test_streamed_pieces_make_up_the_reply():
    pieces = list(stream_reply(speaker("Hi!"), TOKENIZER, MESSAGES))
    assert "".join(pieces) == "Hi!"


def test_a_reader_that_leaves_ends_the_generation():
    stream = stream_reply(tiny_llama(), TOKENIZER, MESSAGES, max_new_tokens=400)
    next(stream)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


def test_a_failure_reaches_the_reader():
    with pytest.raises(ValueError, match="temperature is -1; it must be 0 or more"):
        list(stream_reply(tiny_llama(), TOKENIZER, MESSAGES, temperature=-1))


def test_sampling_repeats_with_its_seed():
    model = tiny_llama()

    def reply(**options):
        return generate_reply(model, TOKENIZER, MESSAGES, max_new_tokens=12, **options)

    assert reply() == reply()
    assert reply(temperature=2.0, seed=1) == reply(temperature=2.0, seed=1)
    assert reply(temperature=2.0, seed=1) != reply(temperature=2.0, seed=2)
    assert reply(temperature=2.0, seed=1, top_k=1) == reply()
    assert reply(temperature=2.0, seed=1, top_p=1e-9) == reply()


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2)])
def test_nothing_of_the_training_is_touched(lora):
    sft = SupervisedFinetune(
        tiny_llama(attention_dropout=0.1), lora=lora, activation_checkpointing=True
    )
    base = sft.llm.get_base_model() if lora else sft.llm
    base.model.norm.eval()
    own = base.generation_config
    torch.manual_seed(3)
    before = (torch.get_rng_state(), random.getstate())
    modes = [m.training for m in sft.modules()]
    trainable = list(sft.trainable_parameters())
    generate_reply(sft.llm, TOKENIZER, MESSAGES, max_new_tokens=3, temperature=1.0, seed=9)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert [m.training for m in sft.modules()] == modes
    assert base.generation_config is own
    assert any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
    assert list(sft.trainable_parameters()) == trainable
    assert base.config._attn_implementation == "packed_sdpa"


def test_everything_is_put_back_after_a_failure(monkeypatch):
    model = tiny_llama()
    own = model.generation_config
    monkeypatch.setattr(model, "generate", lambda **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate_reply(model, TOKENIZER, MESSAGES)
    assert model.training
    assert model.generation_config is own


def test_a_prompt_that_fills_the_context_is_refused():
    model = tiny_llama(max_position_embeddings=16)
    with pytest.raises(ValueError, match="the model sees 16 at once; shorten it or start anew"):
        generate_reply(model, TOKENIZER, [{"role": "user", "content": "one two " * 40}])


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("max_new_tokens", 0, "1 or more"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_k", -1, "0 or more"),
        ("repetition_penalty", 0.0, "above 0"),
        ("temperature", math.nan, "0 or more"),
        ("seed", -1, r"at least 0 and below 2\*\*63"),
    ],
)
def test_options_out_of_range_are_refused(option, value, allowed):
    with pytest.raises(ValueError, match=f"{option} is {value}; it must be {allowed}"):
        Sampling(**{option: value})


def reply_and_stats(model, messages=MESSAGES, **options):
    stats = ReplyStats()
    return generate_reply(model, TOKENIZER, messages, stats=stats, **options), stats


def test_how_a_reply_ended_is_known():
    num_prompt = len(ChatTemplate(TOKENIZER).prompt_ids(MESSAGES))
    num_reply = len(TOKENIZER("Hi!")["input_ids"])
    reply, stats = reply_and_stats(speaker("Hi!"))
    assert (reply, stats) == ("Hi!", ReplyStats(num_prompt, num_reply + 1, "stop"))  # with EOS
    _, stats = reply_and_stats(speaker("Hi!"), max_new_tokens=num_reply)
    assert stats == ReplyStats(num_prompt, num_reply, "length")
    _, stats = reply_and_stats(tiny_llama(max_position_embeddings=num_prompt + 4))
    assert stats == ReplyStats(num_prompt, 4, "length")


def test_a_stream_tells_how_it_ended():
    stats = ReplyStats()
    stream = stream_reply(tiny_llama(), TOKENIZER, MESSAGES, max_new_tokens=400, stats=stats)
    next(stream)
    assert stats.prompt_tokens > 0
    stream.close()
    assert stats.finish_reason == "cancelled"
    assert 1 <= stats.completion_tokens < 400


def test_tools_reach_the_template():
    tokenizer = tiny_tokenizer(
        TOKENIZER.chat_template + "{% if tools %}{{ tools[0].name }}{% endif %}"
    )
    stats = ReplyStats()
    generate_reply(
        speaker("Hi!"), tokenizer, MESSAGES, tools=[{"name": "look"}], stats=stats, max_new_tokens=1
    )
    _, without = reply_and_stats(speaker("Hi!"), max_new_tokens=1)
    assert stats.prompt_tokens == without.prompt_tokens + len(tokenizer("look")["input_ids"])


def test_text_parts_are_text_and_other_parts_are_refused():
    def asked(*parts):
        return [{"role": "user", "content": list(parts)}]

    hello = [{"type": "text", "text": "Who are"}, {"type": "text", "text": " you?"}]
    assert reply_and_stats(speaker("Hi!"), asked(*hello)) == reply_and_stats(speaker("Hi!"))
    image = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
    with pytest.raises(ValueError, match=r"message 1 \(user\) holds a part of type 'image_url'; t"):
        generate_reply(speaker("Hi!"), TOKENIZER, asked(*hello, image))


def test_a_template_that_raises_says_why():
    tokenizer = tiny_tokenizer("{{ raise_exception('only one user') }}")
    with pytest.raises(
        ValueError, match=r"refuses the conversation \(roles: user\): only one user"
    ):
        generate_reply(speaker("Hi!"), tokenizer, MESSAGES)


def test_a_temperature_near_zero_is_greedy():
    greedy, _ = reply_and_stats(tiny_llama(), max_new_tokens=8)
    assert reply_and_stats(tiny_llama(), max_new_tokens=8, temperature=1e-40)[0] == greedy


def test_draws_follow_the_probabilities():
    """4,000 draws at temperature 2 of logits (2 ln 1, 2 ln 3): shares 1/4 and 3/4, +- 0.02."""
    (warp, draw) = _processors(Sampling(temperature=2.0, seed=0), torch.device("cpu"))
    logits = torch.tensor([[0.0, 2 * math.log(3)]])
    chosen = [draw(None, warp(None, logits)).argmax().item() for _ in range(4_000)]
    assert sum(chosen) / len(chosen) == pytest.approx(0.75, abs=0.02)
