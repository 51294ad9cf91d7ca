"""Reads the micro-batches of each optimizer step, from any step on, with or without workers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from xtuner_lite.data.collate import SampleError
from xtuner_lite.data.fingerprint import array_digest
from xtuner_lite.data.sampler import (
    EpochSampler,
    MicroBatchStream,
    Sampler,
    StepPlan,
    Ticket,
    isolated_random_state,
)
from xtuner_lite.images.vision_inputs import vision_of
from xtuner_lite.registry import COLLATORS, DATASETS, SAMPLERS
from xtuner_lite.structures import IGNORE_INDEX, Batch

#: What a mistake in a data set's or collator's own code looks like.
_SLIPS = (KeyError, IndexError, TypeError, AttributeError)


class _Read(NamedTuple):
    index: int
    sample: Any


class _TicketReader(Dataset):
    """The dataset, read by ticket: randomness by (seed, epoch, index), fillers masked."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, ticket: Ticket) -> _Read:
        try:
            with isolated_random_state(self.seed, ticket.epoch, ticket.index):
                sample = self.dataset[ticket.index]
        except _SLIPS as error:
            raise ValueError(
                f"reading sample {ticket.index} of {type(self.dataset).__name__} raised "
                f"{type(error).__name__}: {error}. Correct its __getitem__ or its data."
            ) from error
        return _Read(ticket.index, sample if ticket.real else _without_labels(sample, ticket))


def _without_labels(sample: Any, ticket: Ticket) -> dict[str, Any]:
    if not isinstance(sample, Mapping) or "labels" not in sample:
        raise ValueError(
            f"sample {ticket.index} has no 'labels' to mask: the last step of an epoch has fewer "
            "samples than ranks, and a rank without one reads another's unlearnt. Set "
            "drop_last=True, or give the samples labels."
        )
    labels = np.full_like(np.asarray(sample["labels"]), IGNORE_INDEX)
    return {**sample, "labels": labels, "row_ids": []}


class _IndexedCollate:
    """A collator of what _TicketReader reads; its errors name the samples of the data set."""

    def __init__(self, collate_fn: Callable[[list[Any]], Batch]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, reads: list[_Read]) -> Batch:
        try:
            return self.collate_fn([read.sample for read in reads])
        except SampleError as error:
            index = reads[error.position].index
            raise ValueError(f"sample {index} of the data set cannot be used: {error}") from error
        except _SLIPS as error:
            indices = ", ".join(str(read.index) for read in reads)
            raise ValueError(
                f"the collate_fn raised {type(error).__name__}: {error} on the samples {indices} "
                "of the data set. Correct it, or what the data set's __getitem__ returns."
            ) from error


