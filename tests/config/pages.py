"""A small config page that the tests of this folder change."""

from __future__ import annotations

from pathlib import Path

PAGE = """\
from mmengine.config import read_base
from peft import LoraConfig
from torch.optim import AdamW

from xtuner_lite.data.dataset import ChatDataset
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.loading import load_causal_lm, load_tokenizer

with read_base():
    from xtuner_lite.configs._base_.default_runtime import *

model_path = "models/tiny"
max_length = 128
lr = 2e-4

tokenizer = dict(type=load_tokenizer, path=model_path)
model = dict(
    type=SupervisedFinetune,
    llm=dict(type=load_causal_lm, path=model_path),
    lora=dict(type=LoraConfig, r=8, target_modules="all-linear"),
)
train_dataloader = dict(
    batch_size=2,
    dataset=dict(
        type=ChatDataset,
        data="data/rows.json",
        max_length=max_length,
    ),
)
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=lr),
    clip_grad=dict(max_norm=1.0),
)
train_cfg = dict(max_epochs=1)
custom_hooks = [dict(type="EMAHook", begin_iter=3)]
"""


def write_page(folder: Path, *changes: tuple[str, str], name: str = "page.py") -> Path:
    """Write the page with each (old, new) text replaced; every old text must be there."""
    text = PAGE
    for old, new in changes:
        assert old in text, f"the page has no {old!r}"
        text = text.replace(old, new)
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def line_of(path: Path, text: str) -> int:
    """1-based number of the first line that holds the text."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)
