"""DeepSpeed's ZeRO optimizers in the project's terms: which elements a rank holds, norm, skip.

A step of DeepSpeed is one closed call. What the loop does between backward and update (look at the
gradient's norm, skip the step) and what a checkpoint stores (elements by parameter name) is read
here from the insides of its two optimizers, and nowhere else. Written for DeepSpeed 0.19.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """Elements ``[start, stop)`` of one parameter, and where they lie in a flat share.

    Attributes:
        name: the parameter's name in the training method.
        shape: of the whole parameter.
        start, stop: positions in the flattened parameter.
        offset: position of ``start`` in the share.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    offset: int

    def of(self, share: Tensor) -> Tensor:
        """This slice's elements, a view of ``share``."""
        return share[self.offset : self.offset + self.stop - self.start]


@dataclass(frozen=True)
class Share:
    """This rank's part of one parameter group: float32 [n], what the optimizer updates."""

    flat: Tensor
    slices: list[Slice]


class ZeroOptimizer(ABC):
    """What the strategy needs of DeepSpeed's optimizer of one stage.

    Args:
        optimizer: ``engine.optimizer``.
        names: id of a parameter -> its name in the training method.
        rank: of this process.
    """

    def __init__(self, optimizer: Any, names: Mapping[int, str], rank: int) -> None:
        self.optimizer, self.names, self.rank = optimizer, names, rank

    @abstractmethod
    def shares(self) -> Iterator[Share]:
        """The flat float32 shares of this rank and what lies in them; padding is in no slice."""

    @abstractmethod
    def scaled_norm(self) -> Tensor:
        """Norm of the step's gradient over all ranks, times the loss scale; inf where not finite.

        A collective. The gradients must be reduced: after the last backward of a step.
        """

    @abstractmethod
    def known_norm(self, norm: Tensor) -> Any:
        """Context in which DeepSpeed's step takes ``norm`` and does not compute it again."""

    @abstractmethod
    def discard(self) -> None:
        """Drop the step's gradients, as DeepSpeed's own step does on overflow."""

    @abstractmethod
    def publish(self) -> None:
        """Make the model's weights those of the shares, on all ranks. A collective."""

    def grad_norm(self) -> float:
        """Norm of the step's gradient over all ranks, without the loss scale; a collective."""
        return self.scaled_norm().item() / float(self.optimizer.loss_scale)


class FlatGroups(ZeroOptimizer):
    """Stages 1 and 2: each group is one flat tensor, padded at its end, in equal shares."""

    def shares(self) -> Iterator[Share]:
        """See ZeroOptimizer.shares."""
        zero = self.optimizer
        groups = zip(
            zero.round_robin_bit16_groups,  # in the order in which they lie in the flat tensor
            zero.round_robin_bit16_padding,
            zero.single_partition_of_fp32_groups,
            strict=True,
        )
        for parameters, paddings, flat in groups:
            begin = self.rank * flat.numel()
            end, position, slices = begin + flat.numel(), 0, []
            for parameter, padding in zip(parameters, paddings, strict=True):
                low = max(begin, position)
                high = min(end, position + parameter.numel())
                if low < high:
                    slices.append(
                        Slice(
                            self.names[id(parameter)], tuple(parameter.shape),
                            low - position, high - position, low - begin,
                        )
                    )  # fmt: skip
                position += parameter.numel() + padding
            yield Share(flat, slices)

    def scaled_norm(self) -> Tensor:
        """See ZeroOptimizer.scaled_norm."""
        self.optimizer._wait_for_offload_copies()
        return _finite_or_inf(self.optimizer.scaled_global_norm())

    @contextmanager
    def known_norm(self, norm: Tensor) -> Iterator[None]:
        """See ZeroOptimizer.known_norm."""
        self.optimizer.scaled_global_norm = lambda *args, **kwargs: norm
        try:
            yield
        finally:
            del self.optimizer.scaled_global_norm

    def discard(self) -> None:
        """See ZeroOptimizer.discard."""
        zero = self.optimizer
        zero.micro_step_id = -1
        zero.zero_grad(set_to_none=True)
        zero._epilogue_ran_this_backward = False
        if zero.cpu_offload:
            zero._offload_accumulated_param_ids = set()
            zero.reset_cpu_buffers()
            return
        for key in zero.averaged_gradients:
            zero.averaged_gradients[key] = None
            zero.all_grad_tensors[key] = None

    def publish(self) -> None:
        """See ZeroOptimizer.publish."""
        self.optimizer.update_lp_params()


class SplitParameters(ZeroOptimizer):
    """Stage 3: each parameter is cut into equal shares, the last ones padded."""

    def shares(self) -> Iterator[Share]:
        """See ZeroOptimizer.shares."""
        zero = self.optimizer
        for parameters, flat in zip(
            zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True
        ):
            offset, slices = 0, []
            for parameter in parameters:
                size = parameter.partition_numel()
                start = min(self.rank * size, parameter.ds_numel)
                stop = min(start + size, parameter.ds_numel)
                if start < stop:
                    name, shape = self.names[id(parameter)], tuple(parameter.ds_shape)
                    slices.append(Slice(name, shape, start, stop, offset))
                offset += size
            yield Share(flat, slices)

    def scaled_norm(self) -> Tensor:
        """See ZeroOptimizer.scaled_norm."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        return _finite_or_inf(combine_grad_norm_groups(self.optimizer._get_norm_groups()))

    @contextmanager
    def known_norm(self, norm: Tensor) -> Iterator[None]:
        """See ZeroOptimizer.known_norm."""
        self.optimizer._get_norm_groups = lambda: [norm]
        try:
            yield
        finally:
            del self.optimizer._get_norm_groups

    def discard(self) -> None:
        """See ZeroOptimizer.discard."""
        zero = self.optimizer
        zero._pre_step()
        zero._partition_all_parameters()
        zero.zero_grad(set_to_none=True)
        if zero.offload_optimizer:
            zero.reset_cpu_buffers()
        else:
            zero.averaged_gradients = {}
        self._gather_persistent()

    def publish(self) -> None:
        """See ZeroOptimizer.publish."""
        zero = self.optimizer
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        self._gather_persistent()

    def _gather_persistent(self) -> None:
        if parameters := self.optimizer.persistent_parameters:
            parameters[0].all_gather(parameters)


def _finite_or_inf(norm: Tensor) -> Tensor:
    """DeepSpeed marks a norm that is not finite by a negative number."""
    bad = ~torch.isfinite(norm) | (norm < 0)
    return torch.where(bad, torch.full_like(norm, math.inf), norm)