class StepDataLoader:
    """An iterable over optimizer steps; each step is the list of its micro-batches.

    Args:
        dataset: map-style, see docs/concepts/data.md for the form of a sample.
        plan: which samples each step sees.
        collate_fn: samples of one micro-batch -> Batch.
        seed: base of the randomness inside the dataset.
        num_workers: processes that read ahead; 0 reads in this process.
        loader_options: further keywords of torch's DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: StepPlan,
        collate_fn: Callable[[list[dict[str, Any]]], Batch],
        *,
        seed: int = 0,
        num_workers: int = 0,
        **loader_options: Any,
    ) -> None:
        self.dataset = dataset
        self.plan = plan
        self.collate_fn = collate_fn
        self.seed = seed
        self.num_workers = num_workers
        self.loader_options = loader_options

    @property
    def sampler(self) -> Sampler:
        """The order of samples (mmengine's hooks look for it here)."""
        return self.plan.sampler

    @property
    def batch_size(self) -> int:
        """Samples in one micro-batch of one rank."""
        return self.plan.batch_size

    def __len__(self) -> int:
        """Optimizer steps in one epoch."""
        return self.plan.steps_per_epoch

    @cached_property
    def order_digest(self) -> str:
        """Equal where sampler and seed give the same order of samples."""
        order = self.plan.sampler.order(0)
        return repr(order) if isinstance(order, range) else array_digest(order)

    @property
    def endless(self) -> bool:
        """Whether the data is a stream, which has no epochs."""
        return getattr(self.dataset, "endless", False)

    def __iter__(self) -> Iterator[list[Batch]]:
        if self.endless:
            raise ValueError(
                "a stream cannot be read to its end, and so not be evaluated on: give ChatDataset "
                "here, with limit=N for the first N rows"
            )
        return self.steps(0, len(self))

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step in [start, stop), counted from the run's first step.

        No sample before ``start`` is read.
        """
        # A generator of its own: building a torch DataLoader iterator draws a number, and drawing
        # it
        # from the global generator would make a resumed run differ from an uninterrupted one.
        generator = torch.Generator().manual_seed(self.seed)
        loader = DataLoader(
            _TicketReader(self.dataset, self.seed),
            batch_sampler=MicroBatchStream(self.plan, start, stop),
            collate_fn=_IndexedCollate(self.collate_fn),
            num_workers=self.num_workers,
            generator=generator,
            **self.loader_options,
        )
        batches = iter(loader)
        for step in range(start, stop):
            yield [next(batches) for _ in self.plan.micro_batches(step)]

    def samples_of_step(self, step: int) -> list[tuple[int, Any]]:
        """(index in the data set, sample) of each sample that ``step`` (from 0) sees, all ranks."""
        epoch, indices = self.plan.samples_of_step(step)
        reader = _TicketReader(self.dataset, self.seed)
        return [tuple(reader[Ticket(epoch, int(index))]) for index in indices]


def rows_of_step(loader: StepDataLoader, step: int) -> list[str]:
    """The source rows ('file:line') that optimizer step ``step`` (from 0) sees, on all ranks."""
    samples = [sample for _, sample in loader.samples_of_step(step)]
    return [str(row) for sample in samples for row in sample["row_ids"]]


def build_dataloader(
    dataset: Dataset | dict[str, Any],
    batch_size: int = 1,
    *,
    num_workers: int = 0,
    sampler: Sampler | dict[str, Any] | None = None,
    collate_fn: Callable[..., Batch] | dict[str, Any] | None = None,
    drop_last: bool = False,
    pin_memory: bool = False,
    persistent_workers: bool = False,
    prefetch_factor: int | None = None,
    tokenizer: Any = None,
    accumulative_counts: int = 1,
    shuffle: bool = True,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> StepDataLoader:
    """Build the loader of one ``*_dataloader`` section of a config.

    The last six arguments come from the Runner, not from the section.

    Args:
        dataset: a dataset, or its config.
        batch_size: samples in one micro-batch of one rank.
        num_workers: reading processes per rank.
        sampler: order of samples; default EpochSampler (shuffled for training).
        collate_fn: default packed_collate with the tokenizer's pad id.
        drop_last: leave out the short last step of an epoch.
        pin_memory, persistent_workers, prefetch_factor: as in torch's DataLoader.

    Raises:
        ValueError: the dataset is empty, or no full step is left with ``drop_last``.
    """
    if batch_size < 1:
        raise ValueError(
            f"batch_size is {batch_size}; it counts samples per micro-batch and must be >= 1"
        )
    dataset = DATASETS.build(dataset, tokenizer=tokenizer)
    group_size = batch_size * accumulative_counts * world_size
    sampler = SAMPLERS.build(
        sampler or dict(type=EpochSampler),
        num_samples=getattr(dataset, "samples_per_epoch", None) or len(dataset),
        shuffle=shuffle,
        seed=seed,
        dataset=dataset,
        group_size=group_size,
    )
    collate = _build_collate(
        collate_fn,
        pad_token_id=getattr(tokenizer, "pad_token_id", None),
        max_length=getattr(dataset, "max_length", None),
        vision=vision_of(tokenizer),
    )
    plan = StepPlan(sampler, batch_size, accumulative_counts, rank, world_size, drop_last)
    if plan.steps_per_epoch < 1:
        raise ValueError(
            f"drop_last=True leaves no step: the data set has {sampler.num_samples} samples and "
            "one step takes "
            f"{plan.group_size} (batch_size {batch_size} x accumulative_counts "
            f"{accumulative_counts} x "
            f"{world_size} ranks). Lower one of them, or set drop_last=False."
        )
    options = dict(pin_memory=pin_memory)
    if num_workers:
        options.update(persistent_workers=persistent_workers, prefetch_factor=prefetch_factor)
    return StepDataLoader(dataset, plan, collate, seed=seed, num_workers=num_workers, **options)


def _build_collate(
    collate_fn: Any, *, pad_token_id: int | None, max_length: int | None, vision: Any
) -> Callable[[list[dict[str, Any]]], Batch]:
    if callable(collate_fn):
        return collate_fn
    cfg = dict(collate_fn or dict(type="packed_collate"))
    function = COLLATORS.resolve(cfg.pop("type"))
    given: dict[str, Any] = {"pad_token_id": pad_token_id}
    takes = inspect.signature(function).parameters
    if vision is not None and "vision" not in takes:
        raise ValueError(
            f"the collate_fn {function.__name__} has no parameter vision, so it would leave the "
            "images out; take packed_collate, or give it one (see packed_collate's)"
        )
    given |= {k: v for k, v in (("max_length", max_length), ("vision", vision)) if k in takes}
    return partial(function, **{**given, **cfg})
