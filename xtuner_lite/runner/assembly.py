"""The half of the Runner that builds its parts, in the order in which mistakes show early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmengine.logging import MessageHub, MMLogger

from xtuner_lite.data.dataloader import StepDataLoader, build_dataloader
from xtuner_lite.data.question_sets import QuestionSet
from xtuner_lite.engine.checkpoint import newest_valid_checkpoint, verify_checkpoint
from xtuner_lite.engine.distributed import Ranks, draw_seed, seed_of_rank, set_randomness
from xtuner_lite.engine.optim import OptimWrapper
from xtuner_lite.engine.visualization import build_visualizer
from xtuner_lite.models.pth import SUFFIXES as PTH_SUFFIXES
from xtuner_lite.models.pth import load_pth
from xtuner_lite.registry import LOOPS, MODELS, PARAM_SCHEDULERS
from xtuner_lite.runner.contract import HookContract
from xtuner_lite.runner.environment import compile_layers, describe_environment
from xtuner_lite.runner.loops import EvalLoop, TrainLoop, ValLoop
from xtuner_lite.runner.persistence import check_equal_data, frozen_digest, read_meta
from xtuner_lite.runner.reply_loops import REPLY_LOOPS
from xtuner_lite.runner.run_files import CONFIG_FILE, ENVIRONMENT_FILE


class Assembly(HookContract):
    """Builds logs, data, model and loops out of the sections that the Runner was given."""

    ranks: Ranks
    _sections: dict[str, Any]
    _load_from: str | None

    def _start(self) -> None:
        """Log file, message hub and visualizer of a training or an evaluation."""
        self.ranks.on_main(lambda: self.log_dir.mkdir(parents=True, exist_ok=True))
        self.logger = self._build_logger("run", log_file=str(self.log_dir / "run.log"))
        self.message_hub = MessageHub.get_instance(f"{self.experiment_name}-{id(self)}")
        self.visualizer = build_visualizer(
            self._sections["visualizer"],
            str(self.log_dir),
            cfg=self.cfg,
            is_main=self.strategy.is_main,
        )

    def _build_logger(self, kind: str, *, log_file: str | None) -> MMLogger:
        name = f"{self.experiment_name}-{self.timestamp}-{id(self)}-{kind}"
        if MMLogger.check_instance_created(name):
            return MMLogger.get_instance(name)
        return MMLogger.get_instance(
            name,
            logger_name=self.experiment_name,
            log_file=log_file,
            log_level=self._log_level,
        )

    def _seed(self, checkpoint: Path | None) -> None:
        """Seed the generators: the config's seed, else that of the run to go on with."""
        seed = self._randomness.get("seed")
        if checkpoint is not None and seed is None:
            seed = read_meta(checkpoint)["seed"]
        seed = draw_seed() if seed is None else seed
        self.seed = self.ranks.broadcast(seed)
        set_randomness(self.seed, self._randomness.get("deterministic", False))
        environment = describe_environment(self)
        self.logger.info(environment)
        if self.log_dir.is_dir():  # a look at the data writes nothing
            self.ranks.on_main(lambda: self._describe_start(environment))

    def _describe_start(self, environment: str) -> None:
        """What this attempt runs on and by which config, beside its log."""
        (self.log_dir / ENVIRONMENT_FILE).write_text(environment + "\n", encoding="utf-8")
        if self.cfg is not None:
            from xtuner_lite.config import dump_config

            dump_config(self.cfg, self.log_dir / CONFIG_FILE)

    def _find_resume_checkpoint(self) -> Path | None:
        """The checkpoint to go on from; the main rank looks, the others are told."""
        found = self.ranks.on_main(self._look_for_checkpoint)
        return found if found is None else Path(found)

    def _look_for_checkpoint(self) -> Path | None:
        if not self._resume:
            return None
        if self._resume is not True:
            path = Path(self._resume)
            verify_checkpoint(path)
            read_meta(path)
            return path
        path = newest_valid_checkpoint(self.work_dir, self.logger.warning)
        if path is None:
            self.logger.warning(
                f"resume: no checkpoint in {self.work_dir} yet; this run starts at step 0"
            )
        return path

    def _build_dataloader(self, name: str, *, shuffle: bool = False) -> StepDataLoader | None:
        section = self._sections[name]
        if section is None:
            return None
        self.mark(f"building {name}")
        self._build_tokenizer()
        with self.ranks.local_main_first():  # the others read what it put into the cache
            loader = build_dataloader(
                **section,
                tokenizer=self.tokenizer,
                accumulative_counts=self._accumulative_counts() if shuffle else 1,
                shuffle=shuffle,
                seed=self.seed,
                rank=self.ranks.rank,
                world_size=self.ranks.world_size,
            )
        check_equal_data(name, loader, self.ranks)
        ledger = getattr(loader.dataset, "ledger", None)
        if ledger is not None:
            self.logger.info(f"{name}:\n{ledger.report()}")
            if self.log_dir.is_dir() and self.ranks.is_main:
                (self.log_dir / f"{name}_ledger.json").write_text(
                    json.dumps(ledger.to_dict(), indent=1)
                )
        return loader

    def _check_weights_are_there(self) -> None:
        """Before anything is read: a run that cannot start is not to prepare data for an hour.

        Raises:
            FileNotFoundError: the weights to start from are not there.
        """
        model = self._sections["model"]
        named = {"load_from": self._load_from}
        if isinstance(model, dict):
            named["model.pretrained_pth"] = model.get("pretrained_pth")
        for key, path in named.items():
            if path is not None and not Path(path).expanduser().exists():
                raise FileNotFoundError(
                    f"{key}={str(path)!r} is not there; give a checkpoint folder that is, such as "
                    "work_dirs/RUN/checkpoints/iter_N, or None"
                )

    def _accumulative_counts(self) -> int:
        wrapper = self._sections["optim_wrapper"] or {}
        if isinstance(wrapper, dict):
            return wrapper.get("accumulative_counts", 1)
        return wrapper.accumulative_counts

    def _build_tokenizer(self) -> None:
        if self.tokenizer is None and self._sections["tokenizer"] is not None:
            self.tokenizer = MODELS.build(self._sections["tokenizer"], config_key="tokenizer")

    def _build_model(self, *, train: bool, weights: str | Path | None = None) -> None:
        self.mark("building the model")
        self._build_tokenizer()
        self.model = MODELS.build(
            self._sections["model"], config_key="model", tokenizer=self.tokenizer
        )
        if weights is not None:
            self._load_weights(weights)
            self.logger.info(f"weights loaded from {weights}")
        section = self._sections["optim_wrapper"]
        if isinstance(section, dict):
            section = {key: value for key, value in section.items() if key != "type"}
            self.optim_wrapper = OptimWrapper(**section)
        else:
            self.optim_wrapper = section
        self.frozen_weights = frozen_digest(self.model)
        self.mark("placing the model")
        self.model = self.strategy.prepare(self.model, self.optim_wrapper, train=train)
        set_randomness(seed_of_rank(self.seed, self.ranks.rank))
        precision = self.strategy.precision
        self.logger.info(f"compute dtype {precision.dtype} ({precision.reason})")
        if self._compile:
            compile_layers(self.model, **(self._compile if isinstance(self._compile, dict) else {}))

    def _load_weights(self, weights: str | Path) -> None:
        if Path(weights).suffix not in PTH_SUFFIXES:
            self.model.load_pretrained(weights)
        elif self._allow_pth:
            own = getattr(self.model, "load_pth", None)
            own(weights) if own is not None else load_pth(self.model, weights)
        else:
            raise ValueError(
                f"load_from={str(weights)!r} is a pickled checkpoint, which is not opened unasked. "
                "If you trust where it comes from: allow_pth=True in the config (--cfg-options "
                "allow_pth=True); its tensors are read, nothing else in it."
            )

    def _build_train_loop(self) -> None:
        section = {"type": "TrainLoop", **(self._sections["train_cfg"] or {})}
        self.train_loop = LOOPS.build(
            section, config_key="train_cfg", runner=self, dataloader=self.train_dataloader
        )
        if not isinstance(self.train_loop, TrainLoop):
            raise TypeError(
                "train_cfg.type built a "
                f"{type(self.train_loop).__module__}.{type(self.train_loop).__name__}; a loop "
                "must subclass xtuner_lite.runner.loops.TrainLoop"
            )
        if self.val_dataloader is not None:
            self.val_loop = self._build_eval_loop("val", ValLoop, self.val_dataloader)
        configs = self._scheduler_configs or []
        for index, cfg in enumerate(configs if isinstance(configs, (list, tuple)) else [configs]):
            scheduler = PARAM_SCHEDULERS.build(
                cfg,
                config_key=f"param_scheduler.{index}",
                optimizer=self.optim_wrapper.optimizer,
                epoch_length=len(self.train_dataloader),
                max_iters=self.train_loop.max_iters,
            )
            self.param_schedulers.append(scheduler)

    def _build_eval_loop(
        self, stage: str, default: type[EvalLoop], dataloader: StepDataLoader
    ) -> EvalLoop:
        if isinstance(dataloader.dataset, QuestionSet):  # asked, where other data is measured
            default = REPLY_LOOPS[stage]
        section = {"type": default, **(self._sections[f"{stage}_cfg"] or {})}
        return LOOPS.build(
            section,
            config_key=f"{stage}_cfg",
            runner=self,
            dataloader=dataloader,
            evaluator=self._sections[f"{stage}_evaluator"],
        )
