"""Merged weights, one layer at a time, by peft's own code on a copy of that layer alone."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xtuner_lite.export.adapter_fit import PREFIX, adapter_on, weight_name
from xtuner_lite.export.publish import ExportError
from xtuner_lite.export.tensor_files import TensorInfo, WeightFiles

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

_ROWS = ".token_adapter.trainable_tokens_delta"
#: Initialisations that leave the base weights alone, or change them by the layer's weight only, so
#: that the same layer alone gives the same result.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal")
_RESIDUAL_INITS = ("pissa", "olora", "mipissa")


class CannotStream(Exception):
    """This adapter cannot be merged layer by layer; says why."""


class MergedWeights:
    """The tensors of base model and adapter merged into one, computed when they are asked for.

    Args:
        base: the base model's tensors.
        empty: the base model on the meta device.
        adapter: the adapter's tensors.
        config: its peft config.
        dtype: of the floating-point tensors; None keeps each one's own.
        device: where a layer is merged.

    Raises:
        CannotStream: the adapter needs the whole model at once.
        ExportError: the adapter does not fit the model.
    """

    def __init__(
        self,
        base: WeightFiles,
        empty: PreTrainedModel,
        adapter: WeightFiles,
        config: PeftConfig,
        *,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
    ) -> None:
        self.base, self.adapter, self.config = base, adapter, config
        self.dtype, self.device, self.empty = dtype, device, empty
        self._check_streamable(empty)
        self.embedding = weight_name(empty, empty.get_input_embeddings())
        self.head = weight_name(empty, empty.get_output_embeddings())
        self.was_tied = bool(empty.config.get_text_config().tie_word_embeddings)
        self.modules = dict(empty.named_modules())
        self.adapted = adapter_on(empty, config, adapter)
        self._sort_adapter_tensors()
        self.tied = self.was_tied and not self._breaks_the_tie()
        self.infos = self._output_infos()

    def read(self, name: str) -> Tensor:
        """The merged tensor ``name``."""
        info = self.infos[name]
        source = name if name in self.base.infos else self.embedding  # an untied head
        if name in self.replaced:
            tensor = self.adapter.read(self.replaced[name])
        elif name in self.rows:
            tensor = self._with_rows(self.base.read(source), name)
        elif (module := name.rpartition(".")[0]) in self.targets:
            tensor = self._merged(module, name.rpartition(".")[2])
        else:
            tensor = self.base.read(source)
        return tensor.to(info.dtype)

    def read_base(self, name: str) -> Tensor | None:
        """The base tensor that the adapter works on, by its name in the model with the adapter.

        PiSSA and its kind take a part of the base weight away before they add theirs.
        """
        name = name.removeprefix(PREFIX)
        for wrapper in (".token_adapter", ".base_layer", ".original_module"):
            name = name.replace(wrapper, "")
        module, _, key = name.rpartition(".")
        if module in self.targets and _is_residual(self.config):
            return self._layer(module).get_base_layer().get_parameter(key).detach()
        if name not in self.base.infos and name == self.head:
            name = self.embedding
        return self.base.read(name) if name in self.base.infos else None

    @property
    def num_changed(self) -> int:
        """Tensors of the base model that differ in the result."""
        return len(self.targets) + len(self.replaced) + len(self.rows)

    # ------------------------------------------------------------------ plan

    def _check_streamable(self, empty: PreTrainedModel) -> None:
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        config = self.config
        tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
        kind = type(config).__name__
        if getattr(tuner, "uses_shared_state", False):
            raise CannotStream(f"{kind} shares weights between layers")
        if config.peft_type.value not in _BY_LAYER:
            raise CannotStream(f"{kind} is not one of the types merged layer by layer")
        if getattr(config, "target_parameters", None):
            raise CannotStream("the adapter targets parameters (target_parameters)")
        if getattr(config, "lora_bias", False) and not _have_bias(empty, config):
            raise ExportError(
                "the adapter has biases (lora_bias) on layers without one, so there is no place to "
                "merge them into; serve the adapter itself: --adapter"
            )
        init = getattr(config, "init_lora_weights", True)
        if init not in _PLAIN_INITS and not _is_residual(config):
            raise CannotStream(f"init_lora_weights={init!r} needs the whole model")
        own = {name for name, _ in empty.named_parameters(remove_duplicate=False)}
        tied = set(getattr(empty, "_tied_weights_keys", None) or ())
        if unknown := sorted(own - set(self.base.infos) - tied):
            raise CannotStream(
                f"the base model's files name tensors otherwise than its code does ({unknown[0]})"
            )

    def _sort_adapter_tensors(self) -> None:
        """What each tensor of the adapter does to which tensor of the base."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        targets = {
            name.removeprefix(PREFIX)
            for name, module in self.adapted.named_modules()
            if isinstance(module, BaseTunerLayer) and not name.endswith(".token_adapter")
        }
        self.targets: dict[str, list[str]] = {}
        self.replaced: dict[str, str] = {}
        self.rows: dict[str, str] = {}
        for key in self.adapter.infos:
            name = key.removeprefix(PREFIX)
            if ".base_layer." in name:  # peft saves the embedding under an adapter on it too
                self.base.overrides[name.replace(".base_layer.", ".")] = self.adapter, key
                continue
            if name.endswith(_ROWS):
                self.rows[name.removesuffix(_ROWS) + ".weight"] = key
                continue
            owner = name.rpartition(".")[0]
            while owner and owner not in targets:
                owner = owner.rpartition(".")[0]
            if owner:
                self.targets.setdefault(owner, []).append(key)
            elif name in self.base.infos or name == self.head:
                self.replaced[name] = key
            else:
                raise CannotStream(f"it is not known what the adapter's tensor {key} changes")

    def _breaks_the_tie(self) -> bool:
        """Whether embedding and head, one tensor in the base, are two in the result."""
        changed = [
            n for n in (self.embedding, self.head) if n in self.replaced or self._is_target(n)
        ]
        if not changed or getattr(self.config, "ensure_weight_tying", False):
            self.replaced.pop(self.head, None)
            return False
        if all(n in self.replaced for n in (self.embedding, self.head)):
            first, second = (
                self.adapter.read(self.replaced[n]) for n in (self.embedding, self.head)
            )
            if first.shape == second.shape and torch.equal(first, second):
                del self.replaced[self.head]
                return False
        return True

    def _is_target(self, name: str) -> bool:
        return name.rpartition(".")[0] in self.targets

    def _output_infos(self) -> dict[str, TensorInfo]:
        infos = {}
        for name, info in self.base.infos.items():
            shape = info.shape
            if name in self.replaced:
                shape = self.adapter.infos[self.replaced[name]].shape
            dtype = info.dtype
            if self.dtype is not None and dtype.is_floating_point:
                dtype = self.dtype
            infos[name] = TensorInfo(name, dtype, shape)
        if not self.tied and self.head and self.head not in infos:  # was tied, is no longer
            like = infos[self.embedding]
            shape = like.shape
            if self.head in self.replaced:
                shape = self.adapter.infos[self.replaced[self.head]].shape
            infos[self.head] = TensorInfo(self.head, like.dtype, shape)
        rows = {infos[n].shape[0] for n in (self.embedding, self.head) if n in infos}
        if len(rows) > 1:
            raise ExportError(
                f"the adapter leaves the embedding and the head with different numbers of tokens "
                f"({sorted(rows)}); train new tokens with modules_to_save=['embed_tokens', "
                "'lm_head'], or trainable_token_indices"
            )
        self.vocab_size = rows.pop()
        return infos

    # ----------------------------------------------------------------- merge

    def _with_rows(self, weight: Tensor, name: str) -> Tensor:
        indices = self.config.trainable_token_indices
        if isinstance(indices, dict):
            module = name.rpartition(".")[0]
            indices = next(v for k, v in indices.items() if module == k or module.endswith("." + k))
        weight[list(indices)] = self.adapter.read(self.rows[name]).to(weight.dtype)
        return weight

    def _merged(self, module: str, key: str) -> Tensor:
        layer = self._layer(module)
        layer.float()  # delta and sum in float32, rounded once
        layer.merge(safe_merge=False)
        merged = layer.get_base_layer().get_parameter(key).detach()
        if not torch.isfinite(merged).all():
            raise ExportError(
                f"{module}.{key} is not finite after the merge; the adapter is broken"
            )
        return merged.cpu()

    def _layer(self, module: str) -> Any:
        """The adapter's layer with base and adapter weights, alone in a skeleton of its path."""
        from peft import inject_adapter_in_model, set_peft_model_state_dict

        original = copy.deepcopy(self.modules[module])
        for key, parameter in original.named_parameters(recurse=False):
            source = f"{module}.{key}"
            if source not in self.base.infos:
                source = self.embedding  # a head that is tied
            tensor = self.base.read(source).to(self.device)
            if not _is_residual(self.config):
                tensor = tensor.float()
            original._parameters[key] = nn.Parameter(tensor, requires_grad=False)
            assert tensor.shape == parameter.shape, module
        alone = _in_its_path(module, original)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(_config_for(self.config, module), alone)
        weights = {
            key.removeprefix(PREFIX): self.adapter.read(key).to(self.device).float()
            for key in self.targets[module]
        }
        layer = alone.get_submodule(module)
        for parameter in set(layer.parameters()) - set(layer.get_base_layer().parameters()):
            parameter.data = parameter.data.float()
        result = set_peft_model_state_dict(alone, weights)
        assert not result.unexpected_keys, result.unexpected_keys
        return layer.requires_grad_(False).eval()


