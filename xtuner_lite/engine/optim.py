"""The optimizer of a run: parameter groups by pattern, and the wrapper that hooks read."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from xtuner_lite.registry import OPTIMIZERS

_NORM_NAMES = ("norm", "ln_", "layernorm")
_PARAMWISE_KEYS = ("custom_keys", "bias_lr_mult", "bias_decay_mult", "norm_decay_mult")
_CUSTOM_KEYS = ("lr", "weight_decay", "lr_mult", "decay_mult")


class OptimWrapper:
    """The ``optim_wrapper`` section of a config, and the optimizer built from it.

    Args:
        optimizer: config of the optimizer, e.g. dict(type=AdamW, lr=2e-4); lr is per optimizer
            step.
        clip_grad: dict(max_norm=..., norm_type=2.0): the total gradient norm is cut to max_norm
            before
            each update. None only measures it.
        accumulative_counts: micro-batches in one optimizer step.
        dtype: compute dtype, 'bf16', 'fp16', 'fp32' or 'auto' (default): bf16 where the device
            computes
            it natively, else fp16 on a GPU and fp32 on a CPU; the log says which and why.
        loss_scale: fp16 only; 'dynamic' or a number.
        paramwise_cfg: learning rate and weight decay by parameter name, see ``build_param_groups``.

    Raises:
        ValueError: a count below 1, an unknown key in clip_grad.
    """

    def __init__(
        self,
        optimizer: dict[str, Any],
        *,
        clip_grad: dict[str, Any] | None = None,
        accumulative_counts: int = 1,
        dtype: str = "auto",
        loss_scale: str | float = "dynamic",
        paramwise_cfg: dict[str, Any] | None = None,
    ) -> None:
        if accumulative_counts < 1:
            raise ValueError(
                f"accumulative_counts is {accumulative_counts}; it counts micro-batches and must "
                "be >= 1"
            )
        if clip_grad is not None and not {"max_norm"} <= set(clip_grad) <= {
            "max_norm",
            "norm_type",
        }:
            raise ValueError(
                f"optim_wrapper.clip_grad is {dict(clip_grad)}; it takes max_norm and, if "
                "wanted, norm_type"
            )
        self.optimizer_cfg = optimizer
        self.clip_grad = clip_grad
        self.accumulative_counts = accumulative_counts
        self.dtype = dtype
        self.loss_scale = loss_scale
        self.paramwise_cfg = paramwise_cfg
        self.optimizer: Optimizer | None = None

    def build(self, model: nn.Module) -> Optimizer:
        """Build the optimizer over the trainable parameters of ``model``.

        Raises:
            ValueError: nothing is trainable, or a pattern of paramwise_cfg matches nothing.
        """
        cfg = dict(self.optimizer_cfg)
        groups = build_param_groups(
            model,
            lr=cfg.get("lr"),
            weight_decay=cfg.get("weight_decay"),
            paramwise_cfg=self.paramwise_cfg,
        )
        self.optimizer = OPTIMIZERS.build({**cfg, "params": groups})
        return self.optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups; each carries ``param_names`` beside ``params``."""
        return self.optimizer.param_groups

    def get_lr(self) -> dict[str, list[float]]:
        """{'lr': one learning rate per parameter group}."""
        return {"lr": [group["lr"] for group in self.param_groups]}

    def get_momentum(self) -> dict[str, list[float]]:
        """{'momentum': first-moment coefficient per parameter group}."""
        return {
            "momentum": [g.get("momentum", g.get("betas", (0.0,))[0]) for g in self.param_groups]
        }


def build_param_groups(
    model: nn.Module,
    *,
    lr: float | None,
    weight_decay: float | None,
    paramwise_cfg: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Group the trainable parameters by their learning rate and weight decay.

    Args:
        model: its parameters with requires_grad are taken, each once.
        lr, weight_decay: the base values; None leaves the optimizer's default.
        paramwise_cfg: MMEngine's keys: ``custom_keys`` {pattern: dict(lr_mult=, decay_mult=, lr=,
            weight_decay=)}, where a pattern is a part of the parameter's name or a wildcard with
            '*',
            and the longest match wins; ``bias_lr_mult``, ``bias_decay_mult``, ``norm_decay_mult``.

    Returns:
        list of groups, each with ``params``, ``param_names`` and the values that differ from the
        base.

    Raises:
        ValueError: nothing is trainable; an unknown key; a pattern that matches no trainable
            parameter.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(
            "no parameter of the model is trainable; give the model a `lora=...`, or unfreeze a "
            "part of it"
        )
    paramwise = dict(paramwise_cfg or {})
    _refuse_unknown(paramwise, _PARAMWISE_KEYS, "optim_wrapper.paramwise_cfg")
    custom = {pattern: dict(rule) for pattern, rule in (paramwise.get("custom_keys") or {}).items()}
    for pattern, rule in custom.items():
        _refuse_unknown(rule, _CUSTOM_KEYS, f"optim_wrapper.paramwise_cfg.custom_keys[{pattern!r}]")
    unused = set(custom)
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter in named:
        matches = sorted((p for p in custom if _matches(p, name)), key=lambda p: (-len(p), p))
        unused -= set(matches)
        values = _values_for(
            name, custom[matches[0]] if matches else None, paramwise, lr, weight_decay
        )
        group = groups.setdefault(
            tuple(sorted(values.items())), {**values, "params": [], "param_names": []}
        )
        group["params"].append(parameter)
        group["param_names"].append(name)
    if unused:
        raise ValueError(
            f"paramwise_cfg.custom_keys {sorted(unused)} match no trainable parameter; names "
            "look like "
            f"{[name for name, _ in named[:3]]}. Correct the pattern or drop it."
        )
    return list(groups.values())


def _refuse_unknown(given: dict, allowed: Iterable[str], where: str) -> None:
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise ValueError(f"{where} has unknown keys {unknown}; allowed: {', '.join(allowed)}")


def _matches(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) if "*" in pattern else pattern in name


def _values_for(
    name: str,
    rule: dict[str, Any] | None,
    paramwise: dict[str, Any],
    lr: float | None,
    weight_decay: float | None,
) -> dict[str, float]:
    values: dict[str, float] = {}
    if lr is not None:
        values["lr"] = lr
    if weight_decay is not None:
        values["weight_decay"] = weight_decay
    if rule is not None:  # a custom rule is the whole truth for its parameters, as in MMEngine
        if "lr_mult" in rule:
            values["lr"] = lr * rule["lr_mult"]
        if "decay_mult" in rule:
            values["weight_decay"] = (weight_decay or 0.0) * rule["decay_mult"]
        return {**values, **{key: rule[key] for key in ("lr", "weight_decay") if key in rule}}
    module_name, _, leaf = name.rpartition(".")
    is_norm = any(part in module_name.rpartition(".")[2].lower() for part in _NORM_NAMES)
    if leaf == "bias" and "bias_lr_mult" in paramwise:
        values["lr"] = lr * paramwise["bias_lr_mult"]
    if is_norm and "norm_decay_mult" in paramwise:
        values["weight_decay"] = (weight_decay or 0.0) * paramwise["norm_decay_mult"]
    elif leaf == "bias" and "bias_decay_mult" in paramwise:
        values["weight_decay"] = (weight_decay or 0.0) * paramwise["bias_decay_mult"]
    return values


def total_grad_norm(parameters: Iterable[nn.Parameter], norm_type: float = 2.0) -> Tensor:
    """float32 scalar: the norm of all gradients taken together; 0 where there is none."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    return torch.nn.utils.get_total_norm(grads, norm_type)
