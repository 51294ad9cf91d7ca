"""A check before the first step: our way to the logits gives the model's own logits."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from xtuner_lite.models.image_inputs import (
    image_token_id,
    is_image_text,
    join_images,
    plain_inputs,
    segment_lengths,
    split_images,
)
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
    Where the batch has images, the two samples have theirs, and are whole.

    Args:
        llm: the model, or the PeftModel around it.
        batch: the first two segments' first 8 tokens are used; with images, the two shortest
            segments that have some.
        head: 'chunked' or 'model', as in SupervisedFinetune.

    Raises:
        RuntimeError: they differ by more than rounding explains.
    """
    base = unwrap_adapter(llm)
    samples, images = _two_samples(base, batch)
    lengths = torch.tensor([0] + [len(s) for s in samples])
    cu_seqlens = lengths.cumsum(0).int().to(samples[0].device)
    input_ids = torch.cat(samples).unsqueeze(0)
    positions = torch.cat([torch.arange(len(s), device=s.device) for s in samples]).unsqueeze(0)
    together = join_images(base, *images) if images else None
    inputs = (input_ids, positions, cu_seqlens)
    with evaluating(llm):
        if head == "model":
            at = torch.arange(input_ids.shape[1], device=input_ids.device)
            packed = model_logits(llm, *inputs, at, together).float()
        else:
            hidden = packed_hidden_states(llm, *inputs, together)
            packed = language_model_head(llm)(hidden[0])
        alone = [_own_logits(base, *sample) for sample in zip(samples, images or (None, None))]
    differences = [
        _relative_difference(ours, own)
        for ours, own in zip(packed.split([len(s) for s in samples]), alone, strict=True)
    ]
    allowed = _allowed_difference(llm, samples[0].device)
    loader = "load_image_text_model" if is_image_text(base) else "load_causal_lm"
    if differences[0] > allowed:
        advice = f"use head='model', and attn='sdpa' in {loader}"
        if images is not None and head == "model":
            advice = (
                "models that read a prompt in both directions (PaliGemma) or place images by rules "
                "of their own cannot be trained here; take one of another family"
            )
        raise RuntimeError(
            f"{type(base).__name__}: logits of the first sample differ from the model's own by "
            f"{differences[0]:.1%} (allowed {allowed:.1%}), so its forward does something that "
            f"head={head!r} does not; {advice}"
        )
    if differences[1] > allowed:
        raise RuntimeError(
            f"{type(base).__name__}: packed samples see each other: logits of the second sample "
            f"differ by {differences[1]:.1%} from those it has alone (allowed {allowed:.1%}); use "
            f"attn='sdpa' or 'eager' in {loader}, or packing='none' with batch_size=1"
        )


def _own_logits(base: nn.Module, sample: Tensor, images: dict[str, Tensor] | None) -> Tensor:
    """The model's own logits of one sample int64 [t], float32 [t, V]."""
    inputs = {"input_ids": sample.unsqueeze(0)}
    if images is not None:
        inputs = plain_inputs(base, inputs["input_ids"], images)
    return base(**inputs, use_cache=False).logits[0].float()


def _two_samples(
    base: nn.Module, batch: Batch
) -> tuple[list[Tensor], list[dict[str, Tensor]] | None]:
    """Two int64 [t] samples out of the batch, the same one twice if need be, and their images.

    With images both have some: then every rank runs the encoder as often, which sharding needs.
    """
    tokens = batch["input_ids"].reshape(-1)
    if images := batch.get("images"):
        lengths = [length for length in segment_lengths(batch["cu_seqlens"]) if length]
        segments = list(tokens.split(lengths))
        parts = split_images(base, segments, images)
        if parts is None:
            raise RuntimeError(
                f"{type(base).__name__}: cannot tell which images belong to which sample of a "
                f"batch (their inputs: { {k: list(v.shape) for k, v in images.items()} }), so the "
                "check before the first step is impossible; self_check=False in the model section "
                "leaves it out, if you know that packed samples do not see each other in this model"
            )
        token = image_token_id(base)
        seeing = [i for i, segment in enumerate(segments) if bool((segment == token).any())]
        if seeing:
            seeing.sort(key=lambda i: len(segments[i]))
            first, second = seeing[0], seeing[min(1, len(seeing) - 1)]
            # One token shorter, so that images stand at other places in it: masks that are looked
            # up at the first sample's places would go unnoticed between equal samples.
            start = int(segments[second][0] != token)
            return [segments[first], segments[second][start:]], [parts[first], parts[second]]
    borders = batch["cu_seqlens"].tolist()
    found = [
        tokens[start : min(end, start + _CHECKED_TOKENS)]
        for start, end in pairwise(borders[:3])
        if end > start
    ]
    return [found[0], found[-1]], None


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
