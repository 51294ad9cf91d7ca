"""Weights, gradients and optimizer state in shards, by torch's fully_shard (FSDP2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from xtuner_lite.engine.distributed import Ranks
from xtuner_lite.engine.optim import OptimWrapper
from xtuner_lite.engine.pieces import local_part
from xtuner_lite.engine.strategies.fsdp2_sharding import (
    make_mesh,
    refuse_unshardable,
    shard_method,
    trains_little,
)
from xtuner_lite.engine.strategies.single_device import TorchStrategy
from xtuner_lite.registry import STRATEGIES
from xtuner_lite.structures import Batch, LossOutput


@STRATEGIES.register_module()
class FSDP2(TorchStrategy):
    """torch's ``fully_shard``: of N ranks each holds 1/N of weights, gradients, optimizer state.

    A layer's weights are gathered for its forward and again for its backward pass. Losses, gradient
    norms and weights are those of one device up to rounding; checkpoints are read by and from the
    other strategies. Bases that bitsandbytes quantises and its 8-bit optimizers cannot be sharded.

    Args:
        device: as SingleDevice's.
        reshard_after_forward: True frees a layer's gathered weights after its forward pass; False
            keeps them for the backward pass (more memory, a third less traffic); a number keeps
            1/number of them, a divisor of the number of ranks (e.g. the GPUs of a machine).
        cpu_offload: keep the shards of weights, gradients and optimizer state in CPU memory; the
            update is computed there.
        reduce_each_micro_batch: True sums gradients over the ranks after each micro-batch, so that
            a rank holds its shard of them only; False once a step, with less traffic, and each
            rank holds whole gradients in between (4 bytes for each trained parameter). None takes
            False where at most a tenth of the parameters train (adapters), else True.
        ranks: the processes of the run (filled in by the Runner).
    """

    is_sharded = True

    def __init__(
        self,
        device: str | None = None,
        *,
        reshard_after_forward: bool | int = True,
        cpu_offload: bool = False,
        reduce_each_micro_batch: bool | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(device, ranks=ranks)
        self._reshard_after_forward = reshard_after_forward
        self._cpu_offload = cpu_offload
        self._reduce_each = reduce_each_micro_batch

    def prepare(
        self, model: nn.Module, optim_wrapper: OptimWrapper | None, *, train: bool
    ) -> nn.Module:
        """See Strategy.prepare.

        Raises:
            ValueError: a quantised base, or an optimizer of bitsandbytes.
        """
        self._set_precision(optim_wrapper)
        refuse_unshardable(model)
        self.precision.prepare(model)
        if self._reduce_each is None:
            self._reduce_each = not trains_little(model)
        shard_method(
            model,
            make_mesh(self.device.type, self.ranks),
            dtype=self.precision.dtype,
            reshard_after_forward=self._reshard_after_forward,
            cpu_offload=self._cpu_offload,
        )
        self.model = model
        if train:
            self._build_optimizer(optim_wrapper)
            refuse_optimizer(optim_wrapper)
        return model

    def forward(self, batch: Batch, *, is_last: bool = True) -> LossOutput:
        """See Strategy.forward."""
        output = super().forward(batch, is_last=is_last)
        if not torch.is_grad_enabled():
            self._reshard()  # no backward pass will do it
        return output

    @contextmanager
    def generation_context(self) -> Iterator[None]:
        """See Strategy.generation_context; every rank must generate the same."""
        # Only the outermost unit may set up the others, and before the first step none has run.
        self.model._get_fsdp_state()._lazy_init()
        self.model.unshard()
        try:
            with self.forward_context():
                yield
        finally:
            self._reshard()

    def backward(self, loss_sum: Tensor, num_units: float, *, is_last: bool = True) -> None:
        """See Strategy.backward."""
        self.model.set_requires_gradient_sync(is_last or self._reduce_each)
        self.model.set_is_last_backward(is_last)
        super().backward(loss_sum, num_units, is_last=is_last)

    def clip_gradients(self) -> float:
        """See Strategy.clip_gradients."""
        if self.precision.scaler is not None:
            self.precision.scaler.unscale_(self.optim_wrapper.optimizer)
        clip = self.optim_wrapper.clip_grad or {}
        gradients = [local_part(p.grad)[0] for p in self.parameters if p.grad is not None]
        norm = self._norm(gradients, clip.get("norm_type", 2.0))
        if "max_norm" in clip and math.isfinite(norm):
            factor = clip["max_norm"] / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_
            if factor < 1.0:
                torch._foreach_mul_(gradients, factor)
        return norm

    @torch.no_grad()
    def full_weights(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """See Strategy.full_weights; on the other ranks the mapping is empty."""
        state = self.model.state_dict(keep_vars=True)
        whole: dict[int, Tensor | None] = {}  # tied weights are one parameter with two names
        gathered: dict[str, Tensor] = {}
        for name in names:
            if name not in state:
                continue
            parameter = state[name]
            if id(parameter) not in whole:
                whole[id(parameter)] = self._gather(parameter)
            if self.is_main:
                gathered[name] = whole[id(parameter)]
        return gathered

    @torch.no_grad()
    def stream_weights(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor | None]]:
        """See Strategy.stream_weights."""
        state = self.model.state_dict(keep_vars=True)
        for name in names:
            yield name, self._gather(state[name])

    def _gather(self, tensor: Tensor) -> Tensor | None:
        """The whole tensor in CPU memory on the main rank; None on the others, which take part."""
        if isinstance(tensor, DTensor):
            tensor = tensor.detach().to(self.device).full_tensor()
        return tensor.detach().cpu() if self.is_main else None

    def _norm(self, gradients: list[Tensor], norm_type: float) -> float:
        """Norm over all ranks; the same number on each, also where it is not finite."""
        own = torch.nn.utils.get_total_norm(gradients, norm_type) if gradients else torch.zeros(())
        parts = torch.tensor(self.ranks.gather(own.item()), dtype=torch.float64)
        return torch.linalg.vector_norm(parts, norm_type).item()

    def _reshard(self) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def refuse_optimizer(optim_wrapper: OptimWrapper) -> None:
    """Raises ValueError where the optimizer cannot update shards."""
    kind = type(optim_wrapper.optimizer)
    if kind.__module__.partition(".")[0] == "bitsandbytes":
        raise ValueError(
            f"optimizer {kind.__name__} of bitsandbytes reads weights by their address and cannot "
            "update the shards of strategy FSDP2. Use torch's AdamW here (its state is sharded: "
            "8 bytes a parameter over all ranks; cpu_offload=True moves it off the GPU), or DDP."
        )
