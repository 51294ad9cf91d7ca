"""Weights on disk, one tensor at a time."""

import json

import pytest
import torch

from xtuner_lite.models.shards import WeightFiles, write_shards


def tensors():
    return {name: torch.full((4,), float(index)) for index, name in enumerate("abc")}


def test_small_models_are_one_file_large_ones_have_an_index(tmp_path):
    (tmp_path / "one").mkdir()
    write_shards(iter(tensors().items()), tmp_path / "one")
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    (tmp_path / "two").mkdir()
    write_shards(iter(tensors().items()), tmp_path / "two", max_shard_size=32)  # two of 16 bytes
    index = json.loads((tmp_path / "two/model.safetensors.index.json").read_text())
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    assert index["weight_map"] == {"a": first, "b": first, "c": second}
    assert index["metadata"]["total_size"] == 48
    assert len(list((tmp_path / "two").iterdir())) == 3
    for folder in ("one", "two"):
        with WeightFiles(tmp_path / folder) as files:
            assert files.names == ["a", "b", "c"]
            assert all(torch.equal(files.get(name), t) for name, t in tensors().items())


@pytest.mark.parametrize("new_format", [True, False])
def test_pickled_files_are_read(tmp_path, new_format):
    file = tmp_path / "pytorch_model.bin"
    torch.save(tensors(), file, _use_new_zipfile_serialization=new_format)
    with WeightFiles(tmp_path) as files:
        assert torch.equal(files.get("c"), tensors()["c"])


def test_safetensors_come_before_pickles(tmp_path):
    torch.save({"old": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    write_shards(iter(tensors().items()), tmp_path)
    with WeightFiles(tmp_path) as files:
        assert files.names == ["a", "b", "c"]


def test_a_folder_without_weights_and_a_file_without_tensors(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no weights: none of model.safetensors"):
        WeightFiles(tmp_path)
    torch.save([torch.zeros(1)], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no file of named tensors"):
        WeightFiles(tmp_path)
