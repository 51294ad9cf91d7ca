"""What a training run would need in memory, from its settings and the model's config.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from xtuner_lite.engine.memory import (
    DeviceMemory,
    ModelSize,
    Placement,
    computes_under_autocast,
    device_memory,
    keeps_half_weights,
    shards_weights,
)
from xtuner_lite.engine.optimizer_memory import optimizer_state_bytes, update_bytes
from xtuner_lite.engine.precision import parse_dtype
from xtuner_lite.methods.base import TrainingMethod
from xtuner_lite.methods.functional import chunked_head_loss
from xtuner_lite.models.llava import extra_tokens_of
from xtuner_lite.models.loading import choose_attention
from xtuner_lite.models.memory import (
    FUSED_ATTENTION,
    ActivationMemory,
    ActivationsUnknownError,
    trace_activations,
)
from xtuner_lite.models.packed_forward import unwrap_adapter
from xtuner_lite.models.quantized import quantized_bytes
from xtuner_lite.models.skeleton import build_skeleton, build_tower_skeleton, decoder_layers
from xtuner_lite.registry import MODELS, OPTIMIZERS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LORA = dict(type="LoraConfig", r=16, lora_alpha=32, target_modules="all-linear")
_ADAM_KEYS = ("lr", "betas", "eps", "weight_decay")
_LONG = 1024  # tokens; shorter samples are not proposed to be cut


@dataclass(frozen=True)
class Plan:
    """The settings of a run that memory depends on."""

    method: dict[str, Any]
    """The config's ``model`` without its parts: type, lora, activation_checkpointing, ..."""
    optimizer: dict[str, Any]
    """The config's optim_wrapper.optimizer."""
    batch_size: int = 1
    """Packed samples of a micro-batch, on each device."""
    length: int = 2048
    """Tokens of a packed sample."""
    dtype: str = "bf16"
    """Compute dtype."""
    quantization: Any = None
    """As load_causal_lm's."""
    attn: str = "auto"
    """As load_causal_lm's."""
    device_type: str = "cuda"
    placement: Placement = "single"
    devices: int = 1
    accumulative_counts: int = 1
    """Micro-batches of a step."""
    zero: dict[str, int] = field(default_factory=dict)
    """reduce_bucket and max_live_parameters of engine.memory.device_memory."""
    half_weights: bool | None = None
    """As the DeepSpeed strategy's."""


