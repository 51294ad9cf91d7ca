"""Which parameters train: by patterns on their names."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn


def freeze_parameters(
    model: nn.Module, *, freeze: Sequence[str] = (), train_only: Sequence[str] = ()
) -> None:
    """Freezes what a pattern of ``freeze`` matches, or all that no pattern of ``train_only`` does.

    A pattern is a part of a parameter's name ('embed_tokens', 'layers.0.'), or the whole name with
    wildcards ('*.layers.?.mlp.*'); each must match something that would train otherwise. Tied
    weights go by either name.

    Args:
        model: changed in place. What is frozen already stays so.
        freeze: patterns of what does not train.
        train_only: patterns of what alone trains.

    Raises:
        ValueError: both are given, a pattern matches nothing, or nothing is left to train.
    """
    if freeze and train_only:
        raise ValueError("freeze and train_only are both given; one of them says what trains")
    patterns = list(freeze or train_only)
    if not patterns:
        return
    # A tied weight has several names; it is what any of them says.
    named = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    unused = [p for p in patterns if not any(_matches(p, name) for name, _ in named)]
    if unused:
        raise ValueError(
            f"{'freeze' if freeze else 'train_only'} {unused} match no trainable parameter; names "
            f"look like {[name for name, _ in named[:3]]}: correct the pattern or drop it"
        )
    matched = {id(p) for name, p in named if any(_matches(pattern, name) for pattern in patterns)}
    for _, parameter in named:
        parameter.requires_grad_((id(parameter) in matched) != bool(freeze))
    if not any(p.requires_grad for _, p in named):
        raise ValueError(f"freeze {patterns} leaves nothing to train; drop a pattern")


def _matches(pattern: str, name: str) -> bool:
    has_wildcard = any(sign in pattern for sign in "*?[")
    return fnmatch.fnmatchcase(name, pattern) if has_wildcard else pattern in name
