"""Signatures read from source equal those that ``inspect`` finds after a real import."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module

import pytest

from xtuner_lite.config.names import find, linearize
from xtuner_lite.config.parameters import REQUIRED, VAR_KEYWORD
from xtuner_lite.config.signatures import signature_of, signature_of_definition
from xtuner_lite.config.source import NotFound, Unknown, load_module

OURS = [
    ("xtuner_lite.methods.sft", "SupervisedFinetune"),
    ("xtuner_lite.data.dataset", "ChatDataset"),
    ("xtuner_lite.runner.runner", "Runner"),
    ("xtuner_lite.runner.loops", "TrainLoop"),
    ("xtuner_lite.engine.optim", "OptimWrapper"),
    ("xtuner_lite.data.dataloader", "build_dataloader"),
    ("xtuner_lite.models.loading", "load_causal_lm"),
    ("xtuner_lite.models.loading", "load_tokenizer"),
]
OPTIMIZERS = """Adadelta Adafactor Adagrad Adam AdamW Adamax ASGD LBFGS Muon NAdam RAdam RMSprop
    Rprop SGD SparseAdam"""
HOOKS = "CheckpointHook EMAHook EarlyStoppingHook LoggerHook ParamSchedulerHook ProfilerHook"
SCHEDULERS = "ConstantLR CosineAnnealingLR LinearLR MultiStepLR OneCycleLR PolyLR ReduceOnPlateauLR"
OTHERS = [
    *[("torch.optim", name) for name in OPTIMIZERS.split()],
    *[("mmengine.hooks", name) for name in HOOKS.split()],
    *[("mmengine.optim", name) for name in SCHEDULERS.split()],
    ("mmengine.visualization", "TensorboardVisBackend"),
    ("mmengine.dataset", "DefaultSampler"),
    ("transformers", "AutoTokenizer.from_pretrained"),
    ("transformers", "BitsAndBytesConfig"),
    ("transformers", "GenerationConfig"),
    ("transformers", "LlamaForCausalLM"),
    ("datasets", "load_dataset"),
    ("torch.nn", "Linear"),
]  # fmt: skip


def shown(params):
    return [(param.name, param.kind, param.default is not REQUIRED) for param in params]


def real_signature(module, path):
    found = import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return shown(inspect.signature(found).parameters.values())


@pytest.mark.parametrize(("module", "path"), OURS + OTHERS)
def test_static_signature_equals_the_real_one(module, path):
    static = signature_of_definition(find(module, tuple(path.split("."))))
    assert shown(static.params) == real_signature(module, path)


def test_every_peft_config():
    """LoraConfig and its siblings: dataclasses that inherit their fields over several files."""
    import peft

    names = [name for name in dir(peft) if name.endswith("Config")]
    assert len(names) > 20
    for name in names:
        static = signature_of_definition(find("peft", (name,)))
        assert shown(static.params) == real_signature("peft", name), name
        assert not static.open


def test_nothing_is_imported():
    code = (
        "import sys; from xtuner_lite.config.signatures import signature_of\n"
        "for module, path in [('peft', ('LoraConfig',)), ('torch.optim', ('AdamW',)),\n"
        "        ('transformers', ('AutoTokenizer', 'from_pretrained')),\n"
        "        ('datasets', ('load_dataset',)),\n"
        "        ('mmengine.optim', ('CosineAnnealingLR',))]:\n"
        "    signature_of(module, path)\n"
        "assert not {'torch', 'peft', 'transformers', 'datasets', 'mmengine'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_keywords_are_followed_through_super():
    """LRSchedulerMixin takes **kwargs and gives them to the schedule after it in the MRO."""
    static = signature_of("mmengine.optim", ("CosineAnnealingLR",))
    assert [param.name for param in static.params] == ["optimizer", "args", "kwargs"]
    assert {"T_max", "eta_min", "begin", "end", "by_epoch"} <= set(static.names)
    assert "param_name" not in static.names  # the mixin gives it
    assert not static.open


def test_popped_keywords_are_known():
    names = signature_of("transformers", ("PreTrainedModel", "from_pretrained")).names
    assert {"device_map", "quantization_config", "gguf_file"} <= set(names)


@pytest.mark.parametrize(
    ("module", "path", "known"),
    [
        ("peft", ("LoraConfg",), "LoraConfig"),
        ("mmengine.hoks", (), "hooks"),
        ("xtuner_lite.engine.optim", ("OptimWraper",), "OptimWrapper"),
        ("transformers", ("AutoTokenizer", "from_pretraned"), "from_pretrained"),
    ],
)
def test_missing_name_is_certain(module, path, known):
    with pytest.raises(NotFound) as error:
        find(module, path)
    assert known in error.value.known


def test_missing_module():
    with pytest.raises(NotFound, match="there is no module 'no_such_package'"):
        find("no_such_package.part", ("X",))


def test_what_source_cannot_tell_is_unknown():
    with pytest.raises(Unknown):
        find("torch", ("bfloat61",))
    with pytest.raises(Unknown):
        find("math", ("sqrt",))


def test_written_in_c_falls_back_to_a_real_import():
    assert signature_of("math", ("sqrt",)).names == []  # positional only
    wbits = ["wbits"] if sys.version_info >= (3, 11) else []
    assert signature_of("zlib", ("compress",)).names == ["level", *wbits]
    with pytest.raises(TypeError, match="not a class or function"):
        signature_of("math", ("pi",))


def test_stub_tells_about_c_modules():
    assert find("torch", ("bfloat16",)).name == "bfloat16"


FORMS = "Root Left Right Both Open Base Derived Plain Plain.make function Alias"
SOURCE = """
from __future__ import annotations
from dataclasses import dataclass, field, KW_ONLY
from typing import ClassVar

class Root:
    def __init__(self, a, b=1, **kwargs):
        self.extra = kwargs.pop("popped", 2)

class Left(Root):
    pass

class Right(Root):
    def __init__(self, *args, c=3, **kwargs):
        super().__init__(*args, **kwargs)

class Both(Left, Right):
    def __init__(self, d, **kwargs):
        super().__init__(0, **kwargs)

class Open:
    def __init__(self, x, **kwargs):
        self.options = dict(kwargs)

@dataclass
class Base:
    one: int
    hidden: int = field(init=False, default=0)
    many: list = field(default_factory=list)
    shared: ClassVar[int] = 3

@dataclass
class Derived(Base):
    one: float = 1.0
    _: KW_ONLY
    last: str = "x"

class Plain(Derived):
    @classmethod
    def make(cls, size, *, fast=False):
        return cls()

def wrap(f):
    return f

@wrap
def function(a, /, b, *rest, c, d=None, **more):
    pass

Alias = Both
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "sigs_mod.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    load_module.cache_clear()
    yield "sigs_mod"
    sys.modules.pop("sigs_mod", None)


@pytest.mark.parametrize("path", FORMS.split())
def test_forms_of_signatures(module, path):
    static = signature_of(module, tuple(path.split(".")))
    assert shown(static.params) == real_signature(module, path)


def test_accepted_names_of_a_diamond(module):
    both = signature_of(module, ("Both",))
    # Both -> Left -> Right -> Root: 0 fills a; c comes from Right, b and popped from Root.
    assert both.names == ["d", "c", "b", "popped"]
    assert not both.open
    assert signature_of(module, ("Open",)).open
    assert [item.name for item in linearize(find(module, ("Both",)))] == [
        "Both", "Left", "Right", "Root",
    ]  # fmt: skip
    assert signature_of(module, ("function",)).params[-1].kind is VAR_KEYWORD
