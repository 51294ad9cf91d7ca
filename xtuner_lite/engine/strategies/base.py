"""What a strategy must do: place the model, run forward and backward, step, and hand out its state.

The loop and the Runner know this interface only. A new strategy is one registered subclass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from xtuner_lite.engine.distributed import Ranks
from xtuner_lite.engine.optim import OptimWrapper
from xtuner_lite.engine.pieces import Piece, PieceReader
from xtuner_lite.engine.precision import Precision
from xtuner_lite.structures import Batch, LossOutput


class Strategy(ABC):
    """What differs between one device, DDP, FSDP2 and ZeRO.

    Args:
        ranks: the processes of the run (filled in by the Runner); None is one process.
    """

    device: torch.device
    precision: Precision
    model: nn.Module
    """The training method, as ``prepare`` placed it. Hooks read it as ``runner.model``."""

    keeps_gradients: bool = True
    """Whether a parameter's gradient stands in its ``grad`` until the update."""

    is_sharded: bool = False
    """Whether a rank holds only parts of the weights, so that every rank must join a forward."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.ranks.world_size

    @property
    def is_main(self) -> bool:
        """True on the rank that writes logs and files."""
        return self.ranks.is_main

    def sum_over_ranks(self, value: float) -> float:
        """``value`` summed over all ranks."""
        return self.ranks.sum(value)

    @abstractmethod
    def prepare(
        self, model: nn.Module, optim_wrapper: OptimWrapper | None, *, train: bool
    ) -> nn.Module:
        """Cast and place the training method; to train, build its optimizer. Returns the method.

        The parameters keep their names. Called with equal weights on every rank.
        """

    def forward(self, batch: Batch, *, is_last: bool = True) -> LossOutput:
        """The method's loss of a micro-batch, under the run's precision.

        Args:
            is_last: as for ``backward``, which follows in training.
        """
        with self.forward_context():
            return self.model(batch)

    @abstractmethod
    def forward_context(self) -> AbstractContextManager:
        """The context of a forward pass (autocast)."""

    def generation_context(self) -> AbstractContextManager:
        """The context in which the language model inside the method may be run by itself.

        Where ``is_sharded``, every rank must enter it and run the same.
        """
        return self.forward_context()

    @abstractmethod
    def backward(self, loss_sum: Tensor, num_units: float, *, is_last: bool = True) -> None:
        """Add the gradient of loss_sum / num_units (units of the whole step, all ranks).

        Args:
            is_last: False while more micro-batches of the step follow: ranks need not exchange
                gradients yet.
        """

    @abstractmethod
    def clip_gradients(self) -> float:
        """Norm of the step's gradients (all ranks) before they are cut to clip_grad.max_norm."""

    @abstractmethod
    def step(self) -> bool:
        """Update the weights, drop the gradients. False: the fp16 scaler found inf, no update."""

    @abstractmethod
    def discard_gradients(self) -> None:
        """Drop the gradients without an update."""

    @abstractmethod
    def full_weights(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """Whole tensors by the names of ``model.state_dict()``; every rank calls it with the same.

        On the main rank the tensors; on the others it may be an empty mapping.
        """

    def stream_weights(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor | None]]:
        """(name, whole tensor) one after the other, never two at a time where they are sharded.

        Every rank must draw all of them; on the main rank the tensors are in CPU memory, on the
        others None may stand in their place.
        """
        for name in names:
            yield name, self.full_weights([name]).get(name)

    @abstractmethod
    def pieces(self) -> Iterable[Piece]:
        """What this rank must put into a checkpoint: the trained weights and their optimizer state.

        Over all ranks each element stands in exactly one piece. Not a collective.
        """

    @abstractmethod
    def load_pieces(self, reader: PieceReader) -> None:
        """Take this rank's part of weights and optimizer state from a checkpoint of any strategy.

        Raises:
            CheckpointError: they do not fit.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What is the same on every rank: settings of the parameter groups, scaler."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what state_dict gave. Called before load_pieces."""
