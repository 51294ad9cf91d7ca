"""Supervised fine-tuning of models that see: any image-text model of transformers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from xtuner_lite.images.vision_inputs import vision_of
from xtuner_lite.methods.base import refuse_quantised_training
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.adapters import add_adapter, build_peft_config
from xtuner_lite.models.image_inputs import plain_inputs
from xtuner_lite.models.image_text_parts import (
    Part,
    all_wanting_gradients,
    find_parts,
    target_part,
    unreached_parameters,
)
from xtuner_lite.models.new_tokens import new_token_ids
from xtuner_lite.registry import MODELS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@MODELS.register_module()
class ImageTextFinetune(SupervisedFinetune):
    """Next-token cross entropy on supervised tokens, for any image-text model of transformers.

    The batch carries the images' inputs; packed samples never see each other's images either.

    Args:
        llm: an image-text model or ``dict(type=load_image_text_model, path=...)``.
        tokenizer: a vision tokenizer, ``dict(type=load_processor, ...)`` (injected by the Runner).
        lora: a peft config; None trains the parts themselves. Without target_modules it goes on
            every linear layer of the parts that are not frozen.
        freeze_llm: leave the language model (and its head) as it is.
        freeze_visual_encoder: leave the vision encoder as it is. Default True: it is large, well
            trained already, and rarely the better for a small data set.
        freeze_projector: leave what lies between the two as it is.
        freeze: patterns of further parameters that do not train.
        train_only: patterns of the parameters that alone train; not with ``freeze``.
        activation_checkpointing: see SupervisedFinetune, like all that follow.

    Raises:
        ValueError: nothing is left to train; the model has no encoder for images; and those of
            SupervisedFinetune.
    """

    def __init__(
        self,
        llm: nn.Module | dict[str, Any],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        lora: Any | None = None,
        freeze_llm: bool = False,
        freeze_visual_encoder: bool = True,
        freeze_projector: bool = False,
        freeze: Sequence[str] = (),
        train_only: Sequence[str] = (),
        activation_checkpointing: bool = False,
        head: Literal["chunked", "model"] = "chunked",
        head_chunk_tokens: int = 512,
        self_check: bool = True,
    ) -> None:
        frozen = {
            "llm": freeze_llm, "visual_encoder": freeze_visual_encoder,
            "projector": freeze_projector,
        }  # fmt: skip
        # Read by _adapted, which runs inside the line after.
        self._trained_parts = [part for part in get_args(Part) if not frozen[part]]
        super().__init__(
            llm, tokenizer=tokenizer, lora=lora, freeze=freeze, train_only=train_only,
            activation_checkpointing=activation_checkpointing, head=head,
            head_chunk_tokens=head_chunk_tokens, self_check=self_check,
        )  # fmt: skip

    def _adapted(self, model: PreTrainedModel, lora: Any | None) -> nn.Module:
        if hasattr(model, "peft_config"):
            raise ValueError(
                "llm has an adapter already; give load_image_text_model no adapter= and continue "
                "the adapter with lora=... and load_from"
            )
        parts = find_parts(model)
        if not self._trained_parts:
            raise ValueError(
                "freeze_llm, freeze_visual_encoder and freeze_projector are all True, which leaves "
                "nothing to train; set one to False"
            )
        unused = self._unused(model) if "visual_encoder" in self._trained_parts else set()
        if lora is not None:
            config = build_peft_config(lora)
            modules = {name.rpartition(".")[0] for name in unused}
            target_part(model, config, self._trained_parts, skip=modules)
            return add_adapter(model, config, new_token_ids=new_token_ids(self.tokenizer))
        if getattr(model, "is_quantized", False):
            refuse_quantised_training()
        # A tied head is one tensor with the embeddings; its first name says the same part.
        for name, parameter in model.named_parameters():
            trains = parts.part_of(name) in self._trained_parts and name not in unused
            parameter.requires_grad_(trains and parameter.is_floating_point())
        return model

    def _unused(self, model: PreTrainedModel) -> set[str]:
        """Names of parameters that no loss depends on; found with the tokenizer's blank image."""
        vision = vision_of(self.tokenizer)
        if vision is None:
            return set()
        ids, images = vision.filler()
        images = {name: value.to(model.device) for name, value in images.items()}
        ids = torch.tensor([ids], device=model.device)
        with all_wanting_gradients(model):
            out = model.base_model(**plain_inputs(model, ids, images), use_cache=False)
            unused = unreached_parameters(model, out.last_hidden_state)
        parts = find_parts(model)
        return {name for name in unused if parts.part_of(name) != "llm"}
