"""Reads the micro-batches of each optimizer step, from any step on, with or without workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from xtuner_lite.data.sampler import (
    EpochSampler,
    MicroBatchStream,
    Sampler,
    StepPlan,
    Ticket,
    isolated_random_state,
)
from xtuner_lite.registry import COLLATORS, DATASETS, SAMPLERS
from xtuner_lite.structures import IGNORE_INDEX, Batch


class _TicketReader(Dataset):
    """The dataset, read by ticket: randomness by (seed, epoch, index), fillers masked."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, ticket: Ticket) -> dict[str, Any]:
        with isolated_random_state(self.seed, ticket.epoch, ticket.index):
            sample = self.dataset[ticket.index]
        if ticket.real:
            return sample
        sample = dict(sample)
        sample["labels"] = np.full_like(np.asarray(sample["labels"]), IGNORE_INDEX)
        sample["row_ids"] = []
        return sample


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

    def __iter__(self) -> Iterator[list[Batch]]:
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
            collate_fn=self.collate_fn,
            num_workers=self.num_workers,
            generator=generator,
            **self.loader_options,
        )
        batches = iter(loader)
        for step in range(start, stop):
            yield [next(batches) for _ in self.plan.micro_batches(step)]


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
    sampler = SAMPLERS.build(
        sampler or dict(type=EpochSampler),
        num_samples=len(dataset),
        shuffle=shuffle,
        seed=seed,
        dataset=dataset,
    )
    pad_token_id = getattr(tokenizer, "pad_token_id", None)
    collate = _build_collate(collate_fn, pad_token_id)
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
    collate_fn: Any, pad_token_id: int | None
) -> Callable[[list[dict[str, Any]]], Batch]:
    if callable(collate_fn):
        return collate_fn
    from functools import partial

    cfg = dict(collate_fn or dict(type="packed_collate"))
    function = COLLATORS.resolve(cfg.pop("type"))
    return partial(function, **{"pad_token_id": pad_token_id, **cfg})
