"""Activation memory found on fake tensors equals what real tensors take."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, LlamaConfig

from tests.tiny import tiny_llama
from tests.tiny_images import IMAGE, plain_images, tiny_tower
from xtuner_lite.engine import cpu_bf16
from xtuner_lite.engine.precision import Precision
from xtuner_lite.methods.functional import chunked_head_loss
from xtuner_lite.methods.llava import LLaVAModel
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.live_tensors import LiveTensors
from xtuner_lite.models.memory import (
    FUSED_ATTENTION,
    ActivationsUnknownError,
    one_pass,
    trace_activations,
)
from xtuner_lite.models.packed_forward import unwrap_adapter
from xtuner_lite.models.quantized import quantized_bytes
from xtuner_lite.models.skeleton import build_skeleton, build_tower_skeleton


@pytest.fixture(autouse=True)
def torch_own_bf16():
    """Products as on a GPU, also after a test that had them computed in float32 on this CPU."""
    cpu_bf16.disable()


LORA = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
CONFIG = dict(
    vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
BATCH, LENGTH = 2, 96


def skeleton_method(config, *, lora=None, checkpointing=False, attn="packed_sdpa"):
    llm = build_skeleton(config, attn=attn)
    with torch.device("meta"):
        return SupervisedFinetune(llm, lora=lora, activation_checkpointing=checkpointing)


def trace(method, dtype=torch.float32, **options):
    return trace_activations(
        method.llm, batch_size=BATCH, length=LENGTH, dtype=dtype, autocast=True,
        activation_checkpointing=method.activation_checkpointing, head_chunk_tokens=50,
        head_loss=chunked_head_loss, **options,
    )  # fmt: skip


def measure(lora, checkpointing, dtype):
    """The same pass of a real model."""
    llm = tiny_llama(hidden_size=64, num_layers=3)
    method = SupervisedFinetune(llm, lora=lora, activation_checkpointing=checkpointing)
    Precision(dtype).prepare(method)
    ids = torch.randint(3, 384, (BATCH, LENGTH))
    targets = ids.reshape(-1)
    gc.collect()
    watch = LiveTensors([ids, targets, *method.buffers()], method.parameters())
    with watch:
        return one_pass(
            method.llm, ids, targets, watch, dtype=dtype, autocast=True,
            checkpointing=checkpointing, head="chunked", chunk_tokens=50,
            head_loss=chunked_head_loss,
        )  # fmt: skip


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)],
    ids=["bf16", "fp32"],
)
@pytest.mark.parametrize(
    ("lora", "checkpointing"),
    [
        pytest.param(None, False, id="full-kept"),
        pytest.param(LORA, True, id="lora-checkpointed"),
        pytest.param(None, True, id="full-checkpointed", marks=pytest.mark.slow),
        pytest.param(LORA, False, id="lora-kept", marks=pytest.mark.slow),
    ],
)
def test_equals_a_real_pass(lora, checkpointing, dtype):
    real = measure(lora, checkpointing, dtype)
    found = trace(skeleton_method(LlamaConfig(**CONFIG), lora=lora, checkpointing=checkpointing),
                  dtype)  # fmt: skip
    assert (found.saved, found.copies, found.head) == (real.saved, real.copies, real.head)
    assert (found.copies > 0) == (dtype == torch.bfloat16)
    real_peak = real.saved + real.copies + max(real.recompute, real.head)
    assert real_peak <= found.peak <= 1.15 * real_peak


@pytest.mark.parametrize(
    "checkpointing",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["kept", "checkpointed"],
)
def test_every_layer_or_one_of_each_kind(checkpointing):
    config = LlamaConfig(**{**CONFIG, "num_hidden_layers": 4})
    method = skeleton_method(config, lora=LORA, checkpointing=checkpointing)
    few, whole = trace(method), trace(method, all_layers=True)
    assert (few.saved, few.copies, few.head) == (whole.saved, whole.copies, whole.head)
    assert len(method.llm.get_base_model().model.layers) == 4  # put back


def test_checkpointing_keeps_the_input_of_each_layer():
    one, two = (
        trace(skeleton_method(LlamaConfig(**{**CONFIG, "num_hidden_layers": n}),
                              checkpointing=True)).saved
        for n in (1, 2)
    )  # fmt: skip
    assert two - one == BATCH * LENGTH * 64 * 4  # float32 [B, T, H]


def test_a_fused_kernel_keeps_heads_once():
    """packed_sdpa on a CPU repeats 2 key and value heads to 4, of 16 float32, for both."""
    config = LlamaConfig(**{**CONFIG, "num_hidden_layers": 1})
    here = trace(skeleton_method(config, lora=LORA)).saved
    fused = trace(skeleton_method(config, lora=LORA, attn=FUSED_ATTENTION)).saved
    repeated = 2 * BATCH * LENGTH * (4 - 2) * 16 * 4
    rotary = 2 * (BATCH - 1) * LENGTH * 16 * 4  # cos and sin: once for all rows, or for each
    assert here - fused == repeated + rotary


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2", "gpt2", "phi3"])
def test_other_architectures(model_type):
    sizes = {k: v for k, v in CONFIG.items() if k != "tie_word_embeddings"}
    if model_type in ("qwen3", "gemma2"):
        sizes |= dict(head_dim=16)
    if model_type == "phi3":
        sizes |= dict(pad_token_id=0)
    config = AutoConfig.for_model(model_type, **sizes)
    method = skeleton_method(config, attn="eager" if model_type == "gemma2" else FUSED_ATTENTION)
    memory = trace(method, torch.bfloat16)
    assert memory.saved > 3 * BATCH * LENGTH * config.hidden_size * 2
    assert memory.copies > 0


def test_a_model_whose_code_does_not_run_on_fake_tensors():
    config = AutoConfig.for_model(
        "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16,
        **CONFIG,
    )  # fmt: skip
    method = skeleton_method(config, attn=FUSED_ATTENTION)
    # Grouped products take no float32 weights here; in one dtype they run.
    with pytest.raises(ActivationsUnknownError, match="activations of Qwen3MoeForCausalLM cannot"):
        trace(method, torch.bfloat16)
    options = dict(batch_size=BATCH, length=LENGTH, dtype=torch.bfloat16)
    memory = trace_activations(method.llm, autocast=False, head_loss=chunked_head_loss, **options)
    assert memory.saved > 3 * BATCH * LENGTH * 64 * 2


def test_bytes_of_a_quantised_base():
    """One layer: q, k, v, o 64x64, 32x64, 32x64, 64x64 and three of 64 x 128."""
    linear = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128
    method = skeleton_method(LlamaConfig(**{**CONFIG, "num_hidden_layers": 1}), lora=LORA)
    saved, largest = quantized_bytes(method.llm, "8bit", torch.bfloat16)
    rows = 64 + 32 + 32 + 64 + 128 + 128 + 64
    assert saved == 2 * linear - (linear + 4 * rows)
    assert largest == 2 * 64 * 128
    plain = dict(load_in_4bit=True, bnb_4bit_use_double_quant=False)
    assert quantized_bytes(method.llm, plain, torch.bfloat16)[0] == 2 * linear - (
        linear // 2 + 4 * linear // 64
    )
    assert quantized_bytes(method.llm, None, torch.bfloat16) == (0, 0)
    with pytest.raises(ValueError, match="memory is known for '4bit', '8bit'"):
        quantized_bytes(method.llm, {"bits": 3}, torch.bfloat16)


LLAVAS = {
    "projector": dict(freeze_llm=True, freeze_visual_encoder=True),
    "adapter": dict(llm_lora=LoraConfig(r=2), freeze_visual_encoder=True),
    "adapters": dict(llm_lora=LoraConfig(r=2), visual_encoder_lora=LoraConfig(r=2)),
    "whole": dict(),
}


@pytest.mark.parametrize(
    "kind",
    [
        "projector",
        "adapters",
        pytest.param("adapter", marks=pytest.mark.slow),
        pytest.param("whole", marks=pytest.mark.slow),
    ],
)
def test_a_llava_keeps_what_its_own_forward_keeps(kind):
    llm, tower = tiny_llama(num_layers=3), tiny_tower()
    llm.set_attn_implementation("packed_sdpa")
    options = dict(image_token_id=IMAGE, **LLAVAS[kind])
    planned_llm, planned_tower = (
        build_skeleton(llm.config, attn="packed_sdpa"), build_tower_skeleton(tower.config)
    )  # fmt: skip
    with torch.device("meta"):
        planned = LLaVAModel(planned_llm, planned_tower, **options)
    found = trace_activations(
        planned.llm, batch_size=1, length=96, dtype=torch.float32, autocast=False,
        head_loss=chunked_head_loss, image_shape=(3, 3, 16, 16),
    )  # fmt: skip
    real = LLaVAModel(llm, tower, **options).llm.train()
    ids = torch.tensor([[*[IMAGE] * 12, *range(5, 89)]])
    pixels = plain_images(3)["pixel_values"]
    gc.collect()
    watch = LiveTensors([ids, pixels, *real.buffers()], real.parameters())
    one = dict(cu_seq_lens_q=np.array([0, 96]), cu_seq_lens_k=np.array([0, 96]),
               max_length_q=96, max_length_k=96)  # fmt: skip
    with watch:
        out = unwrap_adapter(real).model(input_ids=ids, pixel_values=pixels, use_cache=False, **one)
        hidden = out.last_hidden_state
        del out
        kept = watch.now
    assert hidden.requires_grad
    assert found.saved == kept
