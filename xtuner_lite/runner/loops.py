"""The training loop of the project (there is one), and the validation and test loops."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xtuner_lite.data.dataloader import StepDataLoader
from xtuner_lite.engine.distributed import Ranks
from xtuner_lite.engine.metrics import Metric
from xtuner_lite.engine.reply_metrics import ReplyMetric
from xtuner_lite.registry import LOOPS, METRICS
from xtuner_lite.runner.rollback import find_rollback, roll_back
from xtuner_lite.structures import Batch, LossOutput

if TYPE_CHECKING:
    from xtuner_lite.runner.runner import Runner


@LOOPS.register_module(name=["TrainLoop", "EpochBasedTrainLoop", "IterBasedTrainLoop"])
class TrainLoop:
    """Runs optimizer steps; one iter is one optimizer step, whatever the accumulation.

    Args:
        runner: the runner that owns the parts.
        dataloader: the training data, read step by step.
        max_epochs: passes over the data; the last step of an epoch may be short.
        max_iters: optimizer steps. Give one of the two.
        val_interval: optimizer steps between validations; None validates after each epoch. 0 never.
        val_begin: first optimizer step (1-based) after which a validation may run.

    Raises:
        ValueError: neither or both of max_epochs and max_iters, or a number that is not positive.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: StepDataLoader,
        *,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        val_interval: int | None = None,
        val_begin: int = 1,
    ) -> None:
        if (max_epochs is None) == (max_iters is None):
            raise ValueError(
                f"train_cfg has max_epochs={max_epochs} and max_iters={max_iters}; give exactly "
                "one: "
                "max_epochs counts passes over the data, max_iters optimizer steps"
            )
        if (max_epochs or max_iters or 0) <= 0:
            raise ValueError(
                f"train_cfg: max_epochs={max_epochs}, max_iters={max_iters} must be positive"
            )
        if max_epochs is not None and getattr(dataloader, "endless", False):
            raise ValueError(
                f"train_cfg has max_epochs={max_epochs}, and the training data is a stream, which "
                "has no epochs; set max_iters (optimizer steps)"
            )
        self.runner = runner
        self.dataloader = dataloader
        steps = len(dataloader)
        self.max_iters = max_iters if max_iters is not None else math.ceil(max_epochs * steps)
        self.max_epochs = math.ceil(self.max_iters / steps)
        self.val_interval = val_interval
        self.val_begin = val_begin
        self.stop_training = False
        self.num_completed_steps = 0
        self._iter = 0
        self.data_time_s = 0.0  # waiting for the micro-batches of the current step
        self._skip = False
        self._rollback: Path | None = None
        self._ending_epoch: int | None = None

    @property
    def iter(self) -> int:
        """Steps before the current one (0-based number of the step being done)."""
        return self._iter

    @property
    def epoch(self) -> int:
        """0-based number of the epoch that the current step belongs to, or that just ends."""
        if self._ending_epoch is not None:
            return self._ending_epoch
        return self._iter // len(self.dataloader)

    def start_from(self, num_steps: int) -> None:
        """Continue after ``num_steps`` completed optimizer steps."""
        self._iter = self.num_completed_steps = num_steps

    def skip_step(self) -> None:
        """For hooks, in ``before_optimizer_step``: drop the gradients, leave the weights."""
        self._skip = True

    def request_rollback(self, before: int, multiple_of: int = 1) -> int:
        """For hooks, in ``before_optimizer_step``, on every rank: drop this step and go back.

        Instead of the update, the state of the newest whole checkpoint of at most ``before`` steps
        (of those saved after a multiple of ``multiple_of``) is loaded, see runner.rollback; the
        data goes on after this step. Returns the steps of that checkpoint.

        Raises:
            CheckpointError: there is none.
        """
        self._rollback, num_steps = find_rollback(self.runner, before, multiple_of)
        self._skip = True
        return num_steps

    def run(self) -> None:
        """Train until max_iters, a hook sets ``stop_training`` or a signal asks to end."""
        runner = self.runner
        runner.call_hook("before_train")
        steps = self.dataloader.steps(self._iter, self.max_iters)
        runner.model.train()
        first, epoch_length, ranks = self._iter, len(self.dataloader), runner.strategy.ranks
        while self._iter < self.max_iters and not ranks.any(self.stop_training):
            if (
                self._iter % epoch_length == 0 or self._iter == first
            ):  # a resume starts inside an epoch
                runner.call_hook("before_train_epoch")
            begin = time.perf_counter()
            runner.mark("reading data", self._iter + 1)
            micro_batches = next(steps)
            self.data_time_s = time.perf_counter() - begin
            self.train_step(micro_batches)
            if self._iter % epoch_length == 0 or self._iter == self.max_iters:
                self._after_epoch()
            if self._validation_is_due():
                runner.val_loop.run()
                runner.model.train()
            runner.check_signals()
        runner.call_hook("after_train")

    def train_step(self, micro_batches: list[Batch]) -> None:
        """One optimizer step over its micro-batches."""
        runner, strategy = self.runner, self.runner.strategy
        hook_args: dict[str, Any] = dict(batch_idx=self._iter, data_batch=micro_batches)
        self._skip = False
        step, mark = self._iter + 1, runner.mark
        mark("hooks before the step", step)
        runner.call_hook("before_train_iter", **hook_args)
        mark("counting units", step)
        num_units = strategy.sum_over_ranks(sum(runner.model.count_units(b) for b in micro_batches))
        totals = _StepTotals()
        for number, batch in enumerate(micro_batches, start=1):
            is_last = number == len(micro_batches)
            batch = move_batch(batch, strategy.device)
            mark(f"forward of micro-batch {number}", step)
            output = strategy.forward(batch, is_last=is_last)
            mark(f"backward of micro-batch {number}", step)
            strategy.backward(output.loss_sum, max(num_units, 1.0), is_last=is_last)
            totals.add(batch, output)
        mark("sums over the ranks", step)
        outputs = totals.summary(num_units, strategy.ranks)
        outputs["grad_norm"] = strategy.clip_gradients()
        if num_units == 0:
            runner.logger.warning(
                f"step {self._iter + 1} has nothing to learn (0 supervised units); it is skipped"
            )
            self._skip = True
        mark("hooks before the update", step)
        runner.call_hook("before_optimizer_step", **hook_args, outputs=outputs)
        mark("update", step)
        self._skip = strategy.ranks.any(self._skip)  # a hook may look at one rank's data only
        if self._skip:
            strategy.discard_gradients()
        if self._rollback is not None:
            mark("going back to a checkpoint", step)
            roll_back(runner, self._rollback)
            self._rollback = None
        outputs["updated"] = 0.0 if self._skip else float(strategy.step())
        self.num_completed_steps = step
        mark("hooks after the step", step)
        runner.call_hook("after_train_iter", **hook_args, outputs=outputs)
        self._iter += 1

    def _after_epoch(self) -> None:
        # MMEngine's hooks see the epoch that has just ended, while iter counts its last step.
        self._ending_epoch = (self._iter - 1) // len(self.dataloader)
        self.runner.call_hook("after_train_epoch")
        self._ending_epoch = None

    def _validation_is_due(self) -> bool:
        if self.runner.val_loop is None or self._iter < self.val_begin or self.val_interval == 0:
            return False
        if self.val_interval is None:
            return self._iter % len(self.dataloader) == 0 or self._iter == self.max_iters
        return self._iter % self.val_interval == 0 or self._iter == self.max_iters


