"""YAML and JSON configs: data only."""

from __future__ import annotations

import json

import pytest

from xtuner_lite.config import ConfigError, check_config, load_config
from xtuner_lite.config.origins import provenance_of

YAML = """\
model:
  type: SupervisedFinetune
  llm: {type: xtuner_lite.models.loading.load_causal_lm, path: models/tiny}
  lora:
    type: peft.LoraConfig
    r: 8
optim_wrapper:
  optimizer:
    type: torch.optim.AdamW
    lr: 1e-4
    betas: [0.9, 0.95]
custom_hooks:
  - type: EMAHook
    begin_iter: 2
tokenizer: {type: transformers.AutoTokenizer.from_pretrained, pretrained_model_name_or_path: x}
"""


def test_yaml(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(YAML)
    cfg = load_config(file, ["custom_hooks.0.begin_iter=5"])
    assert check_config(cfg) == []
    assert cfg.optim_wrapper.optimizer.lr == 1e-4  # YAML 1.1 would read this as text
    assert cfg.custom_hooks[0].begin_iter == 5
    assert str(provenance_of(cfg).origins[("model", "lora", "r")]) == f"{file}:6"


def test_json(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"model": None, "custom_hooks": [{"type": "EMAHok"}]}, indent=1))
    (problem,) = check_config(load_config(file))
    assert problem.place == f"{file}:5"
    assert "did you mean 'EMAHook'" in problem.message


@pytest.mark.parametrize(
    "kind",
    [
        "os.mkdir",
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "shutil.rmtree",
        "xtuner_lite.config.catalog.shutil.rmtree",  # a module that one of ours imports
        "xtuner_lite.config.page.ast.literal_eval",
        "mmengine.utils.path.mkdir_or_exist",
        "no_such.thing",
    ],
)
@pytest.mark.parametrize("where", ["model", "deep"])
def test_type_outside_the_list_is_refused(tmp_path, kind, where):
    file = tmp_path / "a.yaml"
    held = {"type": kind, "path": "x"}
    value = {"model": held} if where == "model" else {"env_cfg": {"a": [{"b": held}]}}
    file.write_text(json.dumps(value))
    with pytest.raises(ConfigError, match=f"'{kind}' is not allowed in a data file") as error:
        load_config(file)
    assert "allowed: a registered name" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: !!python/object/apply:os.mkdir [x]\n", "could not determine a constructor"),
        ("model: [\n", "is not plain yaml data"),
        ("- a\n- b\n", "holds a list; a config is a mapping"),
        ("custom_imports: [os]\n", "data files import nothing; give the file with --plugin"),
        ("plugins: [x.py]\n", "data files import nothing"),
    ],
)
def test_what_is_no_data_is_refused(tmp_path, text, message):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)
    assert not (tmp_path / "x").exists()


def test_unknown_key_of_a_data_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model: null\nresum: true\n")
    (problem,) = check_config(load_config(file))
    assert (problem.key, problem.place) == ("resum", f"{file}:2")
    assert "did you mean 'resume'" in problem.message
