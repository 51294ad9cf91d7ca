"""What a config calls a model becomes a folder, or an error that says what to do."""

import sys
import types

import pytest

from tests.tiny import tiny_llama
from xtuner_lite.models.hub import check_model_folder, resolve_model_path


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty hub cache and no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_folder_is_itself(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "m")
    assert resolve_model_path(tmp_path / "m") == (tmp_path / "m").resolve()


def test_a_missing_folder_names_the_nearest(tmp_path):
    (tmp_path / "models" / "smollm2").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="has no 'smolm2'; did you mean 'smollm2'?"):
        resolve_model_path(tmp_path / "models" / "smolm2")
    with pytest.raises(FileNotFoundError, match="has no 'modles'; did you mean 'models'?"):
        resolve_model_path(tmp_path / "modles" / "smollm2")
    with pytest.raises(FileNotFoundError, match="its folders: smollm2"):
        resolve_model_path(tmp_path / "models" / "zzz")


def test_a_folder_that_is_no_model_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"no config.json and no weights .*it holds nothing"):
        resolve_model_path(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"it has no weights \(\*.safetensors\); it holds config.json"
    ):
        check_model_folder(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "adapter_config.json")
    check_model_folder(tmp_path)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file; a model is a folder"):
        resolve_model_path(tmp_path / "m.gguf")


def test_an_id_is_found_in_the_cache_without_network(offline):
    snapshot = offline / "hub/models--owner--tiny/snapshots/abc"
    tiny_llama().save_pretrained(snapshot)
    refs = offline / "hub/models--owner--tiny/refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    assert resolve_model_path("owner/tiny") == snapshot


def test_an_id_that_cannot_be_fetched(offline):
    (offline / "owner").mkdir()
    with pytest.raises(
        FileNotFoundError, match="no model folder 'owner/tiny'.*not in the huggingface cache"
    ):
        resolve_model_path("owner/tiny")


def fake_modelscope(monkeypatch, folder):
    """A modelscope package with an empty cache that fetches into ``folder``."""

    def snapshot_download(name, revision=None, local_files_only=False):
        if local_files_only:
            raise ValueError("not cached")
        return str(folder / name)

    module = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "modelscope", module)


def test_modelscope(monkeypatch, offline):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ImportError, match="pip install modelscope"):
        resolve_model_path("owner/tiny", hub="modelscope")
    fake_modelscope(monkeypatch, offline / "scope")
    tiny_llama().save_pretrained(offline / "scope/owner/tiny")
    assert resolve_model_path("owner/tiny", hub="modelscope") == offline / "scope/owner/tiny"
    (offline / "scope/owner/tiny/model.safetensors").unlink()
    with pytest.raises(ValueError, match="it has no weights"):
        resolve_model_path("owner/tiny", hub="modelscope")


def test_the_hub_of_the_environment_is_used_where_none_is_named(monkeypatch, offline):
    fake_modelscope(monkeypatch, offline / "scope")
    tiny_llama().save_pretrained(offline / "scope/owner/tiny")
    monkeypatch.setenv("XTUNER_LITE_HUB", "modelscope")
    assert resolve_model_path("owner/tiny") == offline / "scope/owner/tiny"
    with pytest.raises(FileNotFoundError, match="not in the huggingface cache"):
        resolve_model_path("owner/tiny", hub="huggingface")
    monkeypatch.setenv("XTUNER_LITE_HUB", "scope")
    with pytest.raises(ValueError, match=r"\$XTUNER_LITE_HUB is 'scope'; allowed: 'huggingface'"):
        resolve_model_path("owner/tiny")


def test_pickled_weights_are_fetched_only_where_there_are_no_others(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(name, revision=None, allow_patterns=None, local_files_only=False):
        if local_files_only:
            raise ValueError("not cached")
        asked.append("*.bin" in allow_patterns)
        (tmp_path / "config.json").write_text("{}")
        if "*.bin" in allow_patterns:
            (tmp_path / "pytorch_model.bin").write_bytes(b"")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model_path("owner/old") == tmp_path
    assert asked == [False, True]
    asked.clear()
    (tmp_path / "model.safetensors").write_bytes(b"")
    resolve_model_path("owner/new")
    assert asked == [False]


def test_a_llava_in_parts_is_fetched_without_pickles(monkeypatch, tmp_path):
    """XTuner published folders of folders, without a config.json at the top."""
    asked = []

    def snapshot_download(name, revision=None, allow_patterns=None, local_files_only=False):
        if local_files_only:
            raise ValueError("not cached")
        asked.append("*.bin" in allow_patterns)
        for part in ("projector", "llm_adapter"):
            (tmp_path / part).mkdir(exist_ok=True)
            (tmp_path / part / "config.json").write_text("{}")
            (tmp_path / part / "model.safetensors").write_bytes(b"")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model_path("xtuner/llava") == tmp_path
    assert asked == [False]


def test_an_unknown_hub(offline):
    with pytest.raises(ValueError, match="hub is 'hf'; allowed: 'huggingface', 'modelscope'"):
        resolve_model_path("owner/tiny", hub="hf")
