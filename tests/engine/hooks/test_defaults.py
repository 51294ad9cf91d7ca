import subprocess
import sys

from mmengine.hooks import Hook

from xtuner_lite.engine.hooks import DEFAULT_HOOKS
from xtuner_lite.registry import HOOKS


def test_every_default_builds_without_arguments():
    hooks = {name: HOOKS.build(dict(cfg)) for name, cfg in DEFAULT_HOOKS.items()}
    assert len(hooks) == 11
    for name, hook in hooks.items():
        assert isinstance(hook, Hook), name
    # MMEngine has hooks of these names; ours must win.
    for name in ("logger", "checkpoint"):
        assert type(hooks[name]).__module__.startswith("xtuner_lite."), name


def test_the_list_is_light():
    code = (
        "import sys, xtuner_lite.engine.hooks as h; assert h.DEFAULT_HOOKS; "
        "print([m for m in ('torch', 'mmengine', 'numpy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
