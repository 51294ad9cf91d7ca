"""Lookup without importing everything, refused duplicates, building, and descriptions."""

from __future__ import annotations

import subprocess
import sys

import pytest
from mmengine.config import ConfigDict
from mmengine.config.lazy import LazyObject
from mmengine.registry import HOOKS as MM_HOOKS
from mmengine.registry import DefaultScope

from xtuner_lite.discovery import find_module_file, index_source
from xtuner_lite.registry import (
    HOOKS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    REGISTRIES,
    SAMPLERS,
    VISBACKENDS,
    describe,
)
from xtuner_lite.registry_base import Registry
from xtuner_lite.suggestions import did_you_mean, is_slip_of, nearest


def test_listing_imports_no_torch():
    code = (
        "import sys; from xtuner_lite.registry import REGISTRIES, describe\n"
        "assert sum(len(describe(registry)) for registry in REGISTRIES.values()) > 100\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_lookup_imports_one_module():
    """Our logger's registry entry is found without importing the other hooks of the package."""
    code = (
        "import sys; from xtuner_lite.registry import HOOKS\n"
        "HOOKS.get('ThroughputHook')\n"
        "ours = [name for name in sys.modules if name.startswith('xtuner_lite.engine.hooks.')]\n"
        "assert 'xtuner_lite.engine.hooks.throughput_hook' in ours\n"
        "assert 'xtuner_lite.engine.hooks.evaluate_chat_hook' not in ours, ours"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("registry", "name", "module"),
    [
        (HOOKS, "EMAHook", "mmengine.hooks.ema_hook"),
        (HOOKS, "mmengine.EMAHook", "mmengine.hooks.ema_hook"),
        (HOOKS, "mmengine.hooks.EMAHook", "mmengine.hooks.ema_hook"),
        (PARAM_SCHEDULERS, "CosineAnnealingLR", "mmengine.optim.scheduler.lr_scheduler"),
        (OPTIMIZERS, "AdamW", "torch.optim.adamw"),
        (OPTIMIZERS, "SGD", "torch.optim.sgd"),
        (SAMPLERS, "InfiniteSampler", "mmengine.dataset.sampler"),
        (HOOKS, "LoggerHook", "xtuner_lite.engine.hooks.logger_hook"),  # ours before mmengine's
    ],
)
def test_names_of_the_stack_resolve(registry, name, module):
    assert registry.get(name).__module__ == module
    assert name.startswith("mmengine.") or name in registry


def test_lookup_is_the_same_in_every_scope():
    before = HOOKS.get("LoggerHook")
    with DefaultScope.overwrite_default_scope("mmengine"):
        assert HOOKS.get("LoggerHook") is before
        assert type(HOOKS.build(dict(type="LoggerHook"))) is before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("EMAHok", "unknown hook 'EMAHok'; did you mean 'EMAHook'.* See: xtuner-lite list hooks"),
        ("zzz", "unknown hook 'zzz'. See: xtuner-lite list hooks"),
        ("mmengine.hooks.EMAHok", "mmengine.hooks has no 'EMAHok'; did you mean 'EMAHook'"),
        ("no_such_package.Hook", "there is no module 'no_such_package'"),
    ],
)
def test_unknown_name(name, message):
    assert name not in HOOKS
    with pytest.raises(KeyError, match=message):
        HOOKS.get(name)


def test_name_must_be_text():
    with pytest.raises(TypeError, match="looked up by its name"):
        HOOKS.get(3)


# ---------------------------------------------------------------------------- registration


@pytest.fixture
def registry():
    return Registry("part", "parts")


class Part:
    """A part. It has a second sentence.

    And more.
    """

    def __init__(self, size: int, *, tokenizer=None, name="x"):
        self.size, self.tokenizer, self.name = size, tokenizer, name


def build_part(size, **kwargs):
    return Part(size, **kwargs)


def test_duplicate_is_refused_with_both_places(registry):
    registry.register_module(name="part", module=Part)
    with pytest.raises(KeyError, match="registered twice") as error:
        registry.register_module(name="part", module=build_part)
    assert str(error.value).count("test_registry.py:") == 2
    registry.register_module(name="part", module=Part)  # the same source again is no other part
    registry.register_module(name="part", module=build_part, force=True)
    assert registry.get("part") is build_part


def test_name_of_the_package_or_mmengine_cannot_be_taken():
    with pytest.raises(KeyError, match="registered twice: at .*logger_hook.py:"):
        HOOKS.register_module(name="LoggerHook", module=Part)
    with pytest.raises(KeyError, match="registered twice: at .*ema_hook.py:"):
        HOOKS.register_module(name="EMAHook", module=Part)


def test_duplicate_in_the_source_is_refused():
    twice = (
        "@HOOKS.register_module()\nclass A: pass\n@HOOKS.register_module(name='A')\ndef b(): pass\n"
    )
    entries = [entry for _, entry in index_source(twice, "m", "file.py")]
    with pytest.raises(KeyError, match="at file.py:2 and at file.py:4"):
        HOOKS._unique(entries)


