"""Saves checkpoints, remembers the best one and removes old ones."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Literal

from mmengine.hooks import Hook

from xtuner_lite.engine.checkpoint import (
    CheckpointError,
    checkpoints_dir,
    list_checkpoints,
    remove_checkpoint,
    verify_checkpoint,
)
from xtuner_lite.registry import HOOKS

_LESS = ("loss", "ppl", "perplexity", "error", "wer", "cer")
_GREATER = ("acc", "bleu", "rouge", "f1", "score", "reward", "margin", "exact_match")
#: Written beside the checkpoints: which one is best, by what and how good.
BEST_FILE = "best.json"


@HOOKS.register_module()
class CheckpointHook(Hook):
    """Save every ``interval`` optimizer steps and at the end; keep the best and the newest.

    Acts after a step (``after_train_iter``), with ``by_epoch`` after an epoch, after a validation
    that beat all earlier ones, and after the last step. A stop by SIGTERM or Ctrl-C is saved by the
    Runner, not here. Priority VERY_LOW: schedulers have stepped before the state is written.

    Unlike MMEngine's hook of this name it writes no pickle, and it deletes nothing before the
    checkpoint just written was read back and found whole.

    Args:
        interval: optimizer steps (epochs with ``by_epoch``) between two checkpoints. None or -1:
            none on the way.
        by_epoch: count ``interval`` in epochs.
        save_last: save after the last step too.
        max_keep_ckpts: checkpoints kept in ``work_dir``, the most recently written first; the best
            one is kept beside them. None or -1: all.
        save_best: key of the validation metrics (``"loss"``, or ``"auto"`` for their first) whose
            best value gets a checkpoint that is never removed until a better one is saved.
        rule: ``"less"`` or ``"greater"`` is better. None: from the name of the metric.
        asynchronous: copy the state at ``interval`` and write it while training goes on; costs
            memory for the copy. The last and the best checkpoint are always waited for.

    Raises:
        ValueError: an option out of range, or a metric whose rule its name does not tell.
    """

    priority = "VERY_LOW"

    def __init__(
        self,
        interval: int | None = None,
        by_epoch: bool = False,
        save_last: bool = True,
        max_keep_ckpts: int | None = None,
        save_best: str | None = None,
        rule: Literal["less", "greater"] | None = None,
        asynchronous: bool = False,
    ) -> None:
        self.interval = _positive_or_none("interval", interval)
        self.max_keep_ckpts = _positive_or_none("max_keep_ckpts", max_keep_ckpts)
        self.by_epoch, self.save_last, self.save_best = by_epoch, save_last, save_best
        if rule not in (None, "less", "greater"):
            raise ValueError(f"CheckpointHook: rule={rule!r}; use 'less', 'greater' or None")
        known_name = save_best is not None and save_best != "auto"
        self.rule = rule or (rule_of_metric(save_best) if known_name else None)
        self.best_score: float | None = None
        self.best_name: str | None = None
        self.asynchronous = asynchronous
        self._unpruned: Path | None = None  # being written; older ones go when it is whole
        self._steps_done = 0
        self._last_saved = 0  # step whose state is on disk; a run starts from what is there

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs: the best score so far and the folder name that has it."""
        return {"best_score": self.best_score, "best_name": self.best_name, "rule": self.rule}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over ``state_dict()`` of the resumed run."""
        self.best_score, self.best_name = state["best_score"], state["best_name"]
        self.rule = self.rule or state["rule"]

    def before_train(self, runner) -> None:
        """Checks that what ``save_best`` watches will be there, and finds the best one on disk."""
        self._steps_done = self._last_saved = runner.iter
        if self.save_best is not None and runner.val_loop is None:
            raise ValueError(
                f"CheckpointHook: save_best={self.save_best!r} but the run has no validation. "
                "Add val_dataloader (and train_cfg.val_interval), or drop save_best."
            )
        self._adopt_best_on_disk(runner)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Saves at every ``interval``-th optimizer step."""
        self._steps_done = runner.iter + 1
        if self.interval and not self.by_epoch and self._steps_done % self.interval == 0:
            self._save(runner, asynchronous=self.asynchronous)

    def after_train_epoch(self, runner) -> None:
        """Saves at every ``interval``-th epoch, with ``by_epoch``."""
        if not self.interval or not self.by_epoch:
            return
        epochs, steps_left = divmod(self._steps_done, len(runner.train_dataloader))
        if steps_left == 0 and epochs % self.interval == 0:  # else: max_iters ended within an epoch
            self._save(runner, asynchronous=self.asynchronous)

    def after_val_epoch(self, runner, metrics: dict[str, float] | None = None) -> None:
        """Saves the best checkpoint when the watched metric improved."""
        if self.save_best is None or metrics is None or self._steps_done == 0:
            return  # step 0: a validation of the model as it came
        name, score = self._watched(metrics)
        if not math.isfinite(score):
            runner.logger.warning(f"{name} = {score} at step {self._steps_done} cannot be the best")
            return
        if self.best_score is not None and not self._better(score, self.best_score):
            return
        self.best_score, self.best_name = score, f"iter_{self._steps_done}"
        self._save(runner)
        if runner.rank == 0:
            self._write_best_file(runner, name)
            runner.logger.info(f"best {name} so far: {score:.4f}, checkpoint {self.best_name}")

    def after_train(self, runner) -> None:
        """Saves the end of the run, unless its last step is saved already."""
        if self.save_last:
            self._save(runner)

    def _save(self, runner, *, asynchronous: bool = False) -> None:
        """Saves this step unless it is saved already, then prunes (collective: all ranks call)."""
        if self._last_saved != self._steps_done:
            self._settle(runner)
            self._unpruned = Path(runner.save_checkpoint(asynchronous=asynchronous))
            self._last_saved = self._steps_done
        if not asynchronous:
            self._settle(runner)

    def _settle(self, runner) -> None:
        """Waits for a checkpoint that is being written, and removes what it makes superfluous."""
        if self._unpruned is None:
            return
        runner.finish_saving()
        newest, self._unpruned = self._unpruned, None
        if runner.rank == 0 and self.max_keep_ckpts is not None:
            self._prune(runner, newest)

    def _prune(self, runner, newest: Path) -> None:
        """Removes all but the newest ``max_keep_ckpts`` and the best one; rank 0 only."""
        others = [
            p
            for p in list_checkpoints(runner.work_dir)
            if p.name not in (newest.name, self.best_name)
        ]
        # By time of writing, not by step: after a resume from an older step the higher numbers are
        # the older ones.
        others.sort(key=lambda p: p.stat().st_mtime)
        num_kept = self.max_keep_ckpts - (newest.name != self.best_name)
        surplus = others[: max(0, len(others) - num_kept)]
        if not surplus:
            return
        try:
            verify_checkpoint(newest)
        except CheckpointError as error:
            runner.logger.error(f"older checkpoints are kept, the new one is not whole: {error}")
            return
        for path in surplus:
            remove_checkpoint(path)

    def _watched(self, metrics: dict[str, float]) -> tuple[str, float]:
        """Name and value of the metric that decides which checkpoint is best."""
        name = next(iter(metrics), None) if self.save_best == "auto" else self.save_best
        if name is None or name not in metrics:
            raise KeyError(
                f"CheckpointHook: save_best={self.save_best!r} is none of the validation metrics "
                f"{sorted(metrics)}; name one of these"
            )
        if self.rule is None:
            self.rule = rule_of_metric(name)
        return name, float(metrics[name])

    def _better(self, score: float, than: float) -> bool:
        return score < than if self.rule == "less" else score > than

    def _write_best_file(self, runner, metric: str) -> None:
        folder = checkpoints_dir(runner.work_dir)
        best = {
            "checkpoint": self.best_name,
            "step": self._steps_done,
            "metric": metric,
            "value": self.best_score,
        }
        aside = folder / (BEST_FILE + ".tmp")
        aside.write_text(json.dumps(best, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(aside, folder / BEST_FILE)

    def _adopt_best_on_disk(self, runner) -> None:
        """After a resume: the best checkpoint as the files say.

        A checkpoint saved before the validation of its own step does not know that it became the
        best one; ``best.json`` does. A best checkpoint that lies in another work_dir is let go.
        """
        if runner.iter == 0 or self.save_best is None:
            return
        box = self._best_on_disk(runner) if runner.rank == 0 else None
        # Told by the main rank: the other machines may not see its files.
        self.best_score, self.best_name = runner.strategy.ranks.broadcast(box)

    def _best_on_disk(self, runner) -> tuple[float | None, str | None]:
        """Score and folder name of the best checkpoint that is there, (None, None) without one."""
        folder = checkpoints_dir(runner.work_dir)
        best_path = folder / BEST_FILE
        if best_path.is_file():
            best = json.loads(best_path.read_text(encoding="utf-8"))
            same = self.save_best in ("auto", best["metric"])
            if same and best["step"] <= runner.iter and (folder / best["checkpoint"]).is_dir():
                return best["value"], best["checkpoint"]
        if self.best_name is not None and not (folder / self.best_name).is_dir():
            runner.logger.info(f"the best checkpoint {self.best_name} is not here: counted anew")
            return None, None
        return self.best_score, self.best_name


def rule_of_metric(name: str) -> Literal["less", "greater"]:
    """Whether less or greater is better, from the words in a metric's name.

    Raises:
        ValueError: the name does not tell.
    """
    lower = name.lower()
    if any(word in lower for word in _LESS):
        return "less"
    if any(word in lower for word in _GREATER):
        return "greater"
    raise ValueError(
        f"CheckpointHook: save_best={name!r} does not tell whether less or greater is better; "
        "set rule='less' or rule='greater'"
    )


def _positive_or_none(name: str, value: int | None) -> int | None:
    if value is None or value == -1:  # -1 is MMEngine's word for 'never' and 'all'
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"CheckpointHook: {name}={value!r}; use a number from 1 on, or None")
    return value
