"""safetensors read and written tensor by tensor: as the library does it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from xtuner_lite.export.publish import ExportError
from xtuner_lite.export.tensor_files import (
    TensorInfo,
    WeightFiles,
    parse_size,
    plan_shards,
    shard_names,
    write_tensors,
)

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0]).bfloat16(),
    "c": torch.tensor(3, dtype=torch.int64),
    "d": torch.zeros(0, 4, dtype=torch.float16),
    "e": torch.tensor([True, False, True]),
}


def test_reads_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    files = WeightFiles.of_model(tmp_path)
    assert files.infos.keys() == TENSORS.keys()
    assert files.num_bytes == 24 + 4 + 8 + 0 + 3
    for name, tensor in TENSORS.items():
        assert torch.equal(files.read(name), tensor)
        assert files.read(name).dtype == tensor.dtype


def test_the_library_reads_what_is_written(tmp_path):
    infos = [TensorInfo(n, t.dtype, tuple(t.shape)) for n, t in TENSORS.items()]
    write_tensors(tmp_path / "x.safetensors", infos, iter(TENSORS.values()))
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(tensor, TENSORS[name])


def test_shards():
    infos = [TensorInfo(str(i), torch.int8, (size,)) for i, size in enumerate([4, 4, 20, 1, 9])]
    shards = plan_shards(infos, 10)
    # 4 + 4 fit; 20 is larger than a shard and stands alone; 1 + 9 fit exactly
    assert [[i.name for i in shard] for shard in shards] == [["0", "1"], ["2"], ["3", "4"]]
    assert shard_names(3)[1] == "model-00002-of-00003.safetensors"
    assert shard_names(1) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), (77, 77)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5XB", "nan"])
def test_no_sizes(text):
    with pytest.raises(ExportError, match="is no size; write it like '5GB'"):
        parse_size(text)


def test_damaged_files(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    whole = file.read_bytes()
    for broken, message in (
        (whole[:-2], "is cut short"),
        (b"\xff" * 40, "no safetensors file"),
        (whole[:8] + b"{" + whole[9:].replace(b'"', b"'"), "damaged header"),
    ):
        file.write_bytes(broken)
        with pytest.raises(ExportError, match=message):
            WeightFiles.of_model(tmp_path)
    file.unlink()
    assert WeightFiles.of_model(tmp_path) is None
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}')
    with pytest.raises(ExportError, match="names x.safetensors, which is not there"):
        WeightFiles.of_model(tmp_path)
