"""Puts the state of the run (step, epoch, learning rate, losses) into the MessageHub."""

from __future__ import annotations

from mmengine.hooks import RuntimeInfoHook

from xtuner_lite.registry import HOOKS
from xtuner_lite.version import __version__


@HOOKS.register_module()
class RunInfoHook(RuntimeInfoHook):
    """MMEngine's RuntimeInfoHook, with the version of this package and without the config's text.

    Acts before a run, an epoch and a step, and after a step and a validation. MMEngine's hook also
    keeps the whole config text, with any password in it, where every hook and back-end can read it;
    parts that need the config have ``runner.cfg``.
    """

    def before_run(self, runner) -> None:
        """Notes seed, name and version of the run."""
        runner.message_hub.update_info_dict(
            {
                "seed": runner.seed,
                "experiment_name": runner.experiment_name,
                "xtuner_lite_version": __version__,
            }
        )
        self.last_loop_stage = None