def test_forms_of_registration():
    source = (
        "@REG.register_module()\nclass A:\n    '''First line.'''\n"
        "@registry.REG.register_module(name=['b', 'c'])\ndef f(): pass\n"
        "@REG.register_module('d')\nclass D: pass\n"
        "@other()\nclass E: pass\n"
    )
    found = [(reg, e.name, e.qualname, e.description) for reg, e in index_source(source, "m", "f")]
    assert found == [
        ("REG", "A", "A", "First line."),
        ("REG", "b", "f", ""),
        ("REG", "c", "f", ""),
        ("REG", "d", "D", ""),
    ]


def test_only_callables_are_registered(registry):
    with pytest.raises(TypeError, match="must be a class or a function, got 3"):
        registry.register_module(name="x", module=3)


# ---------------------------------------------------------------------------- building


@pytest.mark.parametrize(
    "kind", ["Part", Part, build_part, LazyObject("tests.test_registry", "Part")]
)
def test_build_takes_every_kind_of_type(registry, kind):
    registry.register_module(module=Part)
    built = registry.build(dict(type=kind, size=3), tokenizer="t", unknown=1)
    assert built.size == 3
    # build_part names no tokenizer, so the Runner's is not pushed into its **kwargs
    assert built.tokenizer == (None if kind is build_part else "t")


def test_build_of_config_dicts_and_built_objects(registry):
    part = Part(1)
    assert registry.build(part) is part
    built = registry.build(ConfigDict(type=LazyObject("tests.test_registry", "Part"), size=2))
    assert built.size == 2


def test_config_wins_over_injected(registry):
    assert (
        registry.build(dict(type=Part, size=1, tokenizer="mine"), tokenizer="t").tokenizer == "mine"
    )


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(type=Part, size=1, nmae="y"),
         "model.llm: Part cannot be built: .*'nmae'; did you mean 'name'"),
        (dict(type=Part), "model.llm: Part cannot be built: missing a required argument: 'size'"),
        (dict(size=1), r"model.llm: a dict without 'type'.*\['size'\].*xtuner-lite list parts"),
        (dict(type=3), "type of a part must be a name, class or function, got 3"),
        ("Part", "model.llm: expected dict.type=.* or a built part, got 'Part'"),
        (None, "expected dict.type=.* or a built part, got None"),
        (Part, r"got the class Part, not a built part; write dict\(type=Part"),
    ],
)  # fmt: skip
def test_what_cannot_be_built(registry, cfg, message):
    with pytest.raises(TypeError, match=message):
        registry.build(cfg, config_key="model.llm")


def test_scheduler_by_epoch_is_converted():
    import torch

    weight = torch.nn.Parameter(torch.zeros(1))
    built = PARAM_SCHEDULERS.build(
        dict(type="MultiStepLR", milestones=[2], convert_to_iter_based=True),
        optimizer=torch.optim.SGD([weight], lr=1.0),
        epoch_length=10,
    )
    assert dict(built.milestones) == {20: 1}  # 2 epochs of 10 steps


# ---------------------------------------------------------------------------- descriptions


def test_describe_has_wildcards_and_one_line_each():
    rows = describe(HOOKS, "*ema*")
    assert [row[0] for row in rows] == ["EMAHook"]
    assert describe(HOOKS, "EMA") == rows
    assert all(
        "\n" not in text for registry in REGISTRIES.values() for _, _, text in describe(registry)
    )
    assert describe(VISBACKENDS, "nothing-like-it") == []


def test_describe_of_a_part_registered_by_hand(registry):
    registry.register_module(module=Part)
    ((name, place, text),) = describe(registry)
    assert (name, text) == ("Part", "A part.")
    assert "test_registry.py:" in place


def test_children_of_mmengine():
    assert HOOKS.parent is MM_HOOKS
    with_parent = {name for name, registry in REGISTRIES.items() if registry.parent is not None}
    assert with_parent == set(REGISTRIES) - {
        "map_fns", "templates", "system_prompts", "collators",
    }  # fmt: skip
    assert len(REGISTRIES) == 15


# ---------------------------------------------------------------------------- helpers


def test_nearest_names():
    assert nearest("adamw", ["AdamW", "Adam", "SGD"])[0] == "AdamW"
    assert did_you_mean("x", ["abc"]) == ""
    assert did_you_mean("abd", ["abc"]) == "; did you mean 'abc'?"


@pytest.mark.parametrize(
    ("name", "slip"),
    [
        ("load_in_4bit", False),  # beside load_in_8bit: a different digit is another option
        ("device_mpa", True),
        ("devce_map", True),
        ("device_mapp", True),
        ("devise_map", True),
        ("device_map", False),
        ("offload", False),
    ],
)
def test_slip_of_the_finger(name, slip):
    assert is_slip_of(name, ["load_in_8bit", "device_map"]) is slip


def test_find_module_file_imports_no_parent():
    file, folders = find_module_file("xtuner_lite.engine.hooks")
    assert file.name == "__init__.py"
    assert len(folders) == 1
    assert find_module_file("no_such_package.x") == (None, [])
