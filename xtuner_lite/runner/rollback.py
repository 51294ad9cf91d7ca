"""Back to the weights of an earlier checkpoint, and on with the data that comes next.

What goes back: weights, buffers, what the optimizer remembers of each weight, the fp16 scale, the
random generators, and what hooks stored with the weights (``before_save_checkpoint``). What stays:
``iter`` and with it the position in the data, the learning-rate schedules and the options of the
parameter groups that they set, and the hooks' own state (``state_dict``), which counts the run. So
the steps in between are lost as learning and not repeated, and the run ends at the same step, with
the same learning rate, as without.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from xtuner_lite.engine.checkpoint import CheckpointError, newest_valid_checkpoint
from xtuner_lite.runner.persistence import load_run_state, read_meta

if TYPE_CHECKING:
    from xtuner_lite.runner.runner import Runner


def find_rollback(runner: Runner, before: int, multiple_of: int = 1) -> tuple[Path, int]:
    """The newest whole checkpoint of at most ``before`` steps, and its steps; all ranks call it.

    Args:
        multiple_of: look only at checkpoints after a multiple of so many steps, those that the run
            saves by plan. Others (a signal came) are missing in a run that was not interrupted,
            which an interrupted one must equal.

    Raises:
        CheckpointError: there is none.
    """
    runner.finish_saving()
    path = runner.ranks.on_main(
        lambda: newest_valid_checkpoint(
            runner.work_dir,
            runner.logger.warning,
            wanted=lambda steps: steps <= before and steps % multiple_of == 0,
        )
    )
    if path is None:
        raise CheckpointError(
            f"{runner.work_dir} has no checkpoint of at most {before} steps, saved every "
            f"{multiple_of}; save more often (checkpoint.interval) or keep more of them "
            "(checkpoint.max_keep_ckpts)"
        )
    return Path(path), read_meta(path)["iter"]


def roll_back(runner: Runner, path: Path) -> None:
    """Put the state back to that of ``path``, as the module's text says; all ranks call it.

    Raises:
        CheckpointError: the checkpoint does not fit the run.
    """
    names = {scheduler.param_name for scheduler in runner.param_schedulers} | {"lr"}
    if "momentum" in names:
        names.add("betas")  # where optimizers of the Adam kind keep it
    options = [
        {name: group[name] for name in names if name in group}
        for group in runner.optim_wrapper.param_groups
    ]
    load_run_state(runner, path, keep_progress=True)
    for group, kept in zip(runner.optim_wrapper.param_groups, options, strict=True):
        group.update(kept)
