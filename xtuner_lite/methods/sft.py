"""Supervised fine-tuning: learn to say the supervised tokens of each sample."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from xtuner_lite.methods.base import TrainingMethod
from xtuner_lite.methods.functional import (
    chunked_head_loss,
    count_target_tokens,
    drop_unsupervised_segments,
    find_targets,
    loss_of_sources,
    token_cross_entropy,
)
from xtuner_lite.methods.self_check import check_packed_forward
from xtuner_lite.models.adapters import without_input_casts
from xtuner_lite.models.image_inputs import image_token_id
from xtuner_lite.models.packed_forward import (
    language_model_head,
    model_logits,
    packed_hidden_states,
    takes_segments,
    unwrap_adapter,
)
from xtuner_lite.registry import MODELS
from xtuner_lite.structures import Batch, LossOutput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@MODELS.register_module()
class SupervisedFinetune(TrainingMethod):
    """Next-token cross entropy on supervised tokens, for full and adapter fine-tuning.

    The language model head runs on supervised positions only, in chunks; packed samples never see
    each other; segments that teach nothing (padding) are not computed. Another loss is a subclass
    that overrides ``token_loss``.

    Args:
        llm: a transformers causal language model or ``dict(type=load_causal_lm, path=...)``.
        tokenizer: the tokenizer of the run (injected by the Runner).
        lora: a peft config of any adapter type; None trains the model itself.
        freeze: patterns of parameters that do not train ('embed_tokens', '*.layers.0.*').
        train_only: patterns of the parameters that alone train; not with ``freeze``.
        activation_checkpointing: keep no activations inside layers, recompute them in backward.
        head: 'chunked' runs the head on chunks of supervised positions; 'model' goes through the
            model's own forward, for architectures whose head does something of its own.
        head_chunk_tokens: supervised tokens per chunk of the head. Default 512: measured fastest
            on CPU, and 100 MB of fp32 logits at a vocabulary of 49,152.
        self_check: before the first training step, compare this way of computing logits with the
            model's own forward on two short samples. Default True; costs two tiny forward passes.

    Raises:
        ValueError: ``head`` is neither of the two, and those of TrainingMethod.
    """

    def __init__(
        self,
        llm: nn.Module | dict[str, Any],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        lora: Any | None = None,
        freeze: Sequence[str] = (),
        train_only: Sequence[str] = (),
        activation_checkpointing: bool = False,
        head: Literal["chunked", "model"] = "chunked",
        head_chunk_tokens: int = 512,
        self_check: bool = True,
    ) -> None:
        super().__init__(
            llm, tokenizer=tokenizer, lora=lora, freeze=freeze, train_only=train_only,
            activation_checkpointing=activation_checkpointing,
        )  # fmt: skip
        if head not in ("chunked", "model"):
            raise ValueError(f"head is {head!r}; allowed: 'chunked', 'model'")
        if head_chunk_tokens < 1:
            raise ValueError(
                f"head_chunk_tokens is {head_chunk_tokens}; it must be at least 1 token"
            )
        self.head = head
        self.head_chunk_tokens = head_chunk_tokens
        self._wants_self_check = self_check

    def token_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each token, float32 [N], in nats; override for another loss.

        Args:
            logits: float32 [N, V].
            targets: int64 [N].
        """
        return token_cross_entropy(logits, targets)

    def count_units(self, batch: Batch) -> float:
        """Supervised target tokens of the batch, each counted by its loss weight."""
        return count_target_tokens(batch)

    def forward(self, batch: Batch) -> LossOutput:
        """Token losses of one micro-batch, summed over its supervised targets.

        A micro-batch without any target gives loss 0 and zero gradients for every trainable
        parameter, so that ranks stay in step. Metrics: token_accuracy, the share of targets that
        had the highest logit; in a mixture loss/<source>, the loss of each data set.
        """
        if self._wants_self_check and self.training:
            self._wants_self_check = False
            check_packed_forward(self.llm, batch, head=self.head)
        num_units = self.count_units(batch)
        if takes_segments(self.llm):
            batch = drop_unsupervised_segments(batch, _image_token_of(self.llm, batch))
        at, targets, weights = find_targets(batch["labels"], batch.get("loss_weights"))
        num_targets = len(targets)
        if num_targets == 0:  # one token of weight 0: zero gradients through the usual path
            at = torch.zeros(1, dtype=torch.int64, device=batch["labels"].device)
            targets, weights = batch["input_ids"].reshape(-1)[:1], at.float()
        # A checkpointed layer is computed again outside this block and must find the same casts.
        casts = nullcontext() if self.activation_checkpointing else without_input_casts(self.llm)
        with casts:
            hidden, head, head_parameters = self._hidden_states_and_head(batch, at)
        names = batch.get("source_names", ())
        token_losses = at.new_empty(len(targets), dtype=torch.float32) if names else None
        loss_sum, num_correct = chunked_head_loss(
            hidden,
            head,
            targets,
            head_parameters=head_parameters,
            weights=weights,
            token_loss=self.token_loss,
            chunk_tokens=self.head_chunk_tokens,
            token_losses=token_losses,
        )
        correct = num_correct if num_targets else torch.zeros_like(num_correct)
        metrics: dict[str, Any] = {"token_accuracy": (correct, num_targets)}
        if token_losses is not None:
            sums, counts = loss_of_sources(token_losses, at, weights, batch, len(names))
            metrics |= {f"loss/{n}": pair for n, pair in zip(names, zip(sums, counts))}
        return LossOutput(loss_sum, num_units, metrics)

    def _hidden_states_and_head(self, batch: Batch, at: Tensor) -> tuple[Tensor, Any, list]:
        """What predicts the targets at ``at``, [N, H or V], how logits come of it, what trains."""
        inputs = (batch["input_ids"], batch["position_ids"], batch["cu_seqlens"])
        images = batch.get("images")
        if self.head == "model":
            return model_logits(self.llm, *inputs, at, images), Tensor.float, []
        head = language_model_head(self.llm)
        hidden = packed_hidden_states(self.llm, *inputs, images)
        return hidden.flatten(0, 1)[at], head, head.trainable_parameters()


def _image_token_of(llm: nn.Module, batch: Batch) -> int | None:
    """Id of the image token, where the batch has images."""
    return image_token_id(unwrap_adapter(llm)) if batch.get("images") else None