class _StepTotals:
    """Sums over the micro-batches of one step; read from the device once, in ``summary``."""

    def __init__(self) -> None:
        self.loss_sum: Any = 0.0
        self.num_units = 0.0
        self.num_tokens = 0
        self.metrics: dict[str, list[Any]] = {}

    def add(self, batch: Batch, output: LossOutput) -> None:
        self.loss_sum = self.loss_sum + output.loss_sum.detach()
        self.num_units += float(output.num_units)
        self.num_tokens += int(batch.get("num_tokens", 0))
        for name, value in output.metrics.items():
            total, count = value if isinstance(value, tuple) else (value, output.num_units)
            entry = self.metrics.setdefault(name, [0.0, 0.0])
            entry[0], entry[1] = entry[0] + total, entry[1] + count

    def summary(self, expected_units: float, ranks: Ranks) -> dict[str, float]:
        """The step's figures over all ranks; a rank may know metrics that another has not."""
        values = {"loss": float(self.loss_sum), "units": self.num_units, "tokens": self.num_tokens}
        for name, (total, count) in self.metrics.items():
            values |= {f"total:{name}": float(total), f"count:{name}": float(count)}
        values = ranks.sum_each(values)
        num_units = values["units"]
        if abs(num_units - expected_units) > 1e-3 * max(1.0, expected_units):
            raise RuntimeError(
                f"the method's count_units said {expected_units:g} units for this step, its "
                "forward returned "
                f"{num_units:g}; the loss would be scaled wrongly. Make both count the same."
            )
        divisor = max(num_units, 1.0)
        outputs = {
            "loss": values["loss"] / divisor,
            "num_units": num_units,
            "num_tokens": values["tokens"],
        }
        for name in [key.removeprefix("total:") for key in values if key.startswith("total:")]:
            total, count = values[f"total:{name}"], values[f"count:{name}"]
            if count > 0:  # else the step says nothing about it, as of a source it has no token of
                outputs[name] = total / count
                if name.startswith("loss/"):
                    outputs["units/" + name.removeprefix("loss/")] = count
        return outputs


