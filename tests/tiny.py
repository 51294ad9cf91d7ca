"""Tiny offline stand-ins for tests: a ChatML tokenizer, a 2-layer Llama, small batches."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from xtuner_lite.structures import Batch

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SENTENCES = (
    "Who are you? I am a small helper, trained to answer questions.",
    "The capital of France is Paris. The sky is blue and the grass is green.",
    "user assistant system tool",
    "What is two plus two? Two plus two is four. One two three four five.",
    "Hello there! How can I help you today? Tell me a short story about a cat.",
)


@lru_cache(maxsize=1)
def _trained_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A fast byte-level BPE tokenizer (at most 384 tokens; any text round-trips) with ChatML.

    ``<|endoftext|>`` is 0 (pad), ``<|im_start|>`` 1, ``<|im_end|>`` 2 (eos). A fresh object each
    call, so that a test may change its template.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_json()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_llama(
    *,
    vocab_size: int = 384,
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    tie_word_embeddings: bool = True,
    attn: str = "packed_sdpa",
    seed: int = 0,
    **config: Any,
) -> LlamaForCausalLM:
    """A random fp32 Llama (2 layers, 32 wide) whose weights depend on ``seed`` alone.

    Its vocabulary covers tiny_tokenizer(). ``config`` goes to LlamaConfig. The weights are drawn
    ten times wider than usual, so that logits differ visibly between tokens and contexts.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import xtuner_lite.models.attention  # noqa: F401  (registers "packed_sdpa")

    config = {
        "initializer_range": 0.2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
        **config,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                intermediate_size=2 * hidden_size,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                num_key_value_heads=num_kv_heads,
                tie_word_embeddings=tie_word_embeddings,
                attn_implementation=attn,
                **config,
            )
        )
    return model.train()


def tiny_speaker(tokenizer: PreTrainedTokenizerFast, text: str) -> LlamaForCausalLM:
    """A model that answers ``text``, ends its turn and would then talk on, whatever it is asked.

    Its next token depends on the last one alone, so each token of ``text`` may appear only once.
    """
    import torch

    ids = tokenizer(text + "<|im_end|>zq")["input_ids"]
    prompt_end = tokenizer("assistant\n")["input_ids"][-1]
    model = tiny_llama(hidden_size=384, num_layers=1, tie_word_embeddings=False)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(384))
        model.lm_head.weight.zero_()
        for token, following in zip([prompt_end, *ids], ids, strict=False):
            assert not model.lm_head.weight[:, token].any(), f"token {token} appears twice"
            model.lm_head.weight[following, token] = 1.0
    return model.eval()


def tiny_batch(rows: list[list[list[int]]], *, num_prompt: int = 2) -> Batch:
    """A collated batch of packed rows, as packed_collate makes it.

    Each row is a list of segments, each segment a list of token ids whose first ``num_prompt``
    carry no label. Shorter rows are filled up with token 0, a segment of its own without labels.
    """
    import torch

    from xtuner_lite.structures import IGNORE_INDEX

    width = max(sum(map(len, row)) for row in rows)
    ids, labels, positions, lengths = [], [], [], []
    for row in rows:
        segments = list(row)
        if missing := width - sum(map(len, row)):
            segments.append([0] * missing)
        padded = len(segments) > len(row)
        ids.append([token for segment in segments for token in segment])
        labels.append([])
        for index, segment in enumerate(segments):
            is_padding = padded and index == len(segments) - 1
            hidden = len(segment) if is_padding else num_prompt
            labels[-1] += [IGNORE_INDEX] * min(hidden, len(segment)) + segment[hidden:]
            lengths.append(len(segment))
        positions.append([p for segment in segments for p in range(len(segment))])
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "position_ids": torch.tensor(positions),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "num_tokens": sum(len(segment) for row in rows for segment in row),
        "row_ids": [[f"tiny:{i}:{j}" for j in range(len(row))] for i, row in enumerate(rows)],
    }


def tiny_segments(*lengths: int, vocab_size: int = 384, seed: int = 0) -> list[list[int]]:
    """Random token ids (3 and up), one list per length."""
    import random

    numbers = random.Random(seed)
    return [[numbers.randrange(3, vocab_size) for _ in range(length)] for length in lengths]
