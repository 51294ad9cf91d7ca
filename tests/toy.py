"""A regression method and data set small enough to follow by hand, registered like any plug-in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset

from xtuner_lite.structures import LossOutput

FEATURES = 4


class ToyData(Dataset):
    """Sample i: a vector drawn from (i) and, with noise, from the reader's random state."""

    def __init__(self, size: int = 12, noise: float = 0.0, poison: int | None = None) -> None:
        self.size, self.noise, self.poison = size, noise, poison
        self.lengths = [1] * size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = np.random.RandomState(index).rand(FEATURES).astype(np.float32)
        if self.noise:
            x = x + self.noise * torch.randn(FEATURES).numpy()
        if index == self.poison:
            x[0] = np.nan
        return {"x": x, "labels": np.array([x.sum() * 2 - 1]), "row_ids": [f"toy.json:{index + 1}"]}


def toy_collate(samples: list[dict[str, Any]], pad_token_id: int | None = None) -> dict[str, Any]:
    """x float32 [B, FEATURES], y float32 [B]; a sample whose label is -100 does not count."""
    return {
        "x": torch.tensor(np.stack([s["x"] for s in samples])),
        "y": torch.tensor(np.concatenate([s["labels"] for s in samples]), dtype=torch.float32),
        "num_tokens": len(samples),
        "row_ids": [s["row_ids"] for s in samples],
    }


class ToyMethod(nn.Module):
    """Linear regression with dropout; the loss is the summed squared error, a unit is a sample."""

    def __init__(
        self, dropout: float = 0.0, tokenizer: Any = None, frozen_bias: bool = False
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.linear = nn.Linear(FEATURES, 1)
        self.linear.weight.data = torch.rand(1, FEATURES, generator=generator)
        self.linear.bias.data.zero_()
        self.linear.bias.requires_grad_(not frozen_bias)
        self.dropout = nn.Dropout(dropout)

    def count_units(self, batch: dict[str, Any]) -> float:
        return float((batch["y"] != -100).sum())

    def forward(self, batch: dict[str, Any]) -> LossOutput:
        mask = batch["y"] != -100
        error = (self.linear(self.dropout(batch["x"])).squeeze(-1).float() - batch["y"]) * mask
        return LossOutput(
            (error**2).sum(), float(mask.sum()), {"abs_error": error.abs().sum().detach()}
        )

    def save_pretrained(
        self, folder: Path, state_dict: dict[str, torch.Tensor] | None = None
    ) -> None:
        save_file(dict(state_dict or self.state_dict()), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))

    def load_pretrained(self, folder: str | Path) -> None:
        from safetensors.torch import load_file

        self.load_state_dict(load_file(Path(folder) / "model.safetensors"))


QUIET = dict(dataset_preview=None, loss_curve=None, trainability=None, throughput=None)


def toy_config(work_dir: str | Path, **changes: Any) -> dict[str, Any]:
    """Sections of a Runner for the toy; keyword arguments replace sections."""
    config = dict(
        work_dir=str(work_dir),
        model=dict(type=ToyMethod),
        train_dataloader=dict(
            dataset=dict(type=ToyData), batch_size=2, collate_fn=dict(type=toy_collate)
        ),
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=0.05),
            dtype="fp32",
            accumulative_counts=2,
            clip_grad=dict(max_norm=1.0),
        ),
        train_cfg=dict(max_epochs=2),
        randomness=dict(seed=1),
        default_hooks=dict(QUIET),
        log_level="WARNING",
    )
    return {**config, **changes}
