"""What every training method is: a module that turns a batch into a sum of losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xtuner_lite.models.adapters import add_adapter
from xtuner_lite.models.freezing import freeze_parameters
from xtuner_lite.models.new_tokens import fit_embeddings, new_token_ids
from xtuner_lite.models.packed_forward import unwrap_adapter
from xtuner_lite.models.streamed_save import SavePlan, plan_save, write_planned
from xtuner_lite.models.weights import (
    load_adapter_weights,
    load_model_weights,
    save_adapter,
    save_model,
)
from xtuner_lite.registry import MODELS
from xtuner_lite.structures import Batch, LossOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PREFIX = "llm."


class TrainingMethod(nn.Module, ABC):
    """A language model with a loss: the base of every training method.

    A subclass defines ``count_units`` and ``forward``; the loop divides the sum that ``forward``
    returns by the units of the whole optimizer step, over all micro-batches and ranks.

    Args:
        llm: a transformers causal language model, or the config of one,
            ``dict(type=load_causal_lm, path=...)``.
        tokenizer: the tokenizer of the run (injected by the Runner). Its stop tokens become the
            ``eos_token_id`` of the saved generation config.
        lora: a peft config, an object or ``dict(type=LoraConfig, ...)``, of any adapter type;
            None trains the model itself.
        freeze: patterns of parameters that do not train, see models.freezing.freeze_parameters.
        train_only: patterns of the parameters that alone train; not with ``freeze``.
        activation_checkpointing: recompute each layer's activations in the backward pass instead
            of keeping them: less memory, about a third more time. Default False.

    Raises:
        TypeError: ``llm`` is neither a module nor a config.
        ValueError: the tokenizer has more tokens than the model has embeddings, or the base is
            quantised and ``lora`` is None; a pattern matches nothing.
    """

    llm: nn.Module
    """A transformers PreTrainedModel, or a PeftModel around one."""

    def __init__(
        self,
        llm: nn.Module | dict[str, Any],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        lora: Any | None = None,
        freeze: Sequence[str] = (),
        train_only: Sequence[str] = (),
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        model = build_llm(llm)
        if tokenizer is not None:
            fit_embeddings(model, tokenizer)
            check_vocabulary(model, tokenizer)
            set_stop_tokens(model, tokenizer)
        self.tokenizer = tokenizer
        self.llm = model = self._adapted(model, lora)
        freeze_parameters(model, freeze=freeze, train_only=train_only)
        if activation_checkpointing:
            base = unwrap_adapter(model)
            # Its older name, which releases before the change of name know alone.
            older = getattr(base, "gradient_checkpointing_enable", None)
            enable = getattr(base, "activation_checkpointing_enable", older)
            enable({"use_reentrant": False})
            # Non-reentrant checkpoints need no gradient at the input; it would only cost time.
            base.disable_input_require_grads()
        self.activation_checkpointing = activation_checkpointing
        self.train()

    def _adapted(self, model: PreTrainedModel, lora: Any | None) -> nn.Module:
        """The model with its adapter, if there is one; what may train wants gradients."""
        if lora is not None:
            return add_adapter(model, lora, new_token_ids=new_token_ids(self.tokenizer))
        if getattr(model, "is_quantized", False) and model is unwrap_adapter(model):
            refuse_quantised_training()
        return model

    @abstractmethod
    def count_units(self, batch: Batch) -> float:
        """Units the loss of this batch is summed over. Called on the CPU, before ``forward``."""

    @abstractmethod
    def forward(self, batch: Batch) -> LossOutput:
        """Loss of one micro-batch, summed over its units."""

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """name -> parameter, of all that this method trains."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained instead of the model itself."""
        return unwrap_adapter(self.llm) is not self.llm

    def saved_names(self) -> list[str]:
        """Names of the tensors that a checkpoint must hold: what is trained, and buffers."""
        if self.has_adapter:
            buffers = [name for name, _ in self.named_buffers()]
            return sorted({*self.trainable_parameters(), *buffers})
        return list(self.state_dict())

    def save_pretrained(
        self, folder: str | Path, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Writes the trained weights in Hugging Face form, safetensors only.

        With an adapter: adapter_model.safetensors and adapter_config.json, which
        ``PeftModel.from_pretrained`` opens; else model.safetensors (or shards of 5 GB), config.json
        and generation_config.json, which ``AutoModelForCausalLM.from_pretrained`` opens.

        Args:
            folder: made when absent.
            state_dict: full tensors by the names of ``self.state_dict()``, for a strategy that
                keeps them sharded; None takes them from the module.
        """
        if state_dict is not None:
            state_dict = {
                name.removeprefix(_PREFIX): tensor
                for name, tensor in state_dict.items()
                if name.startswith(_PREFIX)
            }
        save = save_adapter if self.has_adapter else save_model
        save(self.llm, Path(folder), state_dict)

    def plan_streamed_save(self) -> SavePlan | None:
        """What ``save_streamed`` writes; None: only ``save_pretrained`` can save this method.

        So it is with adapters, which are small, and where transformers converts on saving. What
        trains is announced in float32, as every strategy keeps it.
        """
        return None if self.has_adapter else plan_save(self.llm, trained_dtype=torch.float32)

    def save_streamed(
        self,
        folder: str | Path | None,
        plan: SavePlan,
        stream: Callable[[Iterable[str]], Iterator[tuple[str, Tensor | None]]],
    ) -> None:
        """Writes what ``save_pretrained`` would; no rank holds more than one whole tensor.

        Every rank calls it. An error of the one that writes is raised when all tensors were drawn.

        Args:
            folder: made when absent; None on ranks that only take part in the gathering.
            plan: of ``plan_streamed_save``, the same on every rank.
            stream: gathers the tensors of given names one after the other (Strategy's
                ``stream_weights``).
        """
        # map keeps no reference to a tensor that was drawn; a generator would, beside the next one.
        weights = map(itemgetter(1), stream([_PREFIX + name for name in plan.names]))
        if folder is None:
            for _ in weights:
                pass
        else:
            write_planned(self.llm, Path(folder), plan, weights)

    def load_pretrained(self, folder: str | Path) -> None:
        """Takes the weights (nothing else) of an HF adapter or model folder, or of a checkpoint.

        Raises:
            FileNotFoundError: the folder holds no such weights.
            ValueError: they do not fit: missing, unexpected or differently shaped tensors.
        """
        load = load_adapter_weights if self.has_adapter else load_model_weights
        load(self.llm, Path(folder))


def build_llm(llm: nn.Module | dict[str, Any]) -> PreTrainedModel:
    """The model itself, or the one its config describes."""
    return build_model(llm, "llm", "load_causal_lm")


def build_model(model: nn.Module | dict[str, Any], name: str, loader: str) -> PreTrainedModel:
    """As build_llm, of an argument ``name`` that ``loader`` usually fills."""
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, dict) and "type" in model:
        return MODELS.build(model)
    raise TypeError(
        f"{name} is {model!r}; it must be a transformers model or a config with a type; write "
        f"{name}=dict(type={loader}, path=...)"
    )


def refuse_quantised_training() -> None:
    """Raises ValueError: quantised weights are to train."""
    raise ValueError(
        "the base model is quantised and lora is None; quantised weights cannot be "
        "trained: add lora=dict(type=LoraConfig, ...), or load it without quantization"
    )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError when the tokenizer can produce an id that has no embedding."""
    embeddings = unwrap_adapter(model).get_input_embeddings()
    rows = embeddings.num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {rows} embeddings; they do not "
            "belong together: load both from the same path"
        )


def set_stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes the model's generation config stop where the tokenizer's chat template says."""
    from xtuner_lite.templates import stop_token_ids

    config = getattr(unwrap_adapter(model), "generation_config", None)
    if config is None:
        return
    stops = stop_token_ids(tokenizer)
    if stops:
        config.eos_token_id = stops if len(stops) > 1 else stops[0]
    if config.pad_token_id is None and tokenizer.pad_token_id is not None:
        config.pad_token_id = tokenizer.pad_token_id
