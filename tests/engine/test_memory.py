"""The formulas of memory per strategy, by hand and against a real training step."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from tests.tiny import tiny_batch, tiny_llama, tiny_segments
from xtuner_lite.engine.memory import (
    PLACEMENTS,
    ModelSize,
    device_memory,
    keeps_half_weights,
)
from xtuner_lite.engine.optim import OptimWrapper
from xtuner_lite.engine.optimizer_memory import optimizer_state_bytes, update_bytes
from xtuner_lite.engine.strategies.single_device import SingleDevice
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.memory import ActivationMemory
from xtuner_lite.runner.memory_plan import MemoryPlanner, Plan

LORA = dict(type="LoraConfig", r=4, target_modules="all-linear")


def size(**changes) -> ModelSize:
    """1000 trained and 600 frozen parameters in bf16; Adam without its step counters."""
    values = dict(
        trainable=1000, frozen=600, frozen_bytes=1200, compute_bytes=2, layer=300,
        layer_trainable=200, outside=100, half_weights=False, accumulates=False,
        optimizer=8000, update=0, dequantized=0,
        activations=ActivationMemory(saved=500, copies=40, recompute=60, head=90),
    )  # fmt: skip
    return ModelSize(**{**values, **changes})


def parts(placement, devices=4, **changes):
    m = device_memory(
        size(**changes), placement, devices, reduce_bucket=10, max_live_parameters=700
    )
    return m.weights, m.gradients, m.master, m.optimizer, m.buffers, m.host


def test_formulas_by_hand():
    # weights, gradients, master, optimizer, buffers (40 are cast copies), host
    assert parts("single") == (5200, 4000, 0, 8000, 40, 0)
    assert parts("ddp") == (5200, 4000, 0, 8000, 4040, 0)  # buckets of all gradients
    assert parts("ddp", devices=1) == parts("single")
    gathered = 2 * (2 * 300 + 100) + (2 + 4) * 200
    assert parts("fsdp2") == (1300, 1000, 0, 2000, gathered + 40, 0)
    assert parts("fsdp2_offload") == (0, 0, 0, 0, gathered + 40, 4300)
    assert parts("zero1") == (5200, 4000, 1000, 2000, 40 + 40, 0)
    bucket = 4 * (10 + 200)
    live = 5200 * 700 // 1600
    assert parts("zero2") == (5200, 1000, 1000, 2000, bucket + 40, 0)
    assert parts("zero3") == (1300, 1000, 1000, 2000, bucket + live + 40, 0)
    assert parts("zero2_offload") == (5200, 0, 0, 0, bucket + 40, 4000)
    assert parts("zero3_offload") == (0, 0, 0, 0, bucket + live + 40, 5300)


def test_half_weights_by_hand():
    bucket, live = 2 * (10 + 200), 3200 * 700 // 1600
    assert parts("zero2", half_weights=True) == (3200, 1000, 1000, 2000, bucket + 40, 0)
    assert parts("zero3", half_weights=True) == (800, 1000, 1000, 2000, bucket + live + 40, 0)


def test_an_adapter_under_fsdp2_keeps_whole_gradients_between_micro_batches():
    few = dict(trainable=100, frozen=900)
    assert parts("fsdp2", accumulates=True, **few)[4] == parts("fsdp2", **few)[4] + 4 * 100
    assert parts("fsdp2", accumulates=True) == parts("fsdp2")


def test_when_weights_are_halved():
    """As the DeepSpeed strategy decides it."""
    assert keeps_half_weights("zero2", 60, 40, "bf16")
    assert not keeps_half_weights("zero2", 40, 60, "bf16")
    assert not keeps_half_weights("zero1", 60, 40, "bf16")
    assert not keeps_half_weights("zero3_offload", 60, 40, "fp16")
    assert not keeps_half_weights("fsdp2", 60, 40, "bf16")
    assert keeps_half_weights("zero3", 1, 99, "bf16", wanted=True)
    assert not keeps_half_weights("zero3", 99, 1, "bf16", wanted=False)


def test_activations_head_and_update_at_the_peak():
    memory = device_memory(size(), "single", 1)
    assert (memory.activations, memory.head, memory.update) == (560, 30, 0)  # 500 + max(60, 90)
    assert memory.total == 5200 + 4000 + 8000 + 40 + 590
    large = device_memory(size(update=4000), "single", 1)
    assert large.total == 5200 + 4000 + 8000 + 4000  # an update larger than the activations


def test_more_devices_never_need_more():
    for placement in PLACEMENTS:
        totals = [device_memory(size(), placement, n).total for n in (2, 4, 8)]
        assert totals == sorted(totals, reverse=True)


def test_what_is_refused():
    with pytest.raises(ValueError, match="strategies are single, ddp, fsdp2"):
        device_memory(size(), "zero4", 1)
    with pytest.raises(ValueError, match="devices count from 1"):
        device_memory(size(), "ddp", 0)


@pytest.mark.parametrize(
    "optimizer",
    [dict(type="AdamW", lr=1e-3), dict(type="SGD", lr=1e-3, momentum=0.9),
     dict(type="SGD", lr=1e-3), dict(type="Adafactor", lr=1e-3), dict(type="RMSprop", lr=1e-3)],
    ids=lambda o: o["type"],
)  # fmt: skip
def test_optimizer_state_is_that_of_a_real_step(optimizer):
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20), nn.Linear(30, 20))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    settings = dict(optimizer)
    real = getattr(torch.optim, settings.pop("type"))(model.parameters(), **settings)
    real.step()
    tensors = [
        v for state in real.state.values() for v in state.values() if isinstance(v, torch.Tensor)
    ]
    expected = sum(v.numel() * v.element_size() for v in tensors)
    assert optimizer_state_bytes(model.parameters(), optimizer) == expected


def test_optimizer_of_8_bits():
    pytest.importorskip("bitsandbytes")
    parameters = [torch.empty(64, 64), torch.empty(64)]  # 4096 elements: 8-bit; 64: float32
    assert optimizer_state_bytes(parameters, dict(type="AdamW8bit")) == (
        2 * (4096 + 4 * 16) + 2 * 4 * 64
    )
    assert optimizer_state_bytes(parameters, dict(type="Lion8bit")) == 4096 + 4 * 16 + 4 * 64


def test_the_update_of_adam_on_a_gpu():
    assert update_bytes(dict(type="AdamW"), 10, "cuda") == 40
    assert update_bytes(dict(type="AdamW"), 10, "cpu") == 0
    assert update_bytes(dict(type="AdamW", fused=True), 10, "cuda") == 0
    assert update_bytes(dict(type="SGD", lr=1.0), 10, "cuda") == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_real_training_step_in_one_process(lora, dtype):
    """Weights, gradients and optimizer state, byte for byte."""
    method = SupervisedFinetune(tiny_llama(), lora=lora, self_check=False)
    wrapper = OptimWrapper(dict(type="AdamW", lr=1e-3), dtype=dtype)
    strategy = SingleDevice("cpu")
    strategy.prepare(method, wrapper, train=True)
    batch = tiny_batch([tiny_segments(40, 24)])
    with strategy.forward_context():
        out = method(batch)
    strategy.backward(out.loss_sum, out.num_units)
    held = list(method.parameters())
    weights = sum(p.numel() * p.element_size() for p in held)
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in held if p.grad is not None)
    strategy.step()
    state = [v for s in wrapper.optimizer.state.values() for v in s.values()]
    optimizer = sum(v.numel() * v.element_size() for v in state if isinstance(v, torch.Tensor))

    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    plan = Plan(
        method=dict(type="SupervisedFinetune", lora=lora), optimizer=dict(type="AdamW", lr=1e-3),
        length=64, dtype=dtype, device_type="cpu",
    )  # fmt: skip
    found = MemoryPlanner(config).memory(plan)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)
