"""Reports what trains and what is frozen, and checks that what should train does."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from mmengine.hooks import Hook
from torch import Tensor, nn

from xtuner_lite.registry import HOOKS

_MAX_ROWS = 40


@dataclass
class ParameterGroup:
    """Parameters whose names differ only in layer numbers."""

    pattern: str
    num_tensors: int
    num_params: int
    dtypes: set[str]
    trainable: bool


@HOOKS.register_module()
class TrainabilityReportHook(Hook):
    """Log what is trained and frozen; check that all that should train gets a gradient and moves.

    Acts before training (the table; an error when nothing is trainable), and between backward and
    update and after the update of the first steps. For every trainable parameter it wants to see a
    gradient that is not all zero and then, at the element with the largest gradient, a new value.

    After the first step it warns of parameters without a gradient. The matrices ``lora_A`` are
    expected to have a gradient of zero there while their ``lora_B`` is zero, as LoRA starts. A
    parameter that still has not moved after ``patience`` updates is named in a second warning;
    common reasons are a module that the forward pass never uses, and updates that are lost to
    rounding in bf16 weights. A whole model without a gradient is an error.

    A step that changes nothing by design (learning rate 0 in a warm-up, a skipped step) is not
    counted.

    Args:
        patience: optimizer steps (updates) until the second warning.

    Raises:
        ValueError: nothing is trainable (before training).
        RuntimeError: no trainable parameter got a gradient (first step).
    """

    priority = "HIGH"

    def __init__(self, patience: int = 10) -> None:
        if patience < 1:
            raise ValueError(f"TrainabilityReportHook: patience={patience!r}; use 1 or more")
        self.patience = patience
        self._pending: dict[str, nn.Parameter] = {}
        self._watched: dict[str, tuple[int, float]] = {}  # name -> element, its value before
        self._num_trainable = self._num_updates = 0
        self._first_step = True

    def before_train(self, runner) -> None:
        """Logs the table.

        Raises:
            ValueError: nothing is trainable.
        """
        groups = group_parameters(runner.model.named_parameters())
        runner.logger.info(format_report(groups))
        self._pending = {n: p for n, p in runner.model.named_parameters() if p.requires_grad}
        self._num_trainable, self._num_updates, self._first_step = len(self._pending), 0, True
        if not self._pending:
            raise ValueError(
                "the model has no trainable parameter: all is frozen. Give model a lora=..., or "
                "drop what freezes it (freeze_llm and the like)."
            )

    def before_optimizer_step(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Looks at the gradients; notes an element of each pending parameter and its value.

        Raises:
            RuntimeError: no trainable parameter has a gradient.
        """
        self._watched = {}
        is_finite = math.isfinite(outputs["loss"]) and math.isfinite(outputs.get("grad_norm", 0.0))
        if not self._pending or not is_finite or outputs["num_units"] == 0:
            return  # such a step says nothing; the guard hook decides what becomes of it
        if not runner.strategy.keeps_gradients:
            self._report_norm(runner, outputs["grad_norm"])
            return
        without: list[str] = []
        for name, parameter in self._pending.items():
            element = _largest_gradient(parameter)
            if element is None:
                without.append(name)
            else:
                self._watched[name] = (element, _local(parameter).flatten()[element].item())
        if self._first_step:
            self._first_step = False
            self._report_gradients(runner, without)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Ticks off the parameters that moved."""
        updated = outputs.get("updated", 1.0) and max(runner.optim_wrapper.get_lr()["lr"]) > 0
        if not self._pending or not updated:
            return
        for name, (element, before) in self._watched.items():
            if _local(self._pending[name]).flatten()[element].item() != before:
                del self._pending[name]
        self._num_updates += 1
        if not self._pending:
            runner.logger.info(
                f"all {self._num_trainable} trainable tensors got a gradient and moved "
                f"(after {self._num_updates} update{'s' if self._num_updates > 1 else ''})"
            )
        elif self._num_updates >= self.patience:
            runner.logger.warning(
                f"{len(self._pending)} of {self._num_trainable} trainable tensors have not moved "
                f"in {self._num_updates} updates: {collapse_names(self._pending)}. Freeze them, or "
                "see why the forward pass does not use them; bf16 weights can lose small updates."
            )
            self._pending = {}

    def _report_norm(self, runner, grad_norm: float) -> None:
        """For strategies whose optimizer takes the gradients away: their norm is all there is."""
        if grad_norm == 0:
            self._report_gradients(runner, list(self._pending))
        runner.logger.info(
            f"gradient norm of the first step: {grad_norm:.4g}; which tensors get a gradient and "
            f"move is not looked at under {type(runner.strategy).__name__}"
        )
        self._pending = {}

    def _report_gradients(self, runner, without: list[str]) -> None:
        if len(without) == self._num_trainable:
            raise RuntimeError(
                f"step {runner.iter + 1}: none of the {self._num_trainable} trainable tensors got "
                f"a gradient ({collapse_names(without)}). The loss does not depend on them: look "
                "for a detach() or no_grad in the method, or wrong target_modules of the adapter."
            )
        waiting = [n for n in without if _waits_for_lora_b(n, runner.model)]
        missing = sorted(set(without) - set(waiting))
        if missing:
            runner.logger.warning(
                f"step {runner.iter + 1}: {len(missing)} of {self._num_trainable} trainable "
                f"tensors got no gradient, or only zeros: {collapse_names(missing)}. Nothing in "
                "this step's data reaches them."
            )
        if waiting:
            runner.logger.info(
                f"{len(waiting)} lora_A tensors have a gradient of zero at this step, as they must "
                "while their lora_B is zero; they start moving with the next one"
            )


def group_parameters(named: Iterable[tuple[str, nn.Parameter]]) -> list[ParameterGroup]:
    """Groups parameters by name with every layer number as ``*``, in the model's order."""
    groups: dict[tuple[str, bool], ParameterGroup] = {}
    for name, parameter in named:
        key = (collapse_name(name), parameter.requires_grad)
        group = groups.setdefault(key, ParameterGroup(key[0], 0, 0, set(), key[1]))
        group.num_tensors += 1
        group.num_params += num_elements(parameter)
        group.dtypes.add(_dtype_name(parameter))
    return list(groups.values())