class EvalLoop:
    """One pass over a data set without gradients, in its own order; metrics over all of it.

    Args:
        runner: the runner that owns the parts.
        dataloader: the data.
        evaluator: metrics, or their configs; MeanLoss is always among them.

    Raises:
        TypeError: the evaluator holds something that is no metric of this loop's kind.
    """

    stage = ""
    always: tuple[str, ...] = ("MeanLoss",)
    """Metrics that are there without being named."""

    def __init__(self, runner: Runner, dataloader: StepDataLoader, evaluator: Any = None) -> None:
        self.runner = runner
        self.dataloader = dataloader
        configs = (
            evaluator if isinstance(evaluator, (list, tuple)) else [evaluator] if evaluator else []
        )
        configs = [*(dict(type=name) for name in self.always), *configs]
        self.metrics: list[Metric] = [METRICS.build(cfg) for cfg in configs]
        for metric in self.metrics:
            self._check_metric(metric)

    def _check_metric(self, metric: Any) -> None:
        """Raises TypeError, which says what to do, for a metric that this loop cannot feed."""
        if not isinstance(metric, Metric):
            raise TypeError(
                f"{self.stage}_evaluator holds a {type(metric).__name__}; a metric must "
                "subclass xtuner_lite.engine.metrics.Metric (MMEngine's have another contract)"
            )
        if isinstance(metric, ReplyMetric):
            raise TypeError(
                f"{self.stage}_evaluator holds a {type(metric).__name__}, which scores replies; "
                f"{self.stage}_dataloader.dataset must be a set of questions (QuestionDataset, "
                "MMBenchDataset, RefCOCODataset)"
            )

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """Evaluate; returns what it also gives to the hooks, e.g. {'loss': 1.23}."""
        runner, stage = self.runner, self.stage
        runner.call_hook(f"before_{stage}")
        runner.call_hook(f"before_{stage}_epoch")
        runner.model.eval()
        for metric in self.metrics:
            metric.reset()
        self._take_in_all()
        results: dict[str, float] = {}
        runner.mark(f"sums of {stage}", runner.iter)
        for metric in self.metrics:
            for names in runner.strategy.ranks.gather(list(metric.sums)):
                for name in names:  # a sum that only another rank has
                    metric.sums.setdefault(name, 0.0)
            results.update(metric.compute(runner.strategy.sum_over_ranks))
        runner.call_hook(f"after_{stage}_epoch", metrics=results)
        runner.call_hook(f"after_{stage}")
        return results

    def _take_in_all(self) -> None:
        """Runs the model over the data and feeds the metrics."""
        runner, stage = self.runner, self.stage
        for index, batch in enumerate(self._batches()):
            runner.call_hook(f"before_{stage}_iter", batch_idx=index, data_batch=batch)
            runner.mark(f"{stage} batch {index}", runner.iter)
            output = runner.strategy.forward(move_batch(batch, runner.strategy.device))
            for metric in self.metrics:
                metric.update(batch, output)
            runner.call_hook(
                f"after_{stage}_iter", batch_idx=index, data_batch=batch, outputs=[output]
            )

    def _batches(self) -> Iterator[Batch]:
        for micro_batches in self.dataloader:
            yield from micro_batches


@LOOPS.register_module()
class ValLoop(EvalLoop):
    """Validation: hooks see the ``val`` stages. The ``val_cfg`` section."""

    stage = "val"


@LOOPS.register_module()
class TestLoop(EvalLoop):
    """Test: hooks see the ``test`` stages. The ``test_cfg`` section."""

    __test__ = False  # pytest: no test class
    stage = "test"


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``, those of its images too; the rest as it is."""

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device, non_blocking=True)
        if isinstance(value, dict):
            return {key: moved(part) for key, part in value.items()}
        return value

    return {key: moved(value) for key, value in batch.items()}
