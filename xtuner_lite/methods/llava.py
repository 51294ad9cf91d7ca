"""LLaVA (arXiv:2304.08485): a language model that sees through a vision tower and a projector.

Two stages: first the projector alone learns to say what an image shows, then projector and language
model (often by LoRA) learn to answer questions about it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from xtuner_lite.images.vision_inputs import vision_of
from xtuner_lite.methods.base import build_llm, build_model, refuse_quantised_training
from xtuner_lite.methods.image_text import ImageTextFinetune
from xtuner_lite.methods.llava_tokens import image_token_of, select_strategy_of
from xtuner_lite.methods.llava_weights import take_weights
from xtuner_lite.models.adapters import add_adapter, build_peft_config
from xtuner_lite.models.image_text_parts import merge_adapters, target_part, unused_of_tower
from xtuner_lite.models.llava import build_llava
from xtuner_lite.models.llava_files import (
    PROJECTOR_DIR,
    VISUAL_ENCODER_DIR,
    load_projector,
    parts_of,
    read_projector,
    save_projector,
)
from xtuner_lite.models.modes import without_progress_bars
from xtuner_lite.models.new_tokens import new_token_ids
from xtuner_lite.models.packed_forward import unwrap_adapter
from xtuner_lite.models.streamed_save import SavePlan
from xtuner_lite.registry import MODELS

if TYPE_CHECKING:
    from transformers import (
        LlavaForConditionalGeneration,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

logger = logging.getLogger(__name__)

How = Literal["frozen", "adapter", "full"]


@MODELS.register_module()
class LLaVAModel(ImageTextFinetune):
    """A LLaVA of parts, and its training: the projector always, the others as they are asked to.

    Args:
        llm: a causal language model or ``dict(type=load_causal_lm, path=...)``, quantised or not.
        visual_encoder: a vision tower or ``dict(type=load_visual_encoder, path=...)``.
        tokenizer: a vision tokenizer, ``dict(type=load_llava_processor, ...)`` (injected by the
            Runner).
        freeze_llm: leave the language model as it is; with ``llm_lora`` its own weights stay
            frozen anyhow.
        freeze_visual_encoder: the same of the vision tower and ``visual_encoder_lora``.
        llm_lora: a peft config for the language model, on its linear layers where it names none.
        visual_encoder_lora: a peft config for the vision tower; with ``llm_lora`` it may differ
            from that in r, lora_alpha and target_modules.
        visual_select_layer: which of the tower's hidden states are taken; -2 (LLaVA's own choice)
            is the one before the last layer's.
        visual_select_strategy: 'default' leaves the first one (CLS) out, 'full' takes all; None
            takes the tokenizer's, else 'default'.
        projector_depth: linear layers of the projector. Only 2 can be exported in HF form.
        pretrained_pth: trained weights to start from: the checkpoint folder of a run of this
            method (stage one), a Hugging Face LLaVA folder, XTuner's projector folder or file.
        image_token_id: id of the image token; None takes the tokenizer's.
        freeze: patterns of further parameters that do not train.
        train_only: patterns of the parameters that alone train; not with ``freeze``.
        activation_checkpointing: see SupervisedFinetune, like all that follow.

    Raises:
        ValueError: parts, tokenizer and weights do not fit each other, each with what does; the
            language model is quantised and is to train in full; or the tower is to get an adapter
            while the language model trains in full.
    """

    def __init__(
        self,
        llm: nn.Module | dict[str, Any],
        visual_encoder: nn.Module | dict[str, Any],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        freeze_llm: bool = False,
        freeze_visual_encoder: bool = False,
        llm_lora: Any | None = None,
        visual_encoder_lora: Any | None = None,
        visual_select_layer: int = -2,
        visual_select_strategy: Literal["default", "full"] | None = None,
        projector_depth: int = 2,
        pretrained_pth: str | Path | None = None,
        image_token_id: int | None = None,
        freeze: Sequence[str] = (),
        train_only: Sequence[str] = (),
        activation_checkpointing: bool = False,
        head: Literal["chunked", "model"] = "chunked",
        head_chunk_tokens: int = 512,
        self_check: bool = True,
    ) -> None:
        text = build_llm(llm)
        tower = build_model(visual_encoder, "visual_encoder", "load_visual_encoder")
        vision = vision_of(tokenizer)
        # Read by _adapted, which runs inside the constructor of the base.
        self._llm_is: How = _how(llm_lora, freeze_llm)
        self._tower_is: How = _how(visual_encoder_lora, freeze_visual_encoder)
        self._places = (_place(text), _place(tower))
        if self._llm_is == "full" and self._tower_is == "adapter":
            raise ValueError(
                "visual_encoder_lora with a language model that trains in full is not possible: an "
                "adapter freezes what it does not go on. Give llm_lora too, set freeze_llm=True, "
                "or train the tower in full (no visual_encoder_lora)"
            )
        model = build_llava(
            text,
            tower,
            image_token_id=image_token_of(vision, image_token_id),
            projector_depth=projector_depth,
            visual_select_layer=visual_select_layer,
            visual_select_strategy=select_strategy_of(vision, visual_select_strategy, tower),
            image_seq_length=vision.num_image_tokens((64, 64)) if vision else None,
        )
        super().__init__(
            model, tokenizer=tokenizer, lora={"llm": llm_lora, "tower": visual_encoder_lora},
            freeze=freeze, train_only=train_only, head=head, head_chunk_tokens=head_chunk_tokens,
            activation_checkpointing=activation_checkpointing, self_check=self_check,
        )  # fmt: skip
        if pretrained_pth is not None:
            take_weights(self, pretrained_pth)

    @property
    def llava(self) -> LlavaForConditionalGeneration:
        """The model itself, adapter layers inside it."""
        return unwrap_adapter(self.llm)

    @property
    def projector(self) -> nn.Module:
        """The layers between tower and language model."""
        return self.llava.model.multi_modal_projector

    @property
    def visual_encoder(self) -> PreTrainedModel:
        """The vision tower."""
        return self.llava.model.vision_tower

    @property
    def saves_whole_model(self) -> bool:
        """Whether a checkpoint is a whole Hugging Face LLaVA, since all may have changed."""
        return self._llm_is == "full"

    @property
    def saves_visual_encoder(self) -> bool:
        """Whether a checkpoint holds the vision tower beside the rest."""
        return self._tower_is == "full" and not self.saves_whole_model

    def _adapted(self, model: PreTrainedModel, lora: Any | None) -> nn.Module:
        tower = model.model.vision_tower
        unused = set()
        if self._tower_is != "frozen":
            unused = unused_of_tower(tower, model.config.vision_feature_layer)
            logger.info("%d tensors of the vision tower lie behind the chosen layer", len(unused))
        if self._llm_is == "full":
            if getattr(model, "is_quantized", False):
                refuse_quantised_training()
        else:
            model.requires_grad_(False)
        config = self._adapter_config(model, lora, unused)
        if config is None and self._llm_is == "frozen" and new_token_ids(self.tokenizer):
            raise ValueError(
                "the tokenizer has new tokens, whose rows a frozen language model neither trains "
                "nor saves; give llm_lora, which does both, or leave new_tokens out"
            )
        if config is not None:
            model = add_adapter(model, config, new_token_ids=new_token_ids(self.tokenizer))
        base = unwrap_adapter(model)
        _train_in_full(base.model.multi_modal_projector, base_dtype=config is None)
        if self._tower_is == "full":
            _train_in_full(tower, base_dtype=config is None, unused=unused)
        elif self._tower_is == "frozen":
            tower.requires_grad_(False)
        return model

    def _adapter_config(self, model: PreTrainedModel, lora: Any, unused: set[str]) -> Any | None:
        """One peft config for both parts; None without an adapter."""
        configs = []
        if lora["llm"] is not None:
            configs.append(build_peft_config(lora["llm"]))
            _refuse_parts_in_adapter(model, configs[0])
            target_part(model, configs[0], ["llm"])
        if lora["tower"] is not None:
            skip = {f"model.vision_tower.{name.rpartition('.')[0]}" for name in unused}
            configs.append(build_peft_config(lora["tower"]))
            _refuse_parts_in_adapter(model, configs[-1])
            target_part(model, configs[-1], ["visual_encoder"], skip=skip)
        if any(getattr(config, "bias", "none") == "all" for config in configs):
            raise ValueError(
                "bias='all' in llm_lora or visual_encoder_lora trains the biases of the whole "
                "model, of the other parts too; use bias='lora_only' or 'none'"
            )
        if len(configs) == 2:
            return merge_adapters(*configs)
        return configs[0] if configs else None

    def saved_names(self) -> list[str]:
        """See TrainingMethod.saved_names."""
        if self.saves_whole_model:
            return list(self.state_dict())
        names = {*self.trainable_parameters(), *(name for name, _ in self.named_buffers())}
        names |= {self._prefix_of(self.projector) + n for n in self.projector.state_dict()}
        if self.saves_visual_encoder:
            tower = self.visual_encoder
            names |= {self._prefix_of(tower) + name for name in tower.state_dict()}
        return sorted(names)

    def save_pretrained(
        self, folder: str | Path, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Writes what was trained, see models.llava_files; a whole LLaVA where the llm trains.

        Args:
            folder: made when absent.
            state_dict: see TrainingMethod.save_pretrained.
        """
        folder = Path(folder)
        if self.saves_whole_model:
            super().save_pretrained(folder, state_dict)
            return
        folder.mkdir(parents=True, exist_ok=True)
        state = dict(self.state_dict() if state_dict is None else state_dict)
        projector = self._taken(state, self.projector)
        save_projector(self.projector, folder / PROJECTOR_DIR, projector)
        if self.saves_visual_encoder:
            weights = self._taken(state, self.visual_encoder)
            with without_progress_bars():
                self.visual_encoder.save_pretrained(
                    str(folder / VISUAL_ENCODER_DIR), state_dict=weights
                )
        if self.has_adapter:
            super().save_pretrained(folder, state)
        parts_of(self.llava.config, *self._places).write(folder)

    def plan_streamed_save(self) -> SavePlan | None:
        """See TrainingMethod.plan_streamed_save."""
        return super().plan_streamed_save() if self.saves_whole_model else None

    def save_streamed(
        self,
        folder: str | Path | None,
        plan: SavePlan,
        stream: Callable[[Iterable[str]], Iterator[tuple[str, Tensor | None]]],
    ) -> None:
        """See TrainingMethod.save_streamed; only where the whole model is saved."""
        super().save_streamed(folder, plan, stream)

    def load_pretrained(self, folder: str | Path) -> None:
        """Takes trained weights, as ``pretrained_pth`` does.

        Raises:
            FileNotFoundError: there are none.
            ValueError: they do not fit, or the run would not keep some of them.
        """
        take_weights(self, folder)

    def load_pth(self, path: str | Path) -> None:
        """Takes XTuner's projector out of a pickled file (restricted loader)."""
        load_projector(self.projector, read_projector(path), Path(path))

    def _prefix_of(self, module: nn.Module) -> str:
        """How the names of a module's tensors begin in ``state_dict()``."""
        return next(name for name, m in self.named_modules() if m is module) + "."

    def _taken(self, state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
        """Takes a module's tensors out of ``state``, by its own names for them."""
        prefix = self._prefix_of(module)
        names = [name for name in state if name.startswith(prefix)]
        own = module.state_dict()
        taken = {name.removeprefix(prefix): state.pop(name) for name in names}
        return {name: tensor for name, tensor in taken.items() if name in own}


def _refuse_parts_in_adapter(model: PreTrainedModel, config: Any) -> None:
    """Raises ValueError where ``modules_to_save`` names what trains, and is saved, beside it."""
    for name in getattr(config, "modules_to_save", None) or ():
        found = [n for n, _ in model.named_modules() if n == name or n.endswith(f".{name}")]
        outside = [n for n in found if ".multi_modal_projector" in n or ".vision_tower" in n]
        if outside:
            raise ValueError(
                f"modules_to_save={name!r} of the adapter names {outside[0]}: the projector trains "
                "in full and is saved anyhow, and the vision tower with freeze_visual_encoder="
                "False and no visual_encoder_lora; take it out of modules_to_save"
            )


def _how(lora: Any | None, is_frozen: bool) -> How:
    if lora is not None:
        return "adapter"
    return "frozen" if is_frozen else "full"


def _train_in_full(module: nn.Module, *, base_dtype: bool, unused: Iterable[str] = ()) -> None:
    """Makes a part train; beside an adapter in float32, as add_adapter does with its weights."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in unused)
        if parameter.requires_grad and not base_dtype:
            parameter.data = parameter.data.float()


def _place(model: PreTrainedModel) -> str:
    return getattr(model, "name_or_path", "") or ""
