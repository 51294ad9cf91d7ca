"""The Runner: builds the parts a config names, in an order that fails early, and runs them."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from torch import nn

from xtuner_lite.config import load_plugins
from xtuner_lite.data.dataloader import StepDataLoader
from xtuner_lite.engine.checkpoint import (
    checkpoint_name,
    checkpoints_dir,
    exclusive_work_dir,
    write_checkpoint,
)
from xtuner_lite.engine.checkpoint_async import AsyncWriter
from xtuner_lite.engine.distributed import init_distributed, meeting_within
from xtuner_lite.engine.optim import OptimWrapper
from xtuner_lite.engine.strategies.base import Strategy
from xtuner_lite.engine.watchdog import Watchdog
from xtuner_lite.registry import RUNNERS, STRATEGIES
from xtuner_lite.runner.assembly import Assembly
from xtuner_lite.runner.contract import merge_default_hooks
from xtuner_lite.runner.environment import (
    apply_env,
    timeouts,
)
from xtuner_lite.runner.loops import EvalLoop, TestLoop, TrainLoop, ValLoop
from xtuner_lite.runner.persistence import (
    RunSnapshot,
    resume_run,
)
from xtuner_lite.runner.signals import SignalWatch, TrainingInterrupted


@RUNNERS.register_module()
class Runner(Assembly):
    """Assembles a run from a config's sections and executes it under MMEngine's contract.

    Every argument is the config section of the same name; objects may be given instead of configs.
    Parts are built when they are first needed, data before the model, so that a mistake in the data
    is told before a model is loaded.

    Args:
        model: training method (registry MODELS).
        work_dir: where checkpoints and logs go.
        tokenizer: built once and handed to data sets, the method, hooks and checkpoints.
        train_dataloader, val_dataloader, test_dataloader: see data.dataloader.build_dataloader.
        train_cfg, val_cfg, test_cfg: see runner.loops; val_cfg and test_cfg may be left out.
        optim_wrapper: see engine.optim.OptimWrapper.
        param_scheduler: one or a list of learning-rate schedules (registry PARAM_SCHEDULERS).
        val_evaluator, test_evaluator: metrics beside the loss (registry METRICS).
        default_hooks: name -> config, over engine.hooks.DEFAULT_HOOKS; None takes one away.
        custom_hooks: list of further hooks.
        load_from: folder of an adapter or model whose weights the run starts from.
        allow_pth: let load_from be a pickled .pth of MMEngine or XTuner: tensors only are read.
        resume: True continues from the newest valid checkpoint of work_dir; a path, from that one.
        strategy: how the model is placed (registry STRATEGIES); default SingleDevice, and DDP where
            a launcher started several processes.
        launcher: 'none': this process is the run; 'pytorch', 'slurm', 'mpi': see
            engine.distributed.init_distributed.
        env_cfg: see runner.environment.apply_env.
        randomness: dict(seed=None, deterministic=False).
        visualizer: dict(vis_backends=[...]), see engine.visualization.
        compile: True or options of torch.compile, applied to each decoder layer.
        custom_imports, plugins: modules and files to import first; used before the Runner is built.
        experiment_name: name of the run in logs; default is the config's name.
        default_scope, log_processor, runner_type: accepted for MMEngine's configs.
        log_level: level of the console and the log file.
        cfg: the whole config, stored with the run.
    """

    def __init__(
        self,
        model: nn.Module | dict[str, Any],
        work_dir: str,
        *,
        tokenizer: Any = None,
        train_dataloader: dict[str, Any] | None = None,
        val_dataloader: dict[str, Any] | None = None,
        test_dataloader: dict[str, Any] | None = None,
        train_cfg: dict[str, Any] | None = None,
        val_cfg: dict[str, Any] | None = None,
        test_cfg: dict[str, Any] | None = None,
        optim_wrapper: dict[str, Any] | None = None,
        param_scheduler: dict[str, Any] | list[dict[str, Any]] | None = None,
        val_evaluator: dict[str, Any] | list[dict[str, Any]] | None = None,
        test_evaluator: dict[str, Any] | list[dict[str, Any]] | None = None,
        default_hooks: dict[str, Any] | None = None,
        custom_hooks: list[dict[str, Any]] | None = None,
        load_from: str | None = None,
        allow_pth: bool = False,
        resume: bool | str = False,
        strategy: dict[str, Any] | None = None,
        launcher: str = "none",
        env_cfg: dict[str, Any] | None = None,
        randomness: dict[str, Any] | None = None,
        visualizer: dict[str, Any] | None = None,
        compile: bool | dict[str, Any] = False,
        custom_imports: dict[str, Any] | list[str] | None = None,
        plugins: list[str] | None = None,
        experiment_name: str | None = None,
        default_scope: str = "xtuner_lite",
        log_processor: dict[str, Any] | None = None,
        log_level: str = "INFO",
        runner_type: str = "Runner",
        cfg: Config | None = None,
    ) -> None:
        del (
            custom_imports,
            plugins,
            default_scope,
            runner_type,
        )  # handled where the config is loaded
        apply_env(**(env_cfg or {}))
        self._timeouts = timeouts(env_cfg)
        self.ranks = init_distributed(
            launcher,
            backend=((env_cfg or {}).get("dist_cfg") or {}).get("backend"),
            timeout_s=self._timeouts["timeout_s"],
        )
        self._watchdog: Watchdog | None = None
        self.cfg = cfg
        self.work_dir = str(work_dir)
        self.timestamp = self.ranks.broadcast(time.strftime("%Y%m%d_%H%M%S"))
        self.experiment_name = experiment_name or _config_name(cfg)
        self._sections = dict(
            model=model, tokenizer=tokenizer, visualizer=visualizer, log_processor=log_processor,
            train_dataloader=train_dataloader, train_cfg=train_cfg, optim_wrapper=optim_wrapper,
            val_dataloader=val_dataloader, val_cfg=val_cfg, val_evaluator=val_evaluator,
            test_dataloader=test_dataloader, test_cfg=test_cfg, test_evaluator=test_evaluator,
        )  # fmt: skip
        self._scheduler_configs = param_scheduler
        self._load_from, self._resume, self._compile = load_from, resume, compile
        self._allow_pth = allow_pth
        self._randomness = dict(randomness or {})
        self._log_level = log_level
        self.hooks: list[Hook] = []
        for hook in [*merge_default_hooks(default_hooks).values(), *(custom_hooks or [])]:
            self.register_hook(hook)
        default = "SingleDevice" if self.ranks.world_size == 1 else "DDP"
        self.strategy: Strategy = STRATEGIES.build(
            strategy or dict(type=default), config_key="strategy", ranks=self.ranks
        )
        self.frozen_weights = ""  # digest of what does not train; see persistence.frozen_digest
        self.seed: int = 0
        self.logger: MMLogger | None = None
        self.tokenizer: Any = None
        self.model: Any = None
        self.optim_wrapper: OptimWrapper | None = None
        self.param_schedulers: list[Any] = []
        self.train_dataloader: StepDataLoader | None = None
        self.val_dataloader: StepDataLoader | None = None
        self.test_dataloader: StepDataLoader | None = None
        self.train_loop: TrainLoop | None = None
        self.val_loop: EvalLoop | None = None
        self.test_loop: EvalLoop | None = None
        self._signals = SignalWatch()
        self._last_saved: Path | None = None
        self._writer: AsyncWriter | None = None

    @classmethod
    def from_cfg(cls, cfg: Config | dict[str, Any]) -> Runner:
        """Build a Runner from a config; settings that are no section of a Runner are ignored.

        ``xtuner-lite train`` and ``load_config`` + ``check_config`` refuse unknown names before
        this.
        """
        load_plugins(cfg)
        known = set(inspect.signature(cls.__init__).parameters) - {"self", "cfg"}
        sections = {key: cfg[key] for key in known if key in cfg}
        sections.setdefault("work_dir", f"./work_dirs/{_config_name(cfg)}")
        return cls(**sections, cfg=cfg if isinstance(cfg, Config) else None)

    # --- the three things a Runner does

    def train(self) -> nn.Module:
        """Train from the beginning, from ``load_from`` or from a checkpoint; returns the model.

        Raises:
            TrainingInterrupted: a signal came; everything is saved, the exit code is 143 or 130.
        """
        with ExitStack() as stack:
            stack.enter_context(self._watched())
            with self.ranks.together():
                if self.ranks.is_main:
                    stack.enter_context(exclusive_work_dir(self.work_dir))
            with self._slow("preparing the run"):
                self._start()
                checkpoint = self._find_resume_checkpoint()
                self._seed(checkpoint)
                self._last_saved, self.param_schedulers = None, []
                self._check_weights_are_there()
                self.train_dataloader = self._build_dataloader("train_dataloader", shuffle=True)
                self.val_dataloader = self._build_dataloader("val_dataloader")
                self._build_model(train=True, weights=self._load_from)
                self._build_train_loop()
                self.call_hook("before_run")
                if checkpoint is not None:
                    resume_run(self, checkpoint)
                    self.logger.info(f"resumed from {checkpoint} at step {self.train_loop.iter}")
            stack.enter_context(self._signals)
            stack.callback(self._close)
            stack.push(self._tell_failure)  # before hooks are closed, which may take long
            self.train_loop.run()
            self.finish_saving()
            self.call_hook("after_run")
        return self.model

    def val(self) -> dict[str, float]:
        """Evaluate on ``val_dataloader``; returns e.g. {'loss': 1.23}.

        After ``train`` it is the trained model that is evaluated; else the config's, with the
        weights of ``load_from`` or of the checkpoint that ``resume`` names.
        """
        return self._evaluate("val")

    def test(self) -> dict[str, float]:
        """Evaluate on ``test_dataloader``, as ``val`` does."""
        return self._evaluate("test")

    def prepare_data(self, name: str = "train_dataloader") -> StepDataLoader:
        """Build the tokenizer and the data of one section only; no model, no file is written.

        Raises:
            ValueError: the config has no such section.
        """
        if self._sections[name] is None:
            raise ValueError(f"the config has no {name}; add one to look at its data")
        if self.logger is None:
            self.logger = self._build_logger("looking", log_file=None)
        self._seed(None)
        self._check_weights_are_there()
        loader = self._build_dataloader(name, shuffle=name == "train_dataloader")
        setattr(self, name, loader)
        return loader

    def save_checkpoint(self, *, asynchronous: bool = False) -> Path:
        """Write the run as it stands after the last completed step; returns the folder.

        Every rank calls it.

        Args:
            asynchronous: copy the state and write it while training goes on. The folder appears
                when it is whole; ``finish_saving`` waits for it.

        Raises:
            CheckpointError: see engine.checkpoint.write_checkpoint.
        """
        target = checkpoints_dir(self.work_dir) / checkpoint_name(
            self.train_loop.num_completed_steps
        )
        self.finish_saving()
        if self._last_saved != target:
            begin = time.perf_counter()
            with self._slow("writing a checkpoint"):
                snapshot = RunSnapshot(self, clone=asynchronous)
                if asynchronous:
                    self._writer = AsyncWriter(target, snapshot.write, self.ranks)
                else:
                    write_checkpoint(target, snapshot.write, self.ranks)
            self._last_saved = target
            what = "is being written" if asynchronous else "saved"
            self.logger.info(f"checkpoint {what}: {target} ({time.perf_counter() - begin:.1f} s)")
        return target

    def finish_saving(self) -> None:
        """Wait for a checkpoint that is being written; every rank calls it.

        Raises:
            CheckpointError: it could not be written.
        """
        writer, self._writer = self._writer, None
        if writer is not None:
            with self._slow("waiting for a checkpoint to be written"):
                writer.finish()

    def check_signals(self) -> None:
        """Save and leave if SIGTERM or Ctrl-C arrived at any rank during the last step."""
        received = [number for number in self.ranks.gather(self._signals.received) if number]
        if not received:
            return
        path = self.save_checkpoint()
        self.logger.warning(
            f"stopped by a signal after step {self.iter}; continue with --resume (saved {path})"
        )
        raise TrainingInterrupted(received[0])

    def mark(self, what: str, step: int | None = None) -> None:
        """Note that this rank got here; a rank that stays behind is found by its last mark."""
        if self._watchdog is not None:
            self._watchdog.mark(what, step)

    @contextmanager
    def _slow(self, what: str) -> Iterator[None]:
        """A phase that may take long without a mark (env_cfg.dist_cfg.slow_timeout)."""
        if self._watchdog is None:
            yield
            return
        with self._watchdog.slow(what, self._timeouts["slow_timeout_s"]):
            yield

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Where ranks fail or stay behind, end the run on all of them and say which one it was."""
        ranks = self.ranks
        if ranks.world_size == 1:
            yield
            return
        timeout_s = self._timeouts["timeout_s"]
        with meeting_within(timeout_s, ranks.rank):  # it makes a connection of its own
            self._watchdog = Watchdog(
                rank=ranks.rank,
                world_size=ranks.world_size,
                local_rank=ranks.local_rank,
                timeout_s=timeout_s,
                log_dir=self.log_dir,
            )
        self._watchdog.start()
        # It finds a rank that stays behind; a communication itself may wait for a slow phase.
        ranks.set_timeout(self._timeouts["slow_timeout_s"])
        try:
            yield
        except BaseException as error:
            self._watchdog.failed(error)
            raise
        self._watchdog.close()
        self._watchdog = None

    def _tell_failure(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and self._watchdog is not None:
            self._watchdog.failed(error)

    def _close(self) -> None:
        """End what hooks and back-ends hold open, however the run ended."""
        for hook in self.hooks:
            if callable(close := getattr(hook, "close", None)):
                close()
        self.visualizer.close()

    def _evaluate(self, stage: str) -> dict[str, float]:
        name = f"{stage}_dataloader"
        if self._sections[name] is None:
            raise ValueError(f"the config has no {name}; add one (as train_dataloader) to evaluate")
        with ExitStack() as stack:
            stack.enter_context(self._watched())
            with self._slow("preparing the evaluation"):
                self._start()
                stack.callback(self._close)
                self._seed(None)
                dataloader = self._build_dataloader(name)
                setattr(self, name, dataloader)
                if self.model is None:
                    checkpoint = self._find_resume_checkpoint()
                    self._build_model(train=False, weights=checkpoint or self._load_from)
                default = {"val": ValLoop, "test": TestLoop}[stage]
                loop = self._build_eval_loop(stage, default, dataloader)
                setattr(self, f"{stage}_loop", loop)
            self.call_hook("before_run")
            results = loop.run()
            self.call_hook("after_run")
        return results


def _config_name(cfg: Any) -> str:
    filename = getattr(cfg, "filename", None)
    return Path(filename).stem if filename else "run"
