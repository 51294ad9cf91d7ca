"""A tiny base model on disk, and adapters for it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_llama, tiny_tokenizer
from xtuner_lite.models.weights import save_adapter


def save_base(folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A tiny chat model in Hugging Face form."""
    tiny_llama(**options).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_random_adapter(base: Path, config: Any, folder: Path) -> Path:
    """An adapter of ``base`` whose every trained number was moved by a little noise."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(base), dtype="auto")
    model.name_or_path = str(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about ties and missing biases, which the tests are about
        adapted = get_peft_model(model, copy.deepcopy(config))
    noise = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            parameter.data.add_(torch.randn(parameter.shape, generator=noise) * 0.05)
    save_adapter(adapted, folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """float32, head tied to the embedding."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def untied(tmp_path_factory) -> Path:
    """bfloat16, with a head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    return save_base(folder, dtype=torch.bfloat16, tie_word_embeddings=False)


@pytest.fixture()
def adapter_of(tmp_path) -> Callable[..., Path]:
    """Makes an adapter: adapter_of(base, config)."""
    return lambda base, config: save_random_adapter(base, config, tmp_path / "adapter")
