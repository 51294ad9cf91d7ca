"""Parts from outside the package: custom_imports, --plugin files, entry points."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
from mmengine.config import Config

from tests.config.pages import write_page
from xtuner_lite import plugins
from xtuner_lite.config import check_config, dump_config, load_config
from xtuner_lite.discovery import PLUGIN_ENTRIES, PLUGIN_FILES
from xtuner_lite.plugins import PluginError, declare_plugins, load_plugins
from xtuner_lite.registry import HOOKS, describe

HOOK = '''
import torch  # heavy: only a real import of the plug-in pays for it
from mmengine.hooks import Hook

from xtuner_lite.registry import HOOKS


@HOOKS.register_module()
class {name}(Hook):
    """Says hello."""

    def __init__(self, greeting: str = "hello"):
        self.greeting = greeting
'''


@pytest.fixture(autouse=True)
def clean():
    """Forget what a test has declared and registered."""
    held = dict(HOOKS._module_dict)
    yield
    for module in list(PLUGIN_ENTRIES):
        sys.modules.pop(module, None)
    PLUGIN_ENTRIES.clear()
    PLUGIN_FILES.clear()
    plugins._of_entry_points.cache_clear()
    HOOKS._module_dict.clear()
    HOOKS._module_dict.update(held)


def test_plugin_file(tmp_path, monkeypatch):
    (tmp_path / "hello.py").write_text(HOOK.format(name="HelloHook"))
    monkeypatch.chdir(tmp_path)
    cfg = load_config(write_page(tmp_path, ('type="EMAHook", begin_iter=3', 'type="HelloHook"')))
    assert "unknown hook 'HelloHook'" in check_config(cfg)[0].message
    load_plugins(cfg, ["hello.py"])
    assert cfg.plugins == [str(tmp_path / "hello.py")]
    assert check_config(cfg) == []
    assert HOOKS.build(cfg.custom_hooks[0]).greeting == "hello"
    assert [row[0] for row in describe(HOOKS, "HelloHook")] == ["HelloHook"]


def test_plugin_is_found_again_from_a_dumped_config(tmp_path):
    (tmp_path / "again.py").write_text(HOOK.format(name="AgainHook"))
    cfg = load_config(write_page(tmp_path, ('type="EMAHook", begin_iter=3', 'type="AgainHook"')))
    declare_plugins(cfg, [tmp_path / "again.py"])
    text = dump_config(cfg, tmp_path / "elsewhere" / "dumped.py").read_text()
    PLUGIN_ENTRIES.clear()
    PLUGIN_FILES.clear()
    assert f"plugins = ['{tmp_path / 'again.py'}']" in text
    again = load_config(tmp_path / "elsewhere" / "dumped.py")
    assert check_config(again) == []
    assert HOOKS.build(again.custom_hooks[0]).greeting == "hello"


def test_class_of_a_plugin_is_dumped_by_its_name(tmp_path):
    (tmp_path / "named.py").write_text(HOOK.format(name="NamedHook"))
    cfg = Config(dict(plugins=[str(tmp_path / "named.py")], custom_hooks=[dict(type="NamedHook")]))
    load_plugins(cfg)
    cfg.custom_hooks[0].type = HOOKS.get("NamedHook")
    assert (
        "custom_hooks = [dict(type='NamedHook')]" in dump_config(cfg, tmp_path / "o.py").read_text()
    )


def test_checking_a_plugin_imports_no_torch(tmp_path):
    (tmp_path / "light.py").write_text(HOOK.format(name="LightHook"))
    page = write_page(
        tmp_path,
        ('type="EMAHook", begin_iter=3', 'type="LightHook", greting="x"'),
        ("lr = 2e-4", 'lr = 2e-4\nplugins = ["light.py"]'),  # beside the config
    )
    code = (
        "import sys; from xtuner_lite.config import load_config, check_config\n"
        f"problems = check_config(load_config({str(page)!r}))\n"
        "(problem,) = problems; assert \"did you mean 'greeting'\" in problem.message, problem\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("form", ["['{}']", "dict(imports=['{}'])"])
def test_custom_imports(tmp_path, monkeypatch, form):
    module = f"my_hooks_mod_{len(form)}"
    (tmp_path / f"{module}.py").write_text(HOOK.format(name="ModuleHook"))
    monkeypatch.syspath_prepend(str(tmp_path))
    page = write_page(
        tmp_path,
        ('type="EMAHook", begin_iter=3', 'type="ModuleHook"'),
        ("lr = 2e-4", f"lr = 2e-4\ncustom_imports = {form.format(module)}"),
    )
    cfg = load_config(page)
    assert check_config(cfg) == []
    assert load_plugins(cfg) == [module]
    assert HOOKS.build(cfg.custom_hooks[0]).greeting == "hello"


def test_entry_point(tmp_path, monkeypatch):
    (tmp_path / "entry_mod.py").write_text(HOOK.format(name="EntryHook"))
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint("mine", "entry_mod", plugins.ENTRY_POINT_GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point])
    plugins._of_entry_points.cache_clear()
    cfg = load_config(write_page(tmp_path, ('type="EMAHook", begin_iter=3', 'type="EntryHook"')))
    assert check_config(cfg) == []
    assert load_plugins(cfg) == ["entry_mod"]
    assert HOOKS.build(cfg.custom_hooks[0]).greeting == "hello"


def test_registration_in_a_loop_is_seen_by_importing(tmp_path):
    (tmp_path / "loop.py").write_text(
        "from xtuner_lite.registry import HOOKS\n"
        "for name in ('LoopA', 'LoopB'):\n"
        "    HOOKS.register_module(name=name, module=type(name, (), {}))\n"
    )
    declare_plugins(None, [tmp_path / "loop.py"])
    assert "LoopA" in HOOKS
    assert "LoopB" in HOOKS


def test_two_files_of_one_name_do_not_clash(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text(HOOK.format(name=f"Same{folder.upper()}"))
    names = load_plugins(None, [tmp_path / "a" / "same.py", tmp_path / "b" / "same.py"])
    assert len(set(names)) == 2
    assert HOOKS.get("SameA") is not HOOKS.get("SameB")


def test_two_plugins_with_one_name_are_refused(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(HOOK.format(name="TwiceHook"))
    declare_plugins(None, [tmp_path / "one.py", tmp_path / "two.py"])
    with pytest.raises(KeyError, match="at .*one.py:9 and at .*two.py:9"):
        HOOKS.get("TwiceHook")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a Python file"),
        ("def f(:", "is not valid"),
        ("import no_such_package_here\n", "No module named 'no_such_package_here'; install"),
    ],
)
def test_plugin_that_cannot_be_loaded(tmp_path, text, message):
    file = tmp_path / "broken.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(PluginError, match=message):
        load_plugins(None, [file])


def test_failure_inside_a_plugin_keeps_its_traceback(tmp_path):
    file = tmp_path / "raises.py"
    file.write_text("raise ZeroDivisionError('mine')\n")
    with pytest.raises(ZeroDivisionError, match="mine"):
        load_plugins(None, [file])
    assert not any("plugin_raises" in name for name in sys.modules)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (
            dict(custom_imports=["no_such_mod"]),
            "there is no module 'no_such_mod'.*--plugin FILE.py",
        ),
        (dict(custom_imports=3), "must be a list of module names"),
        (dict(plugins=["gone.py"]), "gone.py is not a Python file"),
    ],
)
def test_wrong_plugin_keys(cfg, message):
    with pytest.raises(PluginError, match=message):
        load_plugins(Config(cfg))
    assert any(message.split(".*")[0] in p.message for p in check_config(Config(cfg)))
