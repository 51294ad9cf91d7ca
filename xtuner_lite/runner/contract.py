"""What MMEngine promises its hooks, and the Runner keeps: stages, priorities, names to read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.hooks import Hook
from mmengine.runner.priority import get_priority

from xtuner_lite.engine.hooks import DEFAULT_HOOKS
from xtuner_lite.registry import HOOKS

if TYPE_CHECKING:
    from xtuner_lite.engine.strategies.base import Strategy
    from xtuner_lite.runner.loops import TrainLoop


class HookContract:
    """The half of the Runner that hooks know: they are called by it and read from it."""

    hooks: list[Hook]
    strategy: Strategy
    train_loop: TrainLoop | None
    work_dir: str
    timestamp: str
    _sections: dict[str, Any]

    def register_hook(self, hook: Hook | dict[str, Any], priority: str | int | None = None) -> None:
        """Add a hook, after those of the same priority.

        Raises:
            TypeError: neither a Hook nor its config.
        """
        if isinstance(hook, dict):
            hook = dict(hook)
            priority = hook.pop("priority", priority)
            hook = HOOKS.build(hook)
        if not isinstance(hook, Hook):
            raise TypeError(
                f"a hook must be an mmengine Hook or its config, got {type(hook).__name__}"
            )
        hook.priority = priority if priority is not None else hook.priority
        rank = get_priority(hook.priority)
        position = sum(1 for other in self.hooks if get_priority(other.priority) <= rank)
        self.hooks.insert(position, hook)

    def call_hook(self, stage: str, **kwargs: Any) -> None:
        """Call ``stage`` on every hook that has it, in order of priority."""
        for hook in self.hooks:
            function = getattr(hook, stage, None)
            if function is not None:
                function(self, **kwargs)

    @property
    def iter(self) -> int:
        """0-based optimizer step during a step; steps done between steps."""
        return self.train_loop.iter if self.train_loop else 0

    @property
    def epoch(self) -> int:
        """0-based epoch."""
        return self.train_loop.epoch if self.train_loop else 0

    @property
    def max_iters(self) -> int:
        """Optimizer steps of the whole run."""
        return self.train_loop.max_iters if self.train_loop else 0

    @property
    def max_epochs(self) -> int:
        """Epochs of the whole run, the last one perhaps cut short."""
        return self.train_loop.max_epochs if self.train_loop else 0

    @property
    def rank(self) -> int:
        """This process's number."""
        return self.strategy.rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.strategy.world_size

    @property
    def log_dir(self) -> Path:
        """Folder of this launch's logs: work_dir/<timestamp>."""
        return Path(self.work_dir) / self.timestamp

    @property
    def _train_loop(self) -> TrainLoop | None:
        """The name under which mmengine's LogProcessor reads the loop."""
        return self.train_loop

    @property
    def log_processor(self) -> Any:
        """mmengine's LogProcessor, for its stock LoggerHook."""
        if not hasattr(self, "_log_processor"):
            from mmengine.runner import LogProcessor

            self._log_processor = LogProcessor(
                **{"by_epoch": False, **(self._sections["log_processor"] or {})}
            )
        return self._log_processor


def merge_default_hooks(given: dict[str, Any] | None) -> dict[str, Any]:
    """DEFAULT_HOOKS with a config's changes; a value with its own type replaces the default."""
    hooks: dict[str, Any] = {name: dict(cfg) for name, cfg in DEFAULT_HOOKS.items()}
    for name, change in (given or {}).items():
        if change is None:
            hooks.pop(name, None)
        elif isinstance(change, dict) and "type" not in change and name in hooks:
            hooks[name] = {**hooks[name], **change}
        else:
            hooks[name] = change
    return hooks
