"""A check before the first step: our way to the logits gives the model's own logits."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from xtuner_lite.models.modes import evaluating
from xtuner_lite.models.packed_forward import (
    language_model_head,
    model_logits,
    packed_hidden_states,
    unwrap_adapter,
)
from xtuner_lite.structures import Batch

_CHECKED_TOKENS = 8  # per sample: enough to see a leak, and next to no time


def check_packed_forward(llm: nn.Module, batch: Batch, *, head: str = "chunked") -> None:
    """Compares packed logits of two short samples with the model's own, sample by sample.

    It finds architectures whose forward does something to the logits that we do not, and those in
    which packed samples see each other (convolutions, recurrent states, attention of their own).

    Args:
        llm: the model, or the PeftModel around it.
        batch: the first two segments' first 8 tokens are used.
        head: 'chunked' or 'model', as in SupervisedFinetune.

    Raises:
        RuntimeError: they differ by more than rounding explains.
    """
    samples = _two_samples(batch)
    lengths = torch.tensor([0] + [len(s) for s in samples])
    cu_seqlens = lengths.cumsum(0).int().to(samples[0].device)
    input_ids = torch.cat(samples).unsqueeze(0)
    positions = torch.cat([torch.arange(len(s), device=s.device) for s in samples]).unsqueeze(0)
    base = unwrap_adapter(llm)
    with evaluating(llm):
        if head == "model":
            at = torch.arange(input_ids.shape[1], device=input_ids.device)
            packed = model_logits(llm, input_ids, positions, cu_seqlens, at).float()
        else:
            hidden = packed_hidden_states(llm, input_ids, positions, cu_seqlens)
            packed = language_model_head(llm)(hidden[0])
        alone = [base(input_ids=s.unsqueeze(0), use_cache=False).logits[0].float() for s in samples]
    differences = [
        _relative_difference(ours, own)
        for ours, own in zip(packed.split([len(s) for s in samples]), alone, strict=True)
    ]
    allowed = _allowed_difference(llm, samples[0].device)
    if differences[0] > allowed:
        raise RuntimeError(
            f"{type(base).__name__}: logits of the first sample differ from the model's own by "
            f"{differences[0]:.1%} (allowed {allowed:.1%}), so its forward does something that "
            f"head={head!r} does not; use head='model', and attn='sdpa' in load_causal_lm"
        )
    if differences[1] > allowed:
        raise RuntimeError(
            f"{type(base).__name__}: packed samples see each other: logits of the second sample "
            f"differ by {differences[1]:.1%} from those it has alone (allowed {allowed:.1%}); use "
            "attn='sdpa' or 'eager' in load_causal_lm, or packing='none' with batch_size=1"
        )


def _two_samples(batch: Batch) -> list[Tensor]:
    """Two int64 [t] samples with t <= 8 out of the batch, the first one repeated if need be."""
    tokens = batch["input_ids"].reshape(-1)
    borders = batch["cu_seqlens"].tolist()
    found = [
        tokens[start : min(end, start + _CHECKED_TOKENS)]
        for start, end in pairwise(borders[:3])
        if end > start
    ]
    return [found[0], found[-1]]


def _relative_difference(ours: Tensor, own: Tensor) -> float:
    """|ours - own| / |own - mean(own)|, Euclidean over all logits [t, V]."""
    spread = (own - own.mean(-1, keepdim=True)).norm().clamp_min(1e-6)
    return float((ours - own).norm() / spread)


def _allowed_difference(llm: nn.Module, device: torch.device) -> float:
    """What rounding explains: next to nothing in float32, more in half precision."""
    if getattr(unwrap_adapter(llm), "is_loaded_in_8bit", False):
        return 0.5  # LLM.int8 picks outlier columns over all rows: 0.3 measured on SmolLM2-135M
    is_float32 = all(p.dtype == torch.float32 for p in llm.parameters() if p.is_floating_point())
    return 1e-3 if is_float32 and not torch.is_autocast_enabled(device.type) else 0.1
