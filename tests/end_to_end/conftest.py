"""A model folder, data and a config on disk, and the command line run as users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[2]

CONFIG = """
from mmengine.config import read_base
from peft import LoraConfig

from xtuner_lite.data.dataset import ChatDataset
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.loading import load_causal_lm, load_tokenizer

with read_base():
    from xtuner_lite.configs._base_.default_runtime import *
    from xtuner_lite.configs._base_.schedule import *

model_path = {model_path!r}
data_path = {data_path!r}
max_length = 128  # tokens

tokenizer = dict(type=load_tokenizer, path=model_path)
lora = dict(type=LoraConfig, r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear")
model = dict(type=SupervisedFinetune, llm=dict(type=load_causal_lm, path=model_path), lora=lora)

train_set = dict(type=ChatDataset, data=data_path, max_length=max_length)
train_dataloader = dict(batch_size=1, dataset=train_set)

optim_wrapper["optimizer"].update(lr=1e-2)
train_cfg = dict(max_epochs=2)
default_hooks.update(logger=dict(interval=1), checkpoint=dict(interval=2, max_keep_ckpts=2))
"""


def conversations(number: int = 20) -> list[dict]:
    """Short OpenAI-format rows."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} plus two?"},
                {"role": "assistant", "content": f"It is {i + 2}. " * (1 + i % 4)},
            ]
        }
        for i in range(number)
    ]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A tiny chat model in Hugging Face form."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture()
def project(tmp_path, model_folder) -> Path:
    """A user's folder: data.json and cfg.py that trains the tiny model on it."""
    (tmp_path / "data.json").write_text(json.dumps(conversations(), indent=1))
    text = CONFIG.format(model_path=str(model_folder), data_path=str(tmp_path / "data.json"))
    (tmp_path / "cfg.py").write_text(text)
    return tmp_path


def xtuner_lite(
    *words: object, cwd: Path, prefix: tuple[str, ...] = (), **options
) -> subprocess.CompletedProcess:
    """Run ``xtuner-lite WORDS`` in ``cwd`` as a process of its own."""
    return subprocess.run(
        [*prefix, sys.executable, "-m", "xtuner_lite.cli.main", *map(str, words)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )
