"""Loading pages: bases, lazy types, settings, options, and what is refused while a page runs."""

from __future__ import annotations

import subprocess
import sys

import pytest
from mmengine.config import Config, ConfigDict
from mmengine.config.lazy import LazyObject

from tests.config.pages import line_of, write_page
from xtuner_lite.config import ConfigError, check_config, load_config
from xtuner_lite.config.origins import provenance_of


def test_load_gives_an_mmengine_config_with_lazy_types(tmp_path):
    cfg = load_config(write_page(tmp_path))
    assert isinstance(cfg, Config)
    assert isinstance(cfg._cfg_dict.model, ConfigDict)
    kind = dict.__getitem__(cfg._cfg_dict.model, "type")
    assert isinstance(kind, LazyObject)
    assert cfg.model.lora.r == 8
    assert cfg.train_dataloader.dataset.max_length == 128
    assert "max_length" not in cfg  # settings are used up, the Runner's keys stay
    assert provenance_of(cfg).settings["max_length"] == 128
    assert cfg.filename == str(tmp_path / "page.py")
    assert cfg.model.type.__name__ == "SupervisedFinetune"  # built on access, as in mmengine


def test_load_and_check_import_no_torch(tmp_path):
    page = write_page(tmp_path)
    code = (
        "import sys; from xtuner_lite.config import load_config, check_config, format_config,"
        "effective_settings\n"
        f"cfg = load_config({str(page)!r}, ['lr=1e-3'])\n"
        "assert check_config(cfg) == []; format_config(cfg); effective_settings(cfg)\n"
        "assert not {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_base_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load_config(write_page(tmp_path))
    assert cfg.default_hooks.logger.interval == 10
    assert cfg.randomness == dict(seed=0)


def test_relative_base_and_attribute_changes(tmp_path):
    (tmp_path / "base.py").write_text(
        "model = dict(llm=dict(path='a', dtype='fp32'))\nwork_dir = 'w'\n"
    )
    leaf = tmp_path / "leaf.py"
    leaf.write_text(
        "from mmengine.config import read_base\n"
        "with read_base():\n    from .base import model, work_dir\n"
        "model.llm.path = 'b'\n"
        "model.update(llm=dict(dtype='bf16'))\n"
        "work_dir += '/x'\n"
    )
    cfg = load_config(leaf)
    assert cfg.model.llm == dict(path="b", dtype="bf16")
    assert cfg.work_dir == "w/x"


def test_base_in_a_user_package(tmp_path, monkeypatch):
    package = tmp_path / "lib" / "my_configs_pkg"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('configs are read, never imported')\n")
    (package / "base.py").write_text("work_dir = 'from package'\n")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    leaf = tmp_path / "leaf.py"
    leaf.write_text(
        "from mmengine.config import read_base\n"
        "with read_base():\n    from my_configs_pkg.base import *\n"
    )
    assert load_config(leaf).work_dir == "from package"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from xtuner_lite.configs._base_.default_runtme import *", "mean 'default_runtime'"),
        ("from xtuner_lite.configs._base_.schedule import optim_wraper", "mean 'optim_wrapper'"),
        ("from no_such_package.base import *", "no base config 'no_such_package.base'"),
        ("import xtuner_lite", "only `from module import names`"),
    ],
)
def test_wrong_base_is_refused_with_its_line(tmp_path, text, message):
    leaf = tmp_path / "leaf.py"
    leaf.write_text(f"from mmengine.config import read_base\nwith read_base():\n    {text}\n")
    with pytest.raises(ConfigError, match=message) as error:
        load_config(leaf)
    assert f"{leaf}:3" in str(error.value)


def test_circle_of_bases_is_refused(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.py").write_text(
            "from mmengine.config import read_base\n"
            f"with read_base():\n    from .{other} import *\n"
        )
    with pytest.raises(ConfigError, match="in a circle"):
        load_config(tmp_path / "a.py")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("work_dir = model_pth", "name 'model_pth' is not defined.*did you mean 'model_path'"),
        ("model.llm.paht.x = 1", "no key 'paht'; did you mean 'path'"),
        ("model['lrora'].update(r=1)", "no key 'lrora'; did you mean 'lora'"),
        ("work_dir = LoraConfig(r=8)", r"write dict\(type=Name"),
        ("work_dir = (", "is not valid Python"),
        ("work_dir = 1 / 0", "ZeroDivisionError"),
        ("with open('x') as f:\n    pass", "only `with read_base"),
    ],
)
def test_failing_line_is_named(tmp_path, line, message):
    page = write_page(tmp_path, ("train_cfg = dict(max_epochs=1)", line))
    with pytest.raises(ConfigError, match=f"(?s){message}") as error:
        load_config(page)
    if "valid Python" not in message:
        assert f"{page}:{line_of(page, line.splitlines()[0])}" in str(error.value)


def test_settings_of_the_command_line_reach_what_is_computed_from_them(tmp_path):
    base = tmp_path / "base.py"
    base.write_text("max_length = 16\nlog_level = 'L%d' % max_length\n")
    leaf = tmp_path / "leaf.py"
    leaf.write_text(
        "from mmengine.config import read_base\n"
        "with read_base():\n    from .base import *\n"
        "parts = dict(seed=1)\nwork_dir = f'w{max_length * 2}'\nrandomness = parts\n"
    )
    cfg = load_config(leaf, ["max_length=100", "parts.seed=5"])
    assert (cfg.log_level, cfg.work_dir, cfg.randomness.seed) == ("L100", "w200", 5)


def test_options_of_runner_keys_have_the_last_word(tmp_path):
    cfg = load_config(
        write_page(tmp_path),
        [
            "optim_wrapper.optimizer.lr=1e-3",
            "custom_hooks.0.begin_iter=7",
            "train_cfg={'max_iters': 5}",
            "resume=true",
            "work_dir=out/run",
            ("load_from", None),
        ],
    )
    assert cfg.optim_wrapper.optimizer.lr == 1e-3
    assert cfg.custom_hooks[0].begin_iter == 7
    assert cfg.train_cfg == dict(max_iters=5)
    assert cfg.resume is True
    assert cfg.work_dir == "out/run"
    assert check_config(cfg) == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("optim_wrapper.optimiser.lr=1", "no key 'optimiser' in optim_wrapper; .*'optimizer'"),
        ("max_lenght=1", "no key or setting 'max_lenght'; did you mean 'max_length'"),
        ("trian_cfg.max_epochs=1", "no key or setting 'trian_cfg'; did you mean 'train_cfg'"),
        ("custom_hooks.3.begin_iter=1", "custom_hooks is a list; it has 1 items, so 0 to 0"),
        ("model.lora.r.x=1", "model.lora.r is 8, which has no keys"),
        ("lr", "is not KEY=VALUE"),
        ("model.lora.target_modules=[q_proj, v_proj]", "put quotes around the words"),
    ],
)
def test_option_without_a_place_is_refused(tmp_path, option, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write_page(tmp_path), [option])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("optim_wrapper.optimizer.weight_dcay=0.1", "no option 'weight_dcay'; .*'weight_decay'"),
        ("train_cfg.max_epoch=1", "no option 'max_epoch'; did you mean 'max_epochs'"),
        ("model.lora.r=eight", "got 'eight'.*allowed: int"),
        ("optim_wrapper.clip_grad.max_nrom=1", "unknown key 'max_nrom'; did you mean 'max_norm'"),
    ],
)
def test_option_with_a_new_key_is_checked_like_the_page(tmp_path, option, message):
    problems = check_config(load_config(write_page(tmp_path), [option]))
    assert len(problems) == 1
    assert problems[0].place == "command line"
    pytest.raises(ValueError, _raise, problems[0]).match(message)


def _raise(problem):
    raise ValueError(str(problem))


def test_new_key_that_the_signature_has_is_accepted(tmp_path):
    cfg = load_config(write_page(tmp_path), ["optim_wrapper.optimizer.weight_decay=0.1"])
    assert check_config(cfg) == []


def test_option_makes_a_section_that_the_page_lacks(tmp_path):
    page = tmp_path / "p.py"
    page.write_text("model = None\noptim_wrapper = dict(clip_grad=None)\n")
    options = ["randomness.seed=3", "optim_wrapper.clip_grad.max_norm=1", "train_cfg.max_iters=2",
               "default_hooks.logger.interval=5"]  # fmt: skip
    cfg = load_config(page, options)
    assert cfg.randomness == dict(seed=3)
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=1)
    assert cfg.train_cfg == dict(max_iters=2)
    assert cfg.default_hooks == dict(logger=dict(interval=5))
    with pytest.raises(ConfigError, match="no key 'strategy' in the config"):
        load_config(page, ["strategy.device=cpu"])  # a strategy without type cannot be built
    with pytest.raises(ConfigError, match="no key 'loger' in default_hooks"):
        load_config(page, ["default_hooks.loger.interval=5"])


def test_page_may_use_loops_functions_and_branches(tmp_path):
    page = tmp_path / "p.py"
    page.write_text(
        "def name_of(part):\n    return f'{root}/{part}'\n"
        "root = 'w'\n"
        "sizes = [1, 2]\n"
        "custom_hooks = [dict(type='EMAHook', begin_iter=size * len(sizes)) for size in sizes]\n"
        "if len(custom_hooks) > 1:\n    work_dir = name_of('run')\nelse:\n    work_dir = 'x'\n"
        "model = None\n"
    )
    cfg = load_config(page)
    assert (cfg.work_dir, [hook.begin_iter for hook in cfg.custom_hooks]) == ("w/run", [2, 4])
    assert check_config(cfg) == []


def test_config_that_contains_itself(tmp_path):
    page = tmp_path / "p.py"
    page.write_text("env_cfg = dict()\nenv_cfg['x'] = env_cfg\n")
    with pytest.raises(ConfigError, match="contains itself"):
        load_config(page)


def test_neither_file_nor_shipped_name():
    with pytest.raises(ConfigError, match="did you mean 'smollm2_135m_sft_lora_identity'"):
        load_config("smollm2_135m_sft_lora_identiy")


def test_standard_library_is_imported_for_real(tmp_path):
    page = tmp_path / "p.py"
    page.write_text(
        "import os.path as osp\nfrom math import pi\nwork_dir = osp.join('a', str(int(pi)))\n"
    )
    import os

    assert load_config(page).work_dir == os.path.join("a", "3")


def test_modules_and_attributes_stay_lazy(tmp_path):
    page = tmp_path / "p.py"
    page.write_text(
        "import torch\nimport torch.nn as nn\n"
        "model = dict(type=nn.Linear, in_features=1, out_features=2, dtype=torch.bfloat16)\n"
    )
    cfg = load_config(page)
    import torch

    assert cfg.model.dtype is torch.bfloat16
    assert cfg.model.type is torch.nn.Linear