def format_report(groups: list[ParameterGroup]) -> str:
    """The table of trained and frozen parameters as text of several lines."""
    total = sum(g.num_params for g in groups)
    prefix = _common_prefix([g.pattern for g in groups])
    lines = [f"parameters (names under {prefix}):"] if prefix else []
    for title, wanted in (("trained", True), ("frozen", False)):
        chosen = sorted((g for g in groups if g.trainable is wanted), key=lambda g: -g.num_params)
        num_params = sum(g.num_params for g in chosen)
        share = num_params / total if total else 0.0
        num_tensors = sum(g.num_tensors for g in chosen)
        lines.append(f"{title}: {num_params:,} parameters ({share:.2%}) in {num_tensors} tensors")
        rows = [
            (g.pattern[len(prefix) :], f"{g.num_tensors} x", f"{g.num_params:,}", g.dtypes)
            for g in chosen[:_MAX_ROWS]
        ]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        for name, count, size, dtypes in rows:
            lines.append(
                f"    {name:<{widths[0]}}  {count:>{widths[1]}}  {size:>{widths[2]}}  "
                + "/".join(sorted(dtypes))
            )
        if len(chosen) > _MAX_ROWS:
            lines.append(f"    and {len(chosen) - _MAX_ROWS} more patterns")
    return "\n".join(lines)


def _common_prefix(patterns: list[str]) -> str:
    """The modules that all names begin with, 'llm.base_model.', '' for none."""
    parts = [pattern.split(".")[:-1] for pattern in patterns]
    common = []
    for names in zip(*parts):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return "".join(name + "." for name in common)


def collapse_name(name: str) -> str:
    """'model.layers.3.mlp.weight' -> 'model.layers.*.mlp.weight'."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def collapse_names(names: Iterable[str]) -> str:
    """The patterns of some names, each with how often it occurs."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = collapse_name(name)
        counts[pattern] = counts.get(pattern, 0) + 1
    shown = [f"{pattern} ({count})" for pattern, count in list(counts.items())[:10]]
    return ", ".join(shown) + (f" and {len(counts) - 10} more" if len(counts) > 10 else "")


def num_elements(parameter: nn.Parameter) -> int:
    """Elements of a parameter: of the whole one when sharded, of the weights when quantised."""
    if hasattr(parameter, "ds_numel"):  # ZeRO-3 leaves an empty tensor behind
        return parameter.ds_numel
    quant_state = getattr(parameter, "quant_state", None)
    if quant_state is not None:  # bitsandbytes packs two 4-bit weights into a byte
        return quant_state.shape.numel()
    return parameter.numel()


def _dtype_name(parameter: nn.Parameter) -> str:
    quant_state = getattr(parameter, "quant_state", None)
    if quant_state is not None:
        return quant_state.quant_type
    return str(parameter.dtype).removeprefix("torch.")


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, the tensor itself otherwise."""
    to_local = getattr(tensor.detach(), "to_local", None)
    return to_local() if to_local is not None else tensor.detach()


def _largest_gradient(parameter: nn.Parameter) -> int | None:
    """Flat index of the element with the largest gradient, None when all of it is zero or missing.

    Uses argmax and argmin: abs() would need the memory of another gradient.
    """
    if parameter.grad is None:
        return None
    gradient = _local(parameter.grad).flatten()
    if gradient.numel() == 0:
        return None
    both = torch.stack([gradient.argmax(), gradient.argmin()])
    values = gradient[both].abs()
    if not bool(values.max() > 0):
        return None
    return int(both[values.argmax()])


def _waits_for_lora_b(name: str, model: nn.Module) -> bool:
    """Whether this is a LoRA matrix A whose B is still zero, so that its gradient must be zero."""
    if "lora_A" in name:
        other = name.replace("lora_A", "lora_B")
    elif "lora_embedding_A" in name:
        other = name.replace("lora_embedding_A", "lora_embedding_B")
    else:
        return False
    try:
        matrix_b = model.get_parameter(other)
    except AttributeError:
        return False
    return not bool(_local(matrix_b).any())
