"""Writing configs: equal after loading again, secrets out, what cannot be written is refused."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path

import pytest
from mmengine.config import Config

from tests.config.pages import write_page
from xtuner_lite.config import ConfigError, check_config, dump_config, list_configs, load_config
from xtuner_lite.config.dump import configs_equal, format_config
from xtuner_lite.config.redact import redact_config, redact_text


def test_every_shipped_config_reloads_equal(tmp_path):
    infos = list_configs()
    assert len(infos) >= 4
    for info in infos:
        cfg = load_config(info.path)
        again = load_config(dump_config(cfg, tmp_path / f"{info.name}.py"))
        assert configs_equal(cfg, again), info.name
        assert check_config(again) == []


def test_all_kinds_of_values_reload_equal(tmp_path):
    page = tmp_path / "page.py"
    page.write_text(
        "import torch\nfrom pathlib import Path\nfrom torch.optim import AdamW\n"
        "from transformers import AutoTokenizer\n"
        "from xtuner_lite.models.loading import load_causal_lm as model\n"
        "custom_hooks = [dict(\n"
        "    type=AutoTokenizer.from_pretrained, dtype=torch.bfloat16, adam=AdamW, load=model,\n"
        "    nan=float('nan'), inf=float('-inf'), tiny=1e-300, one=(1,), none=(),\n"
        "    pair=(1, [2, (3,)]),\n"
        "    text='a\\nb\\'\"\\\\ \\u4e2d \\ud800', raw=b'\\x00', path=Path('a/b'),\n"
        "    big=10**30, z=-0.0,\n"
        "    keys={1: 'int', 'a b': 'space', 'class': 'word', (1, 2): 'tuple', None: 0},\n"
        "    empty=dict(), nothing=[], yes=True, c=1j,\n"
        "    long=['x' * 60, 'y' * 60, dict(deep=dict(deeper=['z' * 80]))],\n"
        ")]\n"
        "env_cfg = dict(AdamW='a text called like an import', dict='shadow')\n"
    )
    cfg = load_config(page)
    again = load_config(dump_config(cfg, tmp_path / "again.py"))
    assert configs_equal(cfg, again)
    values = again._cfg_dict["custom_hooks"][0]
    assert math.isnan(values["nan"])
    assert math.copysign(1, values["z"]) == -1
    assert values["path"] == Path("a/b")
    import torch

    assert values["dtype"] is torch.bfloat16


def test_name_of_a_key_never_shadows_an_import(tmp_path):
    page = tmp_path / "page.py"
    page.write_text("from peft import LoraConfig as x\nmodel = dict(type=x)\ntokenizer = 1\n")
    text = format_config(load_config(page))
    assert "from peft import LoraConfig\n" in text
    page.write_text("from a.b import model as m\nmodel = dict(type=m)\n")
    assert "from a.b import model as model_2" in format_config(load_config(page))


def test_dump_reads_no_base_and_runs_from_anywhere(tmp_path):
    target = dump_config(load_config(write_page(tmp_path)), tmp_path / "elsewhere" / "x.py")
    assert "read_base" not in target.read_text()
    assert check_config(load_config(target)) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{1, 2}", "a set has no order.*use a list"),
        ("lambda x: x", "defined where no import reaches it"),
        ("own", r"'own' \(.*page.py:1\) is defined where no import reaches it.*--plugin"),
        ("object()", "a builtins.object object cannot be written"),
    ],
)
def test_what_cannot_be_written_is_refused_with_its_place(tmp_path, value, message):
    page = tmp_path / "page.py"
    page.write_text(f"def own(row): return row\nmodel = dict(\n    x={value},\n)\n")
    with pytest.raises(ConfigError, match=message) as error:
        dump_config(load_config(page), tmp_path / "out.py")
    assert f"{page}:3: model.x" in str(error.value)
    assert not (tmp_path / "out.py").exists()


def test_python_objects_in_a_config():
    cfg = Config(dict(model=dict(type=OrderedDict), path=Path("x")))
    assert "from collections import OrderedDict" in format_config(cfg)
    with pytest.raises(ValueError, match="end the name in .py"):
        dump_config(cfg, "x.yaml")


SECRET = "hf_" + "AbCdEfGhIjKlMnOpQrSt"


def test_secrets_are_redacted_before_anything_is_written(tmp_path):
    page = tmp_path / "page.py"
    page.write_text(
        f"model = dict(token='{SECRET}', api_key='abc', hub_token='x', password='p',\n"
        "    pad_token='<pad>',\n"
        f"    max_new_tokens=3, eos_token_id=2, token_type='t', note='use {SECRET} here',\n"
        "    url='https://me:pw@host/x?token=abc&x=1', nested=[dict(WANDB_API_KEY='k')],\n"
        "    flag=dict(token=True), bearer='Authorization: Bearer abcdefghijklmnop')\n"
    )
    text = dump_config(load_config(page), tmp_path / "out.py").read_text()
    for secret in (SECRET, "'abc'", "'p'", "me:pw", "token=abc", "'k'", "abcdefghijklmnop"):
        assert secret not in text, secret
    for kept in ("pad_token='<pad>'", "max_new_tokens=3", "eos_token_id=2", "token_type='t'",
                 "use *** here", "https://***@host/x?token=***&x=1", "token=True"):  # fmt: skip
        assert kept in text, kept


def test_redact_config_keeps_the_original(tmp_path):
    page = tmp_path / "page.py"
    page.write_text("work_dir = 'w'\nmodel = dict(token='secret')\n")
    cfg = load_config(page)
    assert redact_config(cfg).model.token == "***"
    assert cfg.model.token == "secret"
    assert redact_config(cfg).filename == cfg.filename


@pytest.mark.parametrize(
    "text",
    [
        "sk-" + "a" * 24,
        "ghp_" + "a" * 36,
        "AKIA" + "A" * 16,
        "eyJ" + "a" * 12 + "." + "b" * 12 + "." + "c" * 12,
    ],
)
def test_keys_by_their_form(text):
    assert redact_text(f"x {text} y") == "x *** y"
