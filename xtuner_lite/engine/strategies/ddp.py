"""A copy of the model on every rank; gradients are summed after the last micro-batch of a step."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import nullcontext

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from xtuner_lite.engine.distributed import Ranks
from xtuner_lite.engine.optim import OptimWrapper
from xtuner_lite.engine.pieces import Piece
from xtuner_lite.engine.strategies.single_device import TorchStrategy
from xtuner_lite.registry import STRATEGIES
from xtuner_lite.structures import Batch, LossOutput


@STRATEGIES.register_module()
class DDP(TorchStrategy):
    """torch's DistributedDataParallel. The model must fit on one device.

    Args:
        device: as SingleDevice's.
        find_unused_parameters: search, in every backward, for parameters that got no gradient;
            for methods that use different parts of the model for different batches.
        bucket_cap_mb: size of the buckets in which gradients travel while backward goes on.
        ranks: the processes of the run (filled in by the Runner).
    """

    def __init__(
        self,
        device: str | None = None,
        *,
        find_unused_parameters: bool = False,
        bucket_cap_mb: int = 25,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(device, ranks=ranks)
        self._options = dict(
            find_unused_parameters=find_unused_parameters, bucket_cap_mb=bucket_cap_mb
        )
        self._ddp: DistributedDataParallel | None = None

    def prepare(
        self, model: nn.Module, optim_wrapper: OptimWrapper | None, *, train: bool
    ) -> nn.Module:
        """See Strategy.prepare."""
        super().prepare(model, optim_wrapper, train=train)
        if train and self.world_size > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            # The name changed after torch 2.10; every rank loads the same buffers by itself.
            names = inspect.signature(DistributedDataParallel.__init__).parameters
            sync = "forward_sync_buffers" if "forward_sync_buffers" in names else None
            self._ddp = DistributedDataParallel(
                model,
                device_ids=devices,
                **{sync or "broadcast_buffers": False},
                **self._options,
            )
        return model

    def forward(self, batch: Batch, *, is_last: bool = True) -> LossOutput:
        """See Strategy.forward."""
        if self._ddp is None or not self.model.training:
            return super().forward(batch)
        with self.forward_context(), nullcontext() if is_last else self._ddp.no_sync():
            return self._ddp(batch)

    def backward(self, loss_sum: Tensor, num_units: float, *, is_last: bool = True) -> None:
        """See Strategy.backward."""
        # DDP takes the mean over the ranks of what each gives; the sum is wanted.
        with nullcontext() if is_last or self._ddp is None else self._ddp.no_sync():
            super().backward(loss_sum * self.world_size, num_units, is_last=is_last)

    def pieces(self) -> Iterable[Piece]:
        """See Strategy.pieces; every rank has all, so the main one stores it."""
        return super().pieces() if self.is_main else []
