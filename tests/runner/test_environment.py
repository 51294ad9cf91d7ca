"""Process settings and compiling of layers."""

import pytest
import torch
from torch import nn

from tests.tiny import tiny_llama
from xtuner_lite.runner.environment import apply_env, compile_layers


def test_threads():
    before = torch.get_num_threads()
    try:
        apply_env(num_threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_each_decoder_layer_is_compiled_and_computes_the_same():
    model = tiny_llama(attn="sdpa").eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(ids).logits
        assert compile_layers(model, backend="eager") == 2
        assert all(layer._compiled_call_impl is not None for layer in model.model.layers)
        torch.testing.assert_close(model(ids).logits, expected)


def test_a_model_without_repeated_layers_is_refused():
    with pytest.raises(ValueError, match="compile=True found no repeated layers"):
        compile_layers(nn.Linear(1, 1))
