"""What a strategy must do: place the model, sum over ranks, run backward and step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from xtuner_lite.engine.optim import OptimWrapper
from xtuner_lite.engine.precision import Precision


class Strategy(ABC):
    """What differs between one device, DDP, FSDP2 and ZeRO. The loop knows nothing of it."""

    rank: int = 0
    world_size: int = 1
    device: torch.device
    precision: Precision

    @property
    def is_main(self) -> bool:
        """True on the rank that writes logs and files."""
        return self.rank == 0

    @abstractmethod
    def prepare(
        self, model: nn.Module, optim_wrapper: OptimWrapper | None, *, train: bool
    ) -> nn.Module:
        """Cast and place the model; to train, build its optimizer. Returns the model."""

    @abstractmethod
    def sum_over_ranks(self, value: float) -> float:
        """``value`` summed over all ranks."""

    @abstractmethod
    def forward_context(self) -> AbstractContextManager:
        """The context of a forward pass (autocast)."""

    @abstractmethod
    def backward(self, loss_sum: Tensor, num_units: float) -> None:
        """Add the gradient of loss_sum / num_units (units of the whole step, all ranks)."""

    @abstractmethod
    def clip_gradients(self) -> float:
        """Norm of the step's gradients before they are cut to clip_grad.max_norm, if set."""

    @abstractmethod
    def step(self) -> bool:
        """Update the weights, drop the gradients. False: the fp16 scaler found inf, no update."""

    @abstractmethod
    def discard_gradients(self) -> None:
        """Drop the gradients without an update."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Optimizer and scaler state, for a checkpoint."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what state_dict gave."""
