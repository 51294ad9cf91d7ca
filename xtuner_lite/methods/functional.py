"""Loss functions of the training methods, as plain functions of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from xtuner_lite.structures import IGNORE_INDEX, Batch

#: logits float32 [N, V], targets int64 [N] -> loss float32 [N], in nats.
TokenLoss = Callable[[Tensor, Tensor], Tensor]


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target, float32 [N], in nats.

    Args:
        logits: float32 [N, V].
        targets: int64 [N].
    """
    return cross_entropy(logits, targets, reduction="none")


def count_target_tokens(batch: Batch) -> float:
    """Number of supervised targets of a batch, each counted by its loss weight.

    The first column is left out: no position predicts it.
    """
    supervised = batch["labels"][:, 1:] != IGNORE_INDEX
    if (weights := batch.get("loss_weights")) is not None:
        return float(weights[:, 1:][supervised].double().sum())
    return float(supervised.sum())


def find_targets(
    labels: Tensor, loss_weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where a batch teaches, and what.

    Args:
        labels: int64 [B, T], not shifted; IGNORE_INDEX where nothing is learnt and on every
            segment's first token.
        loss_weights: float32 [B, T] or None, weight of each label.

    Returns:
        positions: int64 [N], indices into the flattened [B * T] tokens; position p predicts the
            label of p + 1.
        targets: int64 [N], those labels.
        weights: float32 [N] or None.
    """
    flat = labels.reshape(-1)
    learnt = labels != IGNORE_INDEX
    learnt[:, 0] = False  # the token before it belongs to another row
    at = learnt.reshape(-1).nonzero().squeeze(-1)
    weights = None if loss_weights is None else loss_weights.reshape(-1)[at].float()
    return at - 1, flat[at], weights


def drop_unsupervised_segments(batch: Batch, image_token_id: int | None = None) -> Batch:
    """The batch as one row [1, N] of the segments that hold at least one label.

    Segments do not see each other, so a segment without labels (padding is one) changes neither
    loss nor gradient and only costs time. A batch without any label keeps its first segment.

    Args:
        batch: any batch.
        image_token_id: segments with this token stay too: the batch's images have no other place.
    """
    labels = batch["labels"].reshape(-1)
    borders = batch["cu_seqlens"].to(labels.device, torch.int64)
    needed = labels != IGNORE_INDEX
    if image_token_id is not None:
        needed |= batch["input_ids"].reshape(-1) == image_token_id
    # before[i] of these lie before token i; a segment holds before[end] - before[start] of them.
    before = torch.nn.functional.pad(needed.cumsum(0), (1, 0))
    keep = (before[borders[1:]] - before[borders[:-1]]) > 0
    if not bool(keep.any()):
        keep[0] = True
    lengths = borders.diff()
    row: Batch = {"cu_seqlens": torch.nn.functional.pad(lengths[keep].cumsum(0), (1, 0)).int()}
    chosen = None if bool(keep.all()) else keep.repeat_interleave(lengths).nonzero().squeeze(-1)
    for name in ("input_ids", "labels", "position_ids", "loss_weights"):
        if (value := batch.get(name)) is not None:
            flat = value.reshape(-1)
            row[name] = (flat if chosen is None else flat[chosen]).unsqueeze(0)
    if (sources := batch.get("segment_sources")) is not None:
        row["segment_sources"] = sources[keep.to(sources.device)]
        row["source_names"] = batch["source_names"]
    if (images := batch.get("images")) is not None:
        row["images"] = images
    return row


def loss_of_sources(
    token_losses: Tensor, at: Tensor, weights: Tensor | None, batch: Batch, num_sources: int
) -> tuple[Tensor, Tensor]:
    """Loss and counted targets of each data set that a batch of a mixture holds.

    Args:
        token_losses: float32 [N], loss of each target, in nats, not weighted.
        at: int64 [N], positions of the targets in the flattened tokens, as find_targets gives them.
        weights: float32 [N], weight of each target; None means 1.
        batch: its cu_seqlens int32 [S + 1] and segment_sources int64 [S] are read.
        num_sources: K.

    Returns:
        loss_sums: float32 [K], weighted.
        counts: float32 [K], targets, each counted by its weight.
    """
    borders = batch["cu_seqlens"].to(at.device, torch.int64)
    segment = torch.searchsorted(borders, at, right=True) - 1
    source = batch["segment_sources"].to(at.device)[segment]
    weights = torch.ones_like(token_losses) if weights is None else weights.to(token_losses)
    zeros = torch.zeros(num_sources, dtype=torch.float32, device=at.device)
    return zeros.index_add(0, source, token_losses * weights), zeros.index_add(0, source, weights)


def chunked_head_loss(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    head_parameters: list[nn.Parameter] | None = None,
    weights: Tensor | None = None,
    token_loss: TokenLoss = token_cross_entropy,
    chunk_tokens: int = 512,
    token_losses: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of token losses behind a language model head, without ever holding all logits.

    The gradients are taken chunk by chunk during the forward pass, while the logits of the chunk
    exist; backward only scales them. The peak is chunk_tokens * V logits instead of N * V, and
    nothing is computed twice.

    Args:
        hidden: float [N, H], hidden states of the positions that predict ``targets``.
        head: hidden states float [n, H] -> logits float32 [n, V].
        targets: int64 [N].
        head_parameters: parameters of ``head`` that want a gradient.
        weights: float32 [N], weight of each token's loss; None means 1.
        token_loss: logits float32 [n, V], targets int64 [n] -> float32 [n].
        chunk_tokens: tokens per chunk.
        token_losses: float32 [N] to write the loss of each target into, not weighted; None: not
            wanted.

    Returns:
        loss_sum: float32 scalar with a graph.
        num_correct: int64 scalar, targets that had the highest logit.

    Raises:
        ValueError: hidden and targets differ in length, or chunk_tokens is not positive.
    """
    if len(hidden) != len(targets):
        raise ValueError(
            f"chunked_head_loss got {len(hidden)} hidden states and {len(targets)} targets; "
            "they must be equally many: select the positions that predict the targets first"
        )
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be a positive number of tokens")
    parameters = head_parameters or []
    inputs = (head, token_loss, targets, weights, chunk_tokens, token_losses, hidden, *parameters)
    if torch.is_grad_enabled() and (hidden.requires_grad or parameters):
        return _ChunkedHeadLoss.apply(*inputs)
    with torch.no_grad():
        loss_sum, num_correct, _ = _run_chunks(*inputs, needs_grad=False)
    return loss_sum, num_correct


class _ChunkedHeadLoss(torch.autograd.Function):
    """chunked_head_loss with gradients; see there. Not twice differentiable."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        loss_sum, num_correct, gradients = _run_chunks(*inputs, needs_grad=True)
        ctx.num_plain_inputs = len(inputs) - len(gradients)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(num_correct)
        return loss_sum, num_correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        gradients = [None if g is None else g * grad_loss.to(g.dtype) for g in ctx.saved_tensors]
        return (*[None] * ctx.num_plain_inputs, *gradients)


def _run_chunks(
    head: Callable[[Tensor], Tensor],
    token_loss: TokenLoss,
    targets: Tensor,
    weights: Tensor | None,
    chunk_tokens: int,
    token_losses: Tensor | None,
    hidden: Tensor,
    *parameters: nn.Parameter,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Loss sum, correct targets and d loss_sum / d (hidden, *parameters) (empty without grad)."""
    device = hidden.device
    loss_sum = torch.zeros((), dtype=torch.float32, device=device)
    num_correct = torch.zeros((), dtype=torch.int64, device=device)
    hidden_grad = torch.empty_like(hidden) if needs_grad and hidden.requires_grad else None
    # Sums over chunks in float32, whatever the parameters' own type.
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters] if needs_grad else []
    for start in range(0, len(targets), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        with torch.set_grad_enabled(needs_grad):
            chunk = hidden[part].detach().requires_grad_(hidden_grad is not None)
            logits = head(chunk)
            losses = token_loss(logits, targets[part])
            chunk_loss = (losses if weights is None else losses * weights[part]).sum()
        loss_sum += chunk_loss.detach()
        if token_losses is not None:
            token_losses[part] = losses.detach()
        num_correct += (logits.detach().argmax(-1) == targets[part]).sum()
        if needs_grad:
            wanted = [] if hidden_grad is None else [chunk]
            gradients = list(torch.autograd.grad(chunk_loss, [*wanted, *parameters]))
            if hidden_grad is not None:
                hidden_grad[part] = gradients.pop(0)
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient
    if not needs_grad:
        return loss_sum, num_correct, []
    cast = [s.to(p.dtype) for s, p in zip(sums, parameters, strict=True)]
    return loss_sum, num_correct, [hidden_grad, *cast]
