"""Trainings of a tiny LLaVA by the Runner, on one process or several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch.utils.data import Dataset

from tests.engine.strategies.same_run import Figures, StopAfter
from tests.tiny import tiny_llama
from tests.tiny_images import IMAGE, image_batch, plain_images, tiny_tower
from xtuner_lite.methods.llava import LLaVAModel
from xtuner_lite.runner.runner import Runner

#: Segments of each sample: (images, learnt tokens). Every second one is text with a filler: on two
#: ranks with one sample each, one rank sees real images where the other has none.
SAMPLES = [[(1, 4), (2, 3)], [(0, 6), (1, 0)]] * 6


class ImageRows(Dataset):
    """Sample i is a ready packed row; see SAMPLES."""

    def __init__(self) -> None:
        self.lengths = [1] * len(SAMPLES)

    def __len__(self) -> int:
        return len(SAMPLES)

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = image_batch(plain_images, SAMPLES[index], seed=index)
        return {"batch": batch, "labels": np.zeros(1), "row_ids": [f"images.json:{index + 1}"]}


def only_sample(samples: list[dict[str, Any]], pad_token_id: int | None = None) -> dict[str, Any]:
    """The ready batch of the one sample."""
    (sample,) = samples
    return sample["batch"] | {"row_ids": [sample["row_ids"]]}


def llava(kind: str) -> LLaVAModel:
    """'one': projector alone; 'two': and LoRA in the language model; 'whole': all in full."""
    torch.manual_seed(5)
    options = {
        "one": dict(freeze_llm=True, freeze_visual_encoder=True),
        "two": dict(llm_lora=LoraConfig(r=2, lora_dropout=0.1), freeze_visual_encoder=True),
        "towers": dict(llm_lora=LoraConfig(r=2), visual_encoder_lora=LoraConfig(r=2)),
        "whole": {},
    }[kind]
    return LLaVAModel(tiny_llama(), tiny_tower(), image_token_id=IMAGE, **options)


def train(
    work_dir: Path,
    kind: str,
    *,
    strategy: dict[str, Any] | None = None,
    world_size: int = 1,
    stop_after: int | None = None,
    max_iters: int = 6,
    **changes: Any,
) -> tuple[Runner, list[float]]:
    """Trains 6 steps of 2 samples, with a checkpoint every 3; returns the losses."""
    figures = Figures()
    config = dict(
        model=llava(kind),
        work_dir=str(work_dir),
        strategy=strategy,
        launcher="pytorch" if world_size > 1 else "none",
        train_dataloader=dict(
            dataset=ImageRows(), batch_size=1, collate_fn=dict(type=only_sample),
            sampler=dict(type="EpochSampler", shuffle=False),
        ),
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=1e-2), dtype="fp32",
            accumulative_counts=2 // world_size, clip_grad=dict(max_norm=1.0),
        ),
        train_cfg=dict(max_iters=max_iters),
        randomness=dict(seed=3),
        default_hooks=dict(
            dataset_preview=None, loss_curve=None, checkpoint=dict(interval=3, max_keep_ckpts=3)
        ),
        custom_hooks=[figures, *([StopAfter(stop_after)] if stop_after else [])],
        log_level="ERROR",
    )  # fmt: skip
    runner = Runner.from_cfg({**config, **changes})
    runner.train()
    return runner, figures.losses


def losses_of_runs(runs: list[tuple[Path, str, dict[str, Any]]]) -> list[list[float]]:
    """For run_ranks: several trainings in the same two processes."""
    return [train(folder, kind, world_size=2, **options)[1] for folder, kind, options in runs]
