"""Packed samples never see each other, and plain attention stays what it was."""

import pytest
import torch

from tests.tiny import tiny_batch, tiny_llama, tiny_segments
from xtuner_lite.models.attention import (
    no_packing_mask,
    packed_sdpa_forward,
    segment_kwargs,
)
from xtuner_lite.models.packed_forward import packed_hidden_states


def hidden(model, batch):
    return packed_hidden_states(
        model, batch["input_ids"], batch["position_ids"], batch["cu_seqlens"]
    )


def small_model(name, **settings):
    """A random 2-layer model of another architecture with packed_sdpa."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        name, vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
        initializer_range=0.2, pad_token_id=0, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="packed_sdpa").eval()


def test_packed_equals_each_sample_alone():
    model = tiny_llama().eval()
    segments = tiny_segments(7, 1, 12, 5)
    packed = hidden(model, tiny_batch([segments]))[0].split([7, 1, 12, 5])
    for ours, segment in zip(packed, segments, strict=True):
        alone = model.model(torch.tensor([segment])).last_hidden_state[0]
        torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-5)


def test_packed_equals_transformers_own_mask():
    batch = tiny_batch([tiny_segments(7, 9, 4), tiny_segments(3, 11, seed=1)])
    ours = hidden(tiny_llama().eval(), batch)
    theirs = hidden(tiny_llama(attn="sdpa").eval(), batch)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_changing_one_sample_leaves_the_others_unchanged_to_the_bit():
    model = tiny_llama().eval()
    segments = tiny_segments(7, 9, 4)
    before = hidden(model, tiny_batch([segments]))[0].split([7, 9, 4])
    segments[1] = [token + 1 if token < 383 else 3 for token in segments[1]]
    after = hidden(model, tiny_batch([segments]))[0].split([7, 9, 4])
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
    assert torch.equal(before[2], after[2])


def test_gradients_of_packed_samples_do_not_mix():
    model = tiny_llama()
    batch = tiny_batch([tiny_segments(6, 8)])
    embedded = model.model.embed_tokens(batch["input_ids"]).detach().requires_grad_()
    segments = segment_kwargs(batch["cu_seqlens"])
    with no_packing_mask(8):
        out = model.model(
            inputs_embeds=embedded, position_ids=batch["position_ids"], use_cache=False, **segments
        )
    out.last_hidden_state[0, :6].square().sum().backward()
    assert embedded.grad[0, :6].abs().sum() > 0
    assert torch.equal(embedded.grad[0, 6:], torch.zeros(8, 32))


def test_flattened_and_unflattened_rows_agree():
    """The attention function itself takes B rows, as plain transformers code would call it."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    layer = torch.nn.Module()
    layer.num_key_value_groups = 2
    cu_seqlens = torch.tensor([0, 2, 6, 9, 12], dtype=torch.int32)
    rows, _ = packed_sdpa_forward(layer, query, key, value, None, cu_seq_lens_q=cu_seqlens)
    assert rows.shape == (2, 6, 4, 8)
    first, _ = packed_sdpa_forward(
        layer, query[:1], key[:1], value[:1], None, cu_seq_lens_q=cu_seqlens[:3]
    )
    torch.testing.assert_close(rows[:1], first)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mistral", {"sliding_window": 4}),
        ("qwen3", {}),
        (
            "gemma3_text",
            {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        ),
        ("phi3", {"sliding_window": 4}),
        ("granite", {}),
    ],
)
def test_other_architectures_and_sliding_windows(name, settings):
    """The second segment (9 tokens) is longer than the window (4), the first (3) is not."""
    model = small_model(name, **settings)
    segments = tiny_segments(3, 9, vocab_size=64)
    packed = hidden(model, tiny_batch([segments]))[0].split([3, 9])
    model.set_attn_implementation("eager")
    for ours, segment in zip(packed, segments, strict=True):
        alone = model.get_decoder()(torch.tensor([segment])).last_hidden_state[0]
        torch.testing.assert_close(ours, alone, atol=2e-5, rtol=1e-4)


def test_generation_with_cache_equals_plain_sdpa():
    prompt = torch.tensor([[1, 9, 20, 33]])
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    ours = tiny_llama().eval().generate(prompt, **options)
    theirs = tiny_llama(attn="sdpa").eval().generate(prompt, **options)
    assert ours.tolist() == theirs.tolist()


def test_left_padded_batch_generation_equals_plain_sdpa():
    prompt = torch.tensor([[0, 0, 9, 20], [1, 9, 20, 33]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}
    ours = tiny_llama().eval().generate(prompt, **options)
    theirs = tiny_llama(attn="sdpa").eval().generate(prompt, **options)
    assert ours.tolist() == theirs.tolist()


def test_attention_dropout_acts_in_training_only():
    batch = tiny_batch([tiny_segments(8, 8)])
    model = tiny_llama(attention_dropout=0.5)
    torch.manual_seed(0)
    assert not torch.equal(hidden(model, batch), hidden(model, batch))
    model.eval()
    assert torch.equal(hidden(model, batch), hidden(model, batch))


def test_a_layer_that_gets_no_borders_raises_instead_of_leaking():
    model = tiny_llama().eval()
    batch = tiny_batch([tiny_segments(4, 4)])
    with no_packing_mask(4), pytest.raises(RuntimeError, match="did not receive the borders"):
        model.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])


def test_borders_that_do_not_tile_the_tokens_are_refused():
    layer, states = torch.nn.Module(), torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match=r"\[0, 4\] do not tile 1 x 6 tokens.*collator"):
        packed_sdpa_forward(layer, states, states, states, None, cu_seq_lens_q=torch.tensor([0, 4]))


def test_soft_cap_is_refused():
    layer, states = torch.nn.Module(), torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match="attn='eager'"):
        packed_sdpa_forward(
            layer, states, states, states, None, cu_seq_lens_q=torch.tensor([0, 6]), softcap=30.0
        )
