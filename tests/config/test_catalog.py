"""Listing and copying the shipped configs."""

from __future__ import annotations

import os

import pytest

from xtuner_lite.config import (
    ConfigError,
    check_config,
    configs_dir,
    copy_config,
    find_config,
    list_configs,
    load_config,
)
from xtuner_lite.config.dump import configs_equal

NAME = "smollm2_135m_sft_lora_identity"


def test_names_are_unique_and_described():
    infos = list_configs()
    names = [info.name for info in infos]
    assert names == sorted(set(names))
    assert NAME in names
    assert all(info.description for info in infos)
    assert not any(name.startswith("_") for name in names)
    assert (configs_dir() / "_base_" / "default_runtime.py").is_file()


@pytest.mark.parametrize(
    "pattern", ["135m_sft_lora_identity", "*135m_SFT_LORA_identity", "smollm2*sft_lora*identity"]
)
def test_pattern(pattern):
    assert [info.name for info in list_configs(pattern)] == [NAME]
    assert list_configs("no such config") == []


@pytest.mark.parametrize("name", [NAME, f"{NAME}.py"])
def test_find_by_name(name):
    assert find_config(name).stem == NAME


def test_copied_config_runs_from_any_folder(tmp_path, monkeypatch):
    target = copy_config(NAME, tmp_path / "mine")
    assert target == tmp_path / "mine" / f"{NAME}_copy.py"
    monkeypatch.chdir(tmp_path)
    cfg = load_config(os.path.relpath(target))
    assert check_config(cfg) == []
    assert configs_equal(cfg, load_config(NAME))


def test_copy_never_overwrites(tmp_path):
    target = copy_config(NAME, tmp_path)
    target.write_text("work_dir = 'edited'\n")
    with pytest.raises(ConfigError, match="exists and was left as it is.*--force"):
        copy_config(NAME, tmp_path)
    assert target.read_text() == "work_dir = 'edited'\n"
    copy_config(NAME, tmp_path, force=True)
    assert "LoraConfig" in target.read_text()


def test_flattened_copy_is_equal_and_needs_no_base(tmp_path):
    target = copy_config(NAME, tmp_path / "flat.py", flatten=True)
    assert target.name == "flat.py"
    assert "read_base" not in target.read_text()
    assert configs_equal(load_config(target), load_config(NAME))


def test_relative_base_is_only_copied_flat(tmp_path):
    (tmp_path / "base.py").write_text("work_dir = 'w'\n")
    leaf = tmp_path / "leaf.py"
    leaf.write_text(
        "from mmengine.config import read_base\nwith read_base():\n    from .base import *\n"
    )
    with pytest.raises(ConfigError, match="copy it with --flatten"):
        copy_config(leaf, tmp_path / "other")
    assert load_config(copy_config(leaf, tmp_path / "other", flatten=True)).work_dir == "w"


def test_unknown_name():
    with pytest.raises(ConfigError, match=f"did you mean '{NAME}'.*See: xtuner-lite list-cfg"):
        copy_config(f"{NAME}x", ".")
