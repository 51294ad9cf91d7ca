"""One process, one device: a GPU where there is one, else the CPU."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from xtuner_lite.engine.distributed import default_device, env_world_size
from xtuner_lite.engine.optim import OptimWrapper, total_grad_norm
from xtuner_lite.engine.precision import Precision
from xtuner_lite.engine.strategies.base import Strategy
from xtuner_lite.registry import STRATEGIES


@STRATEGIES.register_module()
class SingleDevice(Strategy):
    """Trains in this one process.

    Args:
        device: 'cuda', 'cuda:1' or 'cpu'; None takes the GPU where there is one.

    Raises:
        RuntimeError: a launcher started several processes; each would train the whole model by
            itself.
    """

    def __init__(self, device: str | None = None) -> None:
        if env_world_size() > 1:
            raise RuntimeError(
                f"a launcher started {env_world_size()} processes, but strategy SingleDevice "
                "runs in one. "
                "Start without the launcher, or name a distributed strategy."
            )
        self.device = torch.device(device) if device else default_device()
        self.optim_wrapper: OptimWrapper | None = None
        self.parameters: list[nn.Parameter] = []

    def prepare(
        self, model: nn.Module, optim_wrapper: OptimWrapper | None, *, train: bool
    ) -> nn.Module:
        """See Strategy.prepare."""
        dtype = optim_wrapper.dtype if optim_wrapper else "auto"
        loss_scale = optim_wrapper.loss_scale if optim_wrapper else "dynamic"
        self.precision = Precision(dtype, self.device.type, loss_scale=loss_scale)
        self.precision.prepare(model)
        model.to(self.device)
        self.optim_wrapper = optim_wrapper
        if train:
            if optim_wrapper is None:
                raise ValueError(
                    "the config has no optim_wrapper; training needs "
                    "dict(optimizer=dict(type=AdamW, lr=...))"
                )
            optim_wrapper.build(model)
            self.parameters = [p for group in optim_wrapper.param_groups for p in group["params"]]
        return model

    def sum_over_ranks(self, value: float) -> float:
        """See Strategy.sum_over_ranks."""
        return float(value)

    def forward_context(self) -> AbstractContextManager:
        """See Strategy.forward_context."""
        return self.precision.autocast()

    def backward(self, loss_sum: Tensor, num_units: float) -> None:
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

    def state_dict(self) -> dict[str, Any]:
        """See Strategy.state_dict."""
        state: dict[str, Any] = {"optimizer": self.optim_wrapper.state_dict()}
        if self.precision.scaler is not None:
            state["scaler"] = self.precision.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Strategy.load_state_dict."""
        self.optim_wrapper.load_state_dict(state["optimizer"])
        if self.precision.scaler is not None and "scaler" in state:
            self.precision.scaler.load_state_dict(state["scaler"])
