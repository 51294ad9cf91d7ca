"""The two halves of a causal language model: its decoder on packed samples, and its head.

Training methods call the halves themselves, because between them lies the choice of positions: the
head, whose output is the largest tensor of a step, is needed on supervised positions only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xtuner_lite.models.attention import PACKED_SDPA, no_packing_mask, segment_kwargs
from xtuner_lite.models.image_inputs import is_image_text, packed_inputs, rope_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Model types whose ``logits_scaling`` multiplies; all others that have one divide by it.
_MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)

#: Image-text model types that hand further arguments to their language model's attention, and to
#: nothing else, and whose language model attends causally.
_HANDS_SEGMENTS_ON = (
    "idefics3", "internvl", "llava", "llava_mlp", "llava_onevision", "mistral3", "smolvlm",
)  # fmt: skip


def unwrap_adapter(llm: nn.Module) -> PreTrainedModel:
    """The transformers model itself, adapter layers inside it, of a model or a PeftModel."""
    return llm.get_base_model() if hasattr(llm, "peft_config") else llm


def takes_segments(llm: nn.Module) -> bool:
    """Whether the model's attention takes segment borders instead of a [T, T] mask."""
    config = unwrap_adapter(llm).config
    if is_image_text(unwrap_adapter(llm)) and config.model_type not in _HANDS_SEGMENTS_ON:
        return False
    implementation = config.get_text_config()._attn_implementation or ""
    return implementation == PACKED_SDPA or "flash_attention" in implementation


def hands_segments_on(model_type: str) -> bool:
    """Whether an image-text model of that type hands segment borders to its language model."""
    return model_type in _HANDS_SEGMENTS_ON


def packed_hidden_states(
    llm: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    images: dict[str, Tensor] | None = None,
) -> Tensor:
    """Last hidden states, float [B, T, H], after the final norm; segments do not see each other.

    Args:
        llm: a transformers causal language model or image-text model, or a PeftModel around one.
        input_ids: int64 [B, T].
        position_ids: int64 [B, T], restarting at 0 on every segment.
        cu_seqlens: int32 [S + 1], segment borders in the flattened [B * T] tokens.
        images: model inputs of the batch's images, in the order of their tokens; None: no images.
    """
    base = unwrap_adapter(llm)
    body = base.get_decoder() if images is None else base.base_model
    borders = segment_kwargs(cu_seqlens) if takes_segments(llm) else None
    inputs = _inputs(base, input_ids, position_ids, cu_seqlens, images, one_row=borders is not None)
    if borders is None:
        # Without an attention mask transformers isolates segments by their restarting position_ids.
        return body(**inputs, use_cache=False).last_hidden_state
    with no_packing_mask(borders["max_length_q"]):
        out = body(**inputs, use_cache=False, **borders)
    return out.last_hidden_state.reshape(*input_ids.shape, -1)


def _inputs(
    base: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    images: dict[str, Tensor] | None,
    *,
    one_row: bool,
) -> dict[str, Any]:
    """Token ids, positions and images for the model; ``one_row``: as one row [1, B * T]."""
    if one_row:
        input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
    if images is not None:
        return packed_inputs(base, input_ids, position_ids, cu_seqlens, images)
    positions = rope_positions(base, input_ids, position_ids, cu_seqlens, None)
    return {"input_ids": input_ids, "position_ids": positions}


@dataclass
class Head:
    """The language model head: hidden states float [N, H] -> logits float32 [N, V]."""

    module: nn.Module
    postprocess: Callable[[Tensor], Tensor]

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.postprocess(self.module(hidden).float())

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters of the head that want a gradient (none under plain LoRA)."""
        return [p for p in self.module.parameters() if p.requires_grad]


def language_model_head(llm: nn.Module) -> Head:
    """The head of a causal language model with what its ``forward`` does to the logits.

    Raises:
        ValueError: the model has no output embeddings.
    """
    base = unwrap_adapter(llm)
    module = base.get_output_embeddings()
    if module is None:
        raise ValueError(
            f"{type(base).__name__} has no output embeddings, so its head cannot run on chosen "
            "positions; use head='model', which goes through the model's own forward"
        )
    return Head(module, _logits_postprocess(base))


def _logits_postprocess(base: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """What the model's forward does between head and logits, read from its config."""
    config = base.config.get_text_config()
    scale = 1.0
    if (value := getattr(config, "logit_scale", None)) is not None:  # Cohere
        scale *= value
    if (value := getattr(config, "logits_scaling", None)) is not None:  # Granite, MiniCPM
        multiplies = config.model_type.startswith(_MULTIPLIES_BY_LOGITS_SCALING)
        scale *= value if multiplies else 1.0 / value
    if (value := getattr(config, "lm_head_multiplier", None)) is not None:  # Falcon-H1
        scale *= value
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma

    def postprocess(logits: Tensor) -> Tensor:
        if scale != 1.0:
            logits = logits * scale
        return torch.tanh(logits / cap) * cap if cap is not None else logits

    return postprocess


def model_logits(
    llm: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    at: Tensor,
    images: dict[str, Tensor] | None = None,
) -> Tensor:
    """Logits of chosen positions through the model's own forward, float [N, V].

    Args:
        llm: a transformers causal language model or image-text model, or a PeftModel around one.
        input_ids: int64 [B, T].
        position_ids: int64 [B, T], restarting at 0 on every segment.
        cu_seqlens: int32 [S + 1], segment borders in the flattened [B * T] tokens.
        at: int64 [N], positions in the flattened [B * T] tokens.
        images: as for packed_hidden_states.
    """
    base = unwrap_adapter(llm)
    inputs = _inputs(base, input_ids, position_ids, cu_seqlens, images, one_row=True)
    inputs |= {"use_cache": False, "logits_to_keep": at}
    if not takes_segments(llm):
        return base(**inputs).logits[0]
    segments = segment_kwargs(cu_seqlens)
    with no_packing_mask(segments["max_length_q"]):
        return base(**inputs, **segments).logits[0]