#: peft types whose layers know all that their merge needs, tested against peft's own merge.
_BY_LAYER = ("LORA", "LOHA", "LOKR", "IA3")


def _config_for(config: PeftConfig, module: str) -> PeftConfig:
    """The adapter's config for a model that has this one module."""
    own = copy.deepcopy(config)
    own.target_modules = [module]
    for name in ("modules_to_save", "trainable_token_indices", "exclude_modules"):
        if hasattr(own, name):
            setattr(own, name, None)
    for name in ("layers_to_transform", "layers_pattern"):
        if hasattr(own, name):
            setattr(own, name, None)
    feedforward = getattr(own, "feedforward_modules", None)
    if feedforward:  # IA3: which side of the layer its vector stands on
        names = [feedforward] if isinstance(feedforward, str) else list(feedforward)
        own.feedforward_modules = [module] if any(module.endswith(n) for n in names) else []
    return own


def _in_its_path(name: str, module: nn.Module) -> nn.Module:
    """A tree of empty modules in which ``module`` stands at ``name``."""
    for part in reversed(name.split(".")):
        parent = nn.Module()
        parent.add_module(part, module)
        module = parent
    return module


def _have_bias(model: PreTrainedModel, config: PeftConfig) -> bool:
    names = config.target_modules
    if isinstance(names, str):
        return True  # a pattern; peft's own error tells
    return all(
        getattr(module, "bias", None) is not None
        for name, module in model.named_modules()
        if any(name == n or name.endswith("." + n) for n in names)
    )


def _is_residual(config: PeftConfig) -> bool:
    init = getattr(config, "init_lora_weights", True)
    return isinstance(init, str) and init.startswith(_RESIDUAL_INITS)
