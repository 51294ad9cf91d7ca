"""Where rows can come from, and what is said when they are not there."""

import json
import sys
import types

import pytest

from xtuner_lite.data.sources import read_rows


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "alpaca.json").write_text('[{"n": 1},\n{"n": 2}]')
    (tmp_path / "more.jsonl").write_text('{"n": 3}\n')
    (tmp_path / "notes.md").write_text("not data")
    return tmp_path


def numbers(data):
    return [row.data["n"] for row in read_rows(data)]


def test_a_file_and_the_place_of_its_rows(folder):
    path = str(folder / "alpaca.json")
    assert [row.place for row in read_rows(path)] == [f"{path}:1", f"{path}:2"]
    assert numbers(folder / "alpaca.json") == [1, 2]


def test_a_folder_a_glob_and_a_list(folder):
    assert numbers(str(folder)) == [1, 2, 3]
    assert numbers(str(folder / "*.json*")) == [1, 2, 3]
    assert numbers([str(folder / "more.jsonl"), str(folder / "alpaca.json")]) == [3, 1, 2]


def test_rows_in_memory_and_datasets_objects():
    datasets = pytest.importorskip("datasets")
    rows = [{"n": 1}, {"n": 2}]
    assert [row.place for row in read_rows(rows)] == ["rows:1", "rows:2"]
    assert numbers(datasets.Dataset.from_list(rows)) == [1, 2]


def test_rows_written_in_a_config_become_plain_dicts():
    from mmengine.config import ConfigDict

    (row,) = read_rows([ConfigDict(messages=[dict(role="user", content="a")])])
    assert type(row.data) is dict
    assert type(row.data["messages"][0]) is dict


def test_a_name_that_looks_like_a_hub_id_is_looked_for_there(monkeypatch, folder):
    datasets = pytest.importorskip("datasets")
    seen = []

    def load(name):
        seen.append(name)
        if name == "no/where":
            raise ConnectionError("offline")
        return {"train": [{"n": 7}]}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert numbers("some-org/some.set") == [7]
    with pytest.raises(ValueError, match="'no/where' is no local file.*offline. Correct data="):
        numbers("no/where")
    monkeypatch.chdir(folder)
    (folder / "data").mkdir()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        numbers("data/alpaca")  # the folder is here, so this is a mistyped path
    assert seen == ["some-org/some.set", "no/where"]


def test_a_config_that_makes_a_dataset(folder):
    def load(path, split=None):
        rows = {"train": [{"n": 1}], "test": [{"n": 2}]}
        return rows[split] if split else rows

    assert numbers(dict(type=load, path="x")) == [1]
    assert numbers(dict(type=load, path="x", split="test")) == [2]
    with pytest.raises(ValueError, match=r"has the splits \['a'\], none called 'train'"):
        numbers(dict(type=lambda: {"a": []}))
    with pytest.raises(TypeError, match="the type is not a function"):
        numbers(dict(type=3))


def test_load_dataset_by_its_path_as_a_string(folder, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config = dict(
        type="datasets.load_dataset", path="json", data_files=str(folder / "more.jsonl"),
        split="train", cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    assert numbers(config) == [3]


def test_a_missing_file_names_the_nearest(folder):
    with pytest.raises(FileNotFoundError, match=r"does not exist; did you mean '.*alpaca\.json'\?"):
        numbers(str(folder / "alpca.json"))
    with pytest.raises(FileNotFoundError, match="holds alpaca.json, more.jsonl, notes.md"):
        numbers(str(folder / "sub" / "qqqqqqq.csv"))
    with pytest.raises(FileNotFoundError, match="no file matches"):
        numbers(str(folder / "*.csv"))


def test_files_without_rows(folder):
    (folder / "empty.json").write_text("")
    with pytest.raises(ValueError, match=r"empty\.json is empty \(0 bytes\)"):
        numbers(str(folder / "empty.json"))
    (folder / "empty.json").write_text(json.dumps([]))
    with pytest.raises(ValueError, match=r"empty\.json holds no rows"):
        numbers(str(folder / "empty.json"))
    with pytest.raises(ValueError, match="data is an empty list"):
        numbers([])


def test_what_cannot_be_a_source(folder):
    with pytest.raises(ValueError, match=r"file type '\.md' is not known; allowed: \.json"):
        numbers(str(folder / "notes.md"))
    with pytest.raises(TypeError, match="data is a int; allowed: a path"):
        numbers(3)
    with pytest.raises(TypeError, match="mixes paths and rows"):
        numbers(["a.json", {"n": 1}])
    (folder / "docs").mkdir()
    (folder / "docs" / "a.md").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"holds no data file \(it holds a\.md\)"):
        numbers(str(folder / "docs"))


def test_a_folder_saved_by_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"n": n} for n in range(5)])
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    assert numbers(str(tmp_path / "one")) == [0, 1, 2, 3, 4]
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "two")
    assert numbers(str(tmp_path / "two")) == [0, 1, 2, 3, 4]
    assert numbers(str(tmp_path / "two" / "test")) == [0, 1, 2, 3, 4]
    datasets.DatasetDict(a=rows).save_to_disk(tmp_path / "three")
    with pytest.raises(ValueError, match="none called .train.; name the folder of one.*three/a"):
        numbers(str(tmp_path / "three"))
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="is not whole.*Save it again"):
        numbers(str(tmp_path / "one"))


def test_modelscope(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope.msdatasets", None)
    with pytest.raises(ImportError, match="'modelscope:a/b' needs.*pip install modelscope"):
        numbers("modelscope:a/b")

    class MsDataset:
        @staticmethod
        def load(name):
            if name == "a/none":
                raise ValueError("no such data set")
            return {"train": MsDataset()}

        def to_hf_dataset(self):
            return [{"n": 4}]

    module = types.ModuleType("modelscope.msdatasets")
    module.MsDataset = MsDataset
    monkeypatch.setitem(sys.modules, "modelscope", types.ModuleType("modelscope"))
    monkeypatch.setitem(sys.modules, "modelscope.msdatasets", module)
    assert numbers("modelscope:a/b") == [4]
    assert numbers(dict(type=MsDataset.load, name="x")) == [4]
    with pytest.raises(ValueError, match="'a/none' cannot be loaded: no such data set"):
        numbers("modelscope:a/none")


def test_a_compressed_binary_file(tmp_path):
    (tmp_path / "a.parquet.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match="compressed inside; decompress"):
        numbers(str(tmp_path / "a.parquet.gz"))
