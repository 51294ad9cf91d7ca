"""One process, one device: a GPU where there is one, else the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from xtuner_lite.engine.distributed import Ranks, default_device
from xtuner_lite.engine.optim import OptimWrapper, total_grad_norm
from xtuner_lite.engine.pieces import (
    Piece,
    PieceReader,
    load_optimizer_pieces,
    load_parameter_groups,
    optimizer_pieces,
    parameter_groups,
)
from xtuner_lite.engine.precision import Precision
from xtuner_lite.engine.strategies.base import Strategy
from xtuner_lite.registry import STRATEGIES


class TorchStrategy(Strategy):
    """What the strategies around a torch optimizer share: precision, clipping, step, state.

    Args:
        device: 'cuda', 'cuda:1' or 'cpu'; None takes this process's GPU where there is one.
        ranks: the processes of the run (filled in by the Runner).
    """

    def __init__(self, device: str | None = None, *, ranks: Ranks | None = None) -> None:
        super().__init__(ranks)
        self.device = torch.device(device) if device else default_device()
        self.optim_wrapper: OptimWrapper | None = None
        self.parameters: list[nn.Parameter] = []

    def prepare(
        self, model: nn.Module, optim_wrapper: OptimWrapper | None, *, train: bool
    ) -> nn.Module:
        """See Strategy.prepare."""
        self._set_precision(optim_wrapper)
        self.precision.prepare(model)
        self.model = model.to(self.device)
        if train:
            self._build_optimizer(optim_wrapper)
        return model

    def forward_context(self) -> AbstractContextManager:
        """See Strategy.forward_context."""
        return self.precision.autocast()

    def backward(self, loss_sum: Tensor, num_units: float, *, is_last: bool = True) -> None:
        """See Strategy.backward."""
        loss = loss_sum / num_units
        if self.precision.scaler is not None:
            loss = self.precision.scaler.scale(loss)
        loss.backward()

    def clip_gradients(self) -> float:
        """See Strategy.clip_gradients."""
        if self.precision.scaler is not None:
            self.precision.scaler.unscale_(self.optim_wrapper.optimizer)
        clip = self.optim_wrapper.clip_grad or {}
        norm = total_grad_norm(self.parameters, clip.get("norm_type", 2.0))
        # A norm that is not finite would turn every gradient into NaN; the guard hook decides on
        # it.
        if "max_norm" in clip and math.isfinite(norm.item()):
            torch.nn.utils.clip_grads_with_norm_(self.parameters, clip["max_norm"], norm)
        return norm.item()

    def step(self) -> bool:
        """See Strategy.step."""
        optimizer, scaler = self.optim_wrapper.optimizer, self.precision.scaler
        updated = True
        if scaler is None:
            optimizer.step()
        else:
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            updated = scaler.get_scale() >= scale
        optimizer.zero_grad(set_to_none=True)
        return updated

    def discard_gradients(self) -> None:
        """See Strategy.discard_gradients."""
        if self.precision.scaler is not None:
            self.precision.scaler.update()
        self.optim_wrapper.optimizer.zero_grad(set_to_none=True)

    def full_weights(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """See Strategy.full_weights."""
        state = self.model.state_dict()
        return {name: state[name] for name in names if name in state}

    def pieces(self) -> Iterable[Piece]:
        """See Strategy.pieces."""
        return optimizer_pieces(self.optim_wrapper.optimizer)

    def load_pieces(self, reader: PieceReader) -> None:
        """See Strategy.load_pieces."""
        load_optimizer_pieces(self.optim_wrapper.optimizer, reader)

    def state_dict(self) -> dict[str, Any]:
        """See Strategy.state_dict."""
        state: dict[str, Any] = {"groups": parameter_groups(self.optim_wrapper.optimizer)}
        if self.precision.scaler is not None:
            state["scaler"] = self.precision.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Strategy.load_state_dict."""
        load_parameter_groups(self.optim_wrapper.optimizer, state["groups"])
        if self.precision.scaler is not None and "scaler" in state:
            self.precision.scaler.load_state_dict(state["scaler"])

    def _set_precision(self, optim_wrapper: OptimWrapper | None) -> None:
        dtype = optim_wrapper.dtype if optim_wrapper else "auto"
        loss_scale = optim_wrapper.loss_scale if optim_wrapper else "dynamic"
        self.precision = Precision(dtype, self.device.type, loss_scale=loss_scale)

    def _build_optimizer(self, optim_wrapper: OptimWrapper | None) -> None:
        if optim_wrapper is None:
            raise ValueError(
                "the config has no optim_wrapper; training needs "
                "dict(optimizer=dict(type=AdamW, lr=...))"
            )
        self.optim_wrapper = optim_wrapper
        optim_wrapper.build(self.model)
        self.parameters = [p for group in optim_wrapper.param_groups for p in group["params"]]


@STRATEGIES.register_module()
class SingleDevice(TorchStrategy):
    """Trains in this one process.

    Args:
        device: 'cuda', 'cuda:1' or 'cpu'; None takes the GPU where there is one.
        ranks: the processes of the run (filled in by the Runner).

    Raises:
        RuntimeError: a launcher started several processes; each would train the whole model by
            itself.
    """

    def __init__(self, device: str | None = None, *, ranks: Ranks | None = None) -> None:
        super().__init__(device, ranks=ranks)
        if self.world_size > 1:
            raise RuntimeError(
                f"a launcher started {self.world_size} processes, but strategy SingleDevice runs "
                "in one. Start without the launcher, or name a distributed strategy: DDP, FSDP2 "
                "or DeepSpeed."
            )