@dataclass(frozen=True)
class Sight:
    """What a LLaVA sees."""

    tower: PretrainedConfig
    """Config of the vision tower."""
    image_size: int
    """Pixels of an image, each way."""
    strategy: str
    """visual_select_strategy."""

    @property
    def num_image_tokens(self) -> int:
        """Tokens of an image."""
        patches = (self.image_size // self.tower.patch_size) ** 2
        return patches + (extra_tokens_of(self.tower) if self.strategy == "full" else 0)

    def num_images(self, plan: Plan) -> int:
        """The most images that a micro-batch can hold, and at least one."""
        return max(1, plan.length // self.num_image_tokens * plan.batch_size)


class MemoryPlanner:
    """Works out plans for one model; what two plans share is worked out once.

    Args:
        config: the language model's transformers config.
        trust_remote_code: run modeling code that comes with it.
        sight: of a LLaVA.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        trust_remote_code: bool = False,
        sight: Sight | None = None,
    ) -> None:
        self.config, self.sight = config, sight
        self.trust_remote_code = trust_remote_code
        self._results: dict[str, Any] = {}

    def memory(self, plan: Plan) -> DeviceMemory:
        """Memory per device of a plan."""
        return device_memory(self.size(plan), plan.placement, plan.devices, **plan.zero)

    def method(self, plan: Plan) -> TrainingMethod:
        """The training method on the meta device: names, shapes and requires_grad are true."""

        def build() -> TrainingMethod:
            llm = build_skeleton(
                self.config, attn=self._attention(plan), trust_remote_code=self.trust_remote_code
            )
            parts: dict[str, Any] = {"llm": llm}
            if self.sight is not None:
                fused = FUSED_ATTENTION if plan.device_type == "cuda" else None
                parts["visual_encoder"] = build_tower_skeleton(self.sight.tower, attn=fused)
                parts["visual_select_strategy"] = self.sight.strategy
                parts["image_token_id"] = llm.get_input_embeddings().num_embeddings - 1
            with torch.device("meta"):
                return MODELS.build({**plan.method, **parts}, config_key="model", tokenizer=None)

        return self._once(("method", plan.method, plan.attn, plan.device_type), build)

    def size(self, plan: Plan) -> ModelSize:
        """What the formulas of engine.memory read."""
        method, dtype = self.method(plan), parse_dtype(plan.dtype)
        trained = list(method.trainable_parameters().values())
        frozen = _count(p for p in method.parameters() if not p.requires_grad)
        layers = decoder_layers(unwrap_adapter(method.llm).get_decoder()) or []
        whole = [_count(layer.parameters()) for layer in layers] or [0]
        learnt = [_count(p for p in x.parameters() if p.requires_grad) for x in layers] or [0]
        saved, dequantized = quantized_bytes(method.llm, plan.quantization, dtype)
        trainable = _count(trained)
        half = keeps_half_weights(plan.placement, trainable, frozen, plan.dtype, plan.half_weights)
        return ModelSize(
            trainable=trainable,
            frozen=frozen,
            frozen_bytes=dtype.itemsize * frozen - saved,
            compute_bytes=dtype.itemsize,
            layer=max(whole),
            layer_trainable=max(learnt),
            outside=trainable + frozen - sum(whole),
            half_weights=half,
            accumulates=plan.accumulative_counts > 1,
            optimizer=self._once(
                ("optimizer", plan.method, plan.optimizer),
                lambda: optimizer_state_bytes(trained, plan.optimizer),
            ),
            update=update_bytes(plan.optimizer, trainable, plan.device_type),
            dequantized=dequantized,
            activations=self._activations(plan, computes_under_autocast(plan.placement, half)),
        )

    def _once(self, key: Any, work: Callable[[], Any]) -> Any:
        """The result of ``work``, kept by the text of ``key``."""
        key = repr(key)
        if key not in self._results:
            self._results[key] = work()
        return self._results[key]

    def _activations(self, plan: Plan, autocast: bool) -> ActivationMemory:
        method, dtype = self.method(plan), parse_dtype(plan.dtype)
        key = ("activations", plan.method, plan.batch_size, plan.length, plan.dtype, plan.attn,
               plan.device_type, autocast)  # fmt: skip
        shape = None
        if self.sight is not None:
            size = self.sight.image_size
            shape = (self.sight.num_images(plan), 3, size, size)
        return self._once(key, lambda: trace_activations(
            method.llm,
            batch_size=plan.batch_size,
            length=plan.length,
            dtype=dtype,
            autocast=autocast,
            activation_checkpointing=method.activation_checkpointing,
            head=getattr(method, "head", "chunked"),
            head_chunk_tokens=getattr(method, "head_chunk_tokens", 512),
            head_loss=chunked_head_loss,
            image_shape=shape,
        ))  # fmt: skip

    def _attention(self, plan: Plan) -> str | None:
        """The implementation of the run; every fused kernel of a GPU keeps the same tensors."""
        chosen = choose_attention(self.config) if plan.attn == "auto" else plan.attn
        fused = chosen is None or chosen in ("sdpa", "packed_sdpa") or "flash" in chosen
        return FUSED_ATTENTION if plan.device_type == "cuda" and fused else chosen


@dataclass(frozen=True)
class Change:
    """A change of a plan, and what it does."""

    text: str
    """The setting to write."""
    cost: str
    """What it costs."""
    plan: Plan
    memory: DeviceMemory
    saved: int
    """Bytes less per device."""


def best_changes(planner: MemoryPlanner, plan: Plan, limit: int = 6) -> list[Change]:
    """The single changes that save most memory per device, largest first.

    Of several changes of one kind (strategies, strategies with offload) only the best is given.
    """
    before = planner.memory(plan).total
    best: dict[str, Change] = {}
    for kind, text, cost, changed in _changes(plan, planner.method(plan)):
        try:
            memory = planner.memory(changed)
        except ActivationsUnknownError:
            continue  # no promise about what cannot be worked out
        saved = before - memory.total
        if saved > 0 and (kind not in best or saved > best[kind].saved):
            best[kind] = Change(text, cost, changed, memory, saved)
    return sorted(best.values(), key=lambda change: -change.saved)[:limit]


def _changes(plan: Plan, method: TrainingMethod) -> Iterator[tuple[str, str, str, Plan]]:
    """(kind, setting to write, what it costs, changed plan) of every change worth a look."""
    if not method.activation_checkpointing:
        changed = {**plan.method, "activation_checkpointing": True}
        yield (
            "checkpointing", "model.activation_checkpointing=True",
            "about a third more time", replace(plan, method=changed),
        )  # fmt: skip
    sees = hasattr(method, "visual_encoder")
    name = "llm_lora" if sees else "lora"
    lora = plan.method.get(name)
    is_frozen = lora is None and plan.method.get("freeze_llm", False)
    adapted = plan.method if is_frozen else {**plan.method, name: lora or _LORA}
    if lora is None and not is_frozen:
        yield (
            "LoRA", f"model.{name}=dict(type=LoraConfig, r=16, lora_alpha=32)",
            "trains an adapter, not the model", replace(plan, method=adapted),
        )  # fmt: skip
    if plan.quantization is None and not shards_weights(plan.placement):
        yield (
            "QLoRA", "model.llm.quantization='4bit'"
            + ("" if lora or is_frozen else " and LoRA as above"),
            "slower steps, a base rounded to 4 bits",
            replace(plan, method=adapted, quantization="4bit"),
        )  # fmt: skip
    if plan.batch_size > 1:
        yield (
            "micro-batch", f"train_dataloader.batch_size=1, {plan.batch_size} times the "
            "optim_wrapper.accumulative_counts", "the same training, smaller products",
            replace(
                plan,
                batch_size=1,
                accumulative_counts=plan.batch_size * plan.accumulative_counts,
            ),
        )  # fmt: skip
    if plan.length >= _LONG:
        yield (
            "length", f"max_length={plan.length // 2}", "longer rows are cut or split",
            replace(plan, length=plan.length // 2),
        )  # fmt: skip
    sharded = ("fsdp2", "zero2", "zero3") if plan.devices > 1 else ()
    for placement in (*sharded, "fsdp2_offload", "zero2_offload", "zero3_offload"):
        offload = placement.endswith("offload")
        if placement == plan.placement or (plan.quantization and shards_weights(placement)):
            continue
        yield (
            "offload" if offload else "sharding", f"strategy {placement}",
            "every step waits for the host" if offload else "more communication",
            replace(plan, placement=placement),
        )  # fmt: skip
    kind = OPTIMIZERS.resolve(plan.optimizer["type"])
    has_8bit = find_spec("bitsandbytes") is not None
    if kind is torch.optim.AdamW and plan.placement in ("single", "ddp") and has_8bit:
        kept = {k: plan.optimizer[k] for k in _ADAM_KEYS if k in plan.optimizer}
        yield (
            "optimizer", "optim_wrapper.optimizer.type=AdamW8bit",
            "moments rounded to 8 bits", replace(plan, optimizer={**kept, "type": "AdamW8bit"}),
        )  # fmt: skip


def _count(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
