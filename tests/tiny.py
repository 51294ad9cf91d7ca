"""Tiny offline stand-ins for tests: a ChatML tokenizer trained on a few sentences, a 2-layer Llama."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

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
