"""Which samples an optimizer step sees: a function of (seed, epoch, position), of nothing else.

The order does not know the world size, the number of workers or where a run was resumed. Position
is
counted in steps inside an epoch; nothing before it is read or decoded.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from xtuner_lite.registry import SAMPLERS


class Sampler(Protocol):
    """What a registered sampler must offer. Plain state-free objects: order(epoch) is all."""

    num_samples: int  # of one epoch

    def order(self, epoch: int) -> np.ndarray:
        """int64 [num_samples]: the dataset indices of ``epoch`` (0-based), in reading order."""
        ...


@SAMPLERS.register_module(name=["EpochSampler", "DefaultSampler"])
class EpochSampler:
    """Every sample once per epoch, shuffled by (seed, epoch); a mixture chooses its own samples.

    Args:
        num_samples: length of the dataset (the Runner fills it in).
        shuffle: False keeps the dataset's own order in every epoch.
        seed: base of the shuffle; None takes the run's seed (the Runner fills it in).
        dataset: asked for its ``epoch_order(epoch, seed=, shuffle=)`` and ``samples_per_epoch``, if
            it has them (the Runner fills it in).
    """

    def __init__(
        self,
        num_samples: int,
        *,
        shuffle: bool = True,
        seed: int | None = None,
        dataset: Any = None,
    ) -> None:
        self._own_order = getattr(dataset, "epoch_order", None)
        if self._own_order is not None:
            num_samples = dataset.samples_per_epoch
        if num_samples < 1:
            raise ValueError(
                f"{type(self).__name__} got a data set of {num_samples} samples; at least 1 is "
                "needed. Look at the data report above: it says why each row was skipped."
            )
        self.num_samples = num_samples
        self.shuffle = shuffle
        self.seed = 0 if seed is None else seed

    def order(self, epoch: int) -> np.ndarray:
        """int64 [num_samples]: indices that depend on (seed, epoch) only."""
        if self._own_order is not None:
            return self._own_order(epoch, seed=self.seed, shuffle=self.shuffle)
        if not self.shuffle:
            return np.arange(self.num_samples, dtype=np.int64)
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)


@SAMPLERS.register_module()
class LengthGroupedSampler(EpochSampler):
    """EpochSampler's samples, those of a step of like length: less padding for unpacked data.

    The epoch's random order is cut into windows of ``window_steps`` steps, each window is sorted by
    length and cut into steps, and the steps are shuffled, the one with the longest sample first: a
    batch that does not fit into memory fails at once. A step is sorted too, so that its
    micro-batches are of like length on every rank. Groups are whole steps: the order is the same
    for every split of a step over ranks and micro-batches.

    Args:
        num_samples, shuffle, seed: as EpochSampler's. Without shuffle: longest first.
        dataset: has ``lengths``, tokens of each sample (the Runner fills it in).
        group_size: samples of a step (the Runner fills it in).
        window_steps: steps that are sorted together. Default 50, as transformers': more groups
            better, fewer are closer to a random order.
        by_modality: samples with images and samples of text alone stand in different steps, but for
            one step of each window, where they meet: a step of text alone runs the vision tower on
            next to nothing. Needs the data set's ``num_images``.

    Raises:
        ValueError: the data set has no ``lengths``, or no ``num_images`` with by_modality;
            window_steps below 1.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        dataset: Any,
        group_size: int = 1,
        shuffle: bool = True,
        seed: int | None = None,
        window_steps: int = 50,
        by_modality: bool = False,
    ) -> None:
        super().__init__(num_samples, shuffle=shuffle, seed=seed, dataset=dataset)
        lengths = getattr(dataset, "lengths", None)
        if lengths is None:
            raise ValueError(
                f"LengthGroupedSampler needs the lengths of the samples, and "
                f"{type(dataset).__name__} has no attribute 'lengths'. Add it (tokens of each "
                "sample), or use EpochSampler."
            )
        if window_steps < 1:
            raise ValueError(f"window_steps={window_steps!r}; at least 1 step is sorted together")
        self.lengths = np.asarray(lengths)
        num_images = getattr(dataset, "num_images", None)
        if by_modality and num_images is None:
            raise ValueError(
                f"by_modality=True needs the images of each sample, and {type(dataset).__name__} "
                "has no attribute 'num_images'. Add it, or leave by_modality out."
            )
        # Without by_modality all samples are of one kind.
        counts = num_images if by_modality else np.zeros(len(self.lengths))
        self.has_images = np.asarray(counts) > 0
        self.group_size, self.window_steps = group_size, window_steps

    def order(self, epoch: int) -> np.ndarray:
        """int64 [num_samples]: indices that depend on (seed, epoch, group_size) only."""
        indices = super().order(epoch)
        lengths = self.lengths[indices]
        if not self.shuffle:
            return indices[np.argsort(-lengths, kind="stable")]
        window = np.arange(len(indices)) // (self.group_size * self.window_steps)
        indices = indices[np.lexsort((-lengths, self.has_images[indices], window))]
        num_full = len(indices) // self.group_size
        whole, rest = np.split(indices, [num_full * self.group_size])
        if not num_full:
            return rest
        steps = whole.reshape(num_full, self.group_size)
        shuffled = np.random.default_rng([self.seed, epoch, 104]).permutation(num_full)
        longest = int(np.argmax(self.lengths[steps].max(axis=1)))
        first = np.concatenate([[longest], shuffled[shuffled != longest]])
        return np.concatenate([steps[first].reshape(-1), rest])  # the short step stays the last


class Ticket(NamedTuple):
    """One sample to read. ``real`` is False for a filler: read, but nothing in it is learnt.

    A filler keeps a rank without a sample of its own in step with the others in the last, short
    group of an epoch.
    """

    epoch: int
    index: int
    real: bool = True


@dataclass(frozen=True)
class StepPlan:
    """How the samples of an epoch fall into optimizer steps, micro-batches and ranks.

    Step s of an epoch takes samples [s * group_size, (s + 1) * group_size) of the epoch's order;
    the
    last one may be short. The samples of a step are the same for every world size.
    """

    sampler: Sampler
    batch_size: int  # samples in one micro-batch of one rank
    accumulative_counts: int  # micro-batches in one step
    rank: int = 0
    world_size: int = 1
    drop_last: bool = False

    @property
    def group_size(self) -> int:
        """Samples in one full optimizer step, over all ranks."""
        return self.batch_size * self.accumulative_counts * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        full, rest = divmod(self.sampler.num_samples, self.group_size)
        return full + (1 if rest and not self.drop_last else 0)

    def samples_of_step(self, step: int) -> tuple[int, np.ndarray]:
        """(epoch, int64 [<= group_size]): dataset indices of ``step`` (from 0), all ranks."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        begin = step_in_epoch * self.group_size
        return epoch, self._order(epoch)[begin : begin + self.group_size]

    def micro_batches(self, step: int) -> list[list[Ticket]]:
        """The micro-batches of ``step`` on this rank; every rank gets the same number of them."""
        epoch, group = self.samples_of_step(step)
        per_micro = self.batch_size * self.world_size
        micro_batches = []
        for begin in range(0, len(group), per_micro):
            share = group[begin : begin + per_micro]
            mine = share[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
            tickets = [Ticket(epoch, int(index)) for index in mine]
            micro_batches.append(tickets or [Ticket(epoch, int(share[0]), real=False)])
        return micro_batches

    def _order(self, epoch: int) -> np.ndarray:
        cached = self.__dict__.get("_cached")
        if cached is None or cached[0] != epoch:
            cached = (epoch, self.sampler.order(epoch))
            object.__setattr__(self, "_cached", cached)
        return cached[1]


class MicroBatchStream:
    """The micro-batches of steps [start, stop), as lists of tickets: a torch ``batch_sampler``."""

    def __init__(self, plan: StepPlan, start: int, stop: int) -> None:
        self.plan, self.start, self.stop = plan, start, stop

    def __iter__(self) -> Iterator[list[Ticket]]:
        for step in range(self.start, self.stop):
            yield from self.plan.micro_batches(step)


@contextmanager
def isolated_random_state(*key: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generators with ``key``, and put them back afterwards.

    So whatever randomness a dataset uses, it depends on (seed, epoch, index), and reading data
    never
    moves the generators that dropout draws from.
    """
    import torch

    python_state, numpy_state, torch_state = (
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
    )
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
