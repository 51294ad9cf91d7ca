"""A user's folder with a model, data and a config, for commands run in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.conftest import CONFIG, conversations
from tests.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A tiny chat model in Hugging Face form."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture()
def project(tmp_path, model_folder, monkeypatch) -> Path:
    """The working folder: data.json (one row a line, the first on line 2) and cfg.py."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "data.json", conversations())
    text = CONFIG.format(model_path=str(model_folder), data_path="data.json")
    (tmp_path / "cfg.py").write_text(text)
    return tmp_path


def write_rows(path: Path, rows: list[dict]) -> None:
    """A JSON array with row i (from 0) on line i + 2."""
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
