"""What each of two ranks really holds, against the formulas: DDP, FSDP2, ZeRO-2 and ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import tiny_batch, tiny_llama, tiny_segments
from xtuner_lite.engine.distributed import init_distributed
from xtuner_lite.engine.optim import OptimWrapper
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.registry import STRATEGIES
from xtuner_lite.runner.memory_plan import MemoryPlanner, Plan

LORA = dict(type="LoraConfig", r=4, target_modules="all-linear")
ADAM = dict(type="AdamW", lr=1e-3)
TOLERANCE = 0.05  # rows that do not divide by 2, Adam's step counters


def bytes_of(tensors: Iterable[torch.Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def held(strategies: list[dict], lora: dict | None, dtype: str) -> list[dict[str, int]]:
    """Bytes of each strategy on this rank, after backward and after the update."""
    ranks = init_distributed("pytorch")
    return [_held(STRATEGIES.build(s, ranks=ranks), lora, dtype) for s in strategies]


def _held(strategy, lora, dtype) -> dict[str, int]:
    method = SupervisedFinetune(tiny_llama(), lora=lora, self_check=False)
    wrapper = OptimWrapper(dict(ADAM), dtype=dtype)
    strategy.prepare(method, wrapper, train=True)
    batch = tiny_batch([tiny_segments(20, 12)])
    out = strategy.forward(batch)
    strategy.backward(out.loss_sum, 28.0)
    found = {"gradients": bytes_of(_gradients(strategy, method))}
    assert strategy.clip_gradients() > 0
    assert strategy.step()
    state = [v for s in wrapper.optimizer.state.values() for v in s.values()]
    found["optimizer"] = bytes_of(_local(v) for v in state if isinstance(v, torch.Tensor))
    found["weights"] = bytes_of(_local(p) for p in method.parameters())
    zero = getattr(getattr(strategy, "_engine", None), "optimizer", None)
    masters = getattr(zero, "single_partition_of_fp32_groups", None)
    masters = masters or getattr(zero, "fp32_partitioned_groups_flat", [])
    found["master"] = bytes_of(masters)
    if zero is not None:
        strategy.close()
    return found


def _local(tensor: torch.Tensor) -> torch.Tensor:
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()


def _gradients(strategy, method) -> list[torch.Tensor]:
    zero = getattr(getattr(strategy, "_engine", None), "optimizer", None)
    if zero is None:
        return [_local(p.grad) for p in method.parameters() if p.grad is not None]
    if strategy.stage == 3:
        return [zero.grad_partitions_flat_buffer]
    return [t for group in zero.averaged_gradients.values() for t in group or ()]


def check(strategies: dict[str, dict], lora: dict | None, dtype: str) -> None:
    planner = MemoryPlanner(tiny_llama().config)
    results = run_ranks(held, list(strategies.values()), lora, dtype, timeout_s=300)
    assert len(results) == 2
    for index, placement in enumerate(strategies):
        plan = Plan(
            method=dict(type="SupervisedFinetune", lora=lora), optimizer=ADAM, length=32,
            dtype=dtype, device_type="cpu", placement=placement, devices=2,
        )  # fmt: skip
        expected = planner.memory(plan)
        for part in ("weights", "gradients", "master", "optimizer"):
            real = sum(result[index][part] for result in results) / 2
            estimated = getattr(expected, part)
            assert estimated == pytest.approx(real, rel=TOLERANCE), (placement, part)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_ddp_and_fsdp2(lora):
    check({"ddp": dict(type="DDP"), "fsdp2": dict(type="FSDP2")}, lora, "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_zero(lora, dtype):
    pytest.importorskip("deepspeed")
    check({f"zero{n}": dict(type="DeepSpeed", config=f"zero{n}") for n in (2, 3)}, lora, dtype)
