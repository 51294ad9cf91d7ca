"""Memory of one forward and backward pass, found by running the model's own code on fake tensors.

A fake tensor has shape, dtype and device and no storage, so the pass of a 70B model costs seconds
and no memory; what autograd would keep, what autocast would cast and what checkpointing would
recompute is what the real pass does, for any architecture. Layers that are built alike cost alike:
one layer of each kind is run, then each kind once more, and the difference is counted for the rest.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from xtuner_lite.models.adapters import without_input_casts
from xtuner_lite.models.attention import PACKED_SDPA, no_packing_mask
from xtuner_lite.models.live_tensors import LiveTensors
from xtuner_lite.models.packed_forward import language_model_head, unwrap_adapter
from xtuner_lite.models.skeleton import decoder_layers

#: Attention that saves what a fused kernel on a GPU saves: query, key, value as they come (heads
#: not repeated), the output, and one float32 per head and token.
FUSED_ATTENTION = "fused_attention_memory"


class ActivationsUnknownError(RuntimeError):
    """The model's code does not run on fake tensors, so its activations cannot be counted."""

    exit_code = 2


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes of one micro-batch beside weights, gradients and optimizer; see trace_activations."""

    saved: int
    """Kept from the forward to the backward pass, the decoder's last hidden states included."""
    copies: int
    """Trained weights that autocast has cast and the backward pass needs again."""
    recompute: int
    """What the backward or forward pass needs for a moment over ``saved``: with activation
    checkpointing about one layer's activations."""
    head: int
    """What the head and the loss need while they run: hidden states of the targets, their
    gradients, one chunk of logits."""

    @property
    def peak(self) -> int:
        """The most that is held at once, copies included."""
        return self.saved + self.copies + max(self.recompute, self.head)


def trace_activations(
    llm: nn.Module,
    *,
    batch_size: int,
    length: int,
    dtype: torch.dtype,
    autocast: bool,
    activation_checkpointing: bool = False,
    head: Literal["chunked", "model"] = "chunked",
    head_chunk_tokens: int = 512,
    head_loss: Callable[..., Any],
    image_shape: tuple[int, int, int, int] | None = None,
    all_layers: bool = False,
) -> ActivationMemory:
    """Activation memory of one micro-batch in which every token is a target.

    Args:
        llm: a model or PeftModel on the meta device; with ``image_shape`` a LLaVA.
        batch_size: packed samples of the micro-batch.
        length: tokens of a sample.
        dtype: compute dtype.
        autocast: True: what trains is float32, what is frozen has the compute dtype, and the pass
            runs under autocast. False: all weights have the compute dtype.
        activation_checkpointing: whether it is on in ``llm``.
        head: as the training method has it.
        head_chunk_tokens: as the training method has it.
        head_loss: methods.functional.chunked_head_loss.
        image_shape: of a LLaVA's images in the micro-batch, [n, 3, height, width].
        all_layers: run every layer instead of counting layers that are built alike.

    Raises:
        ActivationsUnknownError: its code needs values, or an operator of its does not run on fake
            tensors in these dtypes.
    """

    def run(chosen: list[int] | None) -> _Pass:
        return _run_or_tell(
            llm, chosen, batch_size * length, batch_size, dtype, autocast,
            activation_checkpointing, head, head_chunk_tokens, head_loss, image_shape,
        )  # fmt: skip

    layers = decoder_layers(unwrap_adapter(llm).get_decoder())
    if layers is None or all_layers:
        whole = run(None)
        return ActivationMemory(whole.saved, whole.copies, whole.recompute, whole.head)
    kinds: dict[Any, list[int]] = {}
    for index, layer in enumerate(layers):
        kinds.setdefault(_kind(layer), []).append(index)
    one_each = sorted(where[0] for where in kinds.values())
    first = run(one_each)
    saved, copies, recompute = first.saved, first.copies, first.recompute
    for where in kinds.values():
        if len(where) > 1:
            again = run(sorted([*one_each, where[1]]))
            saved += (len(where) - 1) * (again.saved - first.saved)
            copies += (len(where) - 1) * (again.copies - first.copies)
            recompute = max(recompute, again.recompute)
    return ActivationMemory(saved, copies, recompute, first.head)


@dataclass
class _Pass:
    saved: int
    copies: int
    recompute: int
    head: int


def _run_or_tell(llm: nn.Module, *args: Any) -> _Pass:
    log = logging.getLogger("torch._subclasses.fake_tensor")  # prints what is told below
    was_disabled, log.disabled = log.disabled, True
    try:
        return _run(llm, *args)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ActivationsUnknownError(
            f"the activations of {type(unwrap_adapter(llm)).__name__} cannot be worked out with "
            f"these weights' dtypes: {reason}. Try another strategy (DeepSpeed and FSDP2 compute "
            "in one dtype), or measure a short run"
        ) from error
    finally:
        log.disabled = was_disabled


def _run(
    llm: nn.Module,
    chosen: list[int] | None,
    num_tokens: int,
    batch_size: int,
    dtype: torch.dtype,
    autocast: bool,
    checkpointing: bool,
    head: str,
    chunk_tokens: int,
    head_loss: Callable[..., Any],
    image_shape: tuple[int, int, int, int] | None,
) -> _Pass:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = _copy_with_layers(llm, chosen)
    with FakeTensorMode():
        _make_fake(model, trained=torch.float32 if autocast else dtype, frozen=dtype)
        ids = torch.zeros(batch_size, num_tokens // batch_size, dtype=torch.int64)
        targets = torch.zeros(num_tokens, dtype=torch.int64)
        pixels = None if image_shape is None else torch.zeros(image_shape)
        inputs = [ids, targets, *([] if pixels is None else [pixels])]
        watch = LiveTensors([*inputs, *model.buffers()], model.parameters())
        with watch:
            return one_pass(
                model, ids, targets, watch, dtype=dtype, autocast=autocast,
                checkpointing=checkpointing, head=head, chunk_tokens=chunk_tokens,
                head_loss=head_loss, pixels=pixels,
            )  # fmt: skip


def one_pass(
    model: nn.Module,
    ids: Tensor,
    targets: Tensor,
    watch: LiveTensors,
    *,
    dtype: torch.dtype,
    autocast: bool,
    checkpointing: bool,
    head: str,
    chunk_tokens: int,
    head_loss: Callable[..., Any],
    pixels: Tensor | None = None,
) -> _Pass:
    """One forward and backward pass of a model under ``watch``; gradients are dropped at once.

    Args:
        ids: int64 [B, T].
        targets: int64 [B * T].
        pixels: images for a LLaVA, float [n, 3, height, width].
    """
    hooks = [
        p.register_post_accumulate_grad_hook(_drop_gradient)
        for p in model.parameters()
        if p.requires_grad
    ]
    cast = torch.autocast("cpu", dtype=dtype) if autocast and dtype != torch.float32 else None
    with cast or nullcontext():
        with nullcontext() if checkpointing else without_input_casts(model):
            hidden = _hidden_states(model, ids, pixels)
        saved, copies, peak = watch.now, watch.copies, watch.peak
        watch.restart_peak()
        model_head = language_model_head(model)
        flat = hidden.flatten(0, 1)[torch.arange(len(targets))]
        if head == "model":
            flat, call, trained = model_head.module(flat), Tensor.float, []
        else:
            call, trained = model_head, model_head.trainable_parameters()
        loss, _ = head_loss(flat, call, targets, head_parameters=trained, chunk_tokens=chunk_tokens)
        del hidden, flat
        head_bytes = watch.peak - saved
        watch.restart_peak()
    loss.backward()
    peak = max(peak, watch.peak)
    for hook in hooks:
        hook.remove()
    return _Pass(saved - copies, copies, max(0, peak - saved), head_bytes)


def _hidden_states(model: nn.Module, ids: Tensor, pixels: Tensor | None) -> Tensor:
    """Last hidden states of one row of segments, without what depends on their borders' values."""
    base = unwrap_adapter(model)
    decoder = base.get_decoder()
    is_packed = decoder.config._attn_implementation == PACKED_SDPA
    rows, length = ids.shape
    if is_packed:
        ids = ids.reshape(1, -1)
    words = {"input_ids": ids}
    if pixels is not None:
        words = {"inputs_embeds": _with_images(base, ids, pixels)}
    if not is_packed:
        return decoder(**words, use_cache=False).last_hidden_state
    borders = np.arange(rows + 1) * length  # read by tolist() only: no value of a fake tensor
    with no_packing_mask(length):
        out = decoder(
            **words, use_cache=False, cu_seq_lens_q=borders,
            cu_seq_lens_k=borders, max_length_q=length, max_length_k=length,
        )  # fmt: skip
    return out.last_hidden_state.reshape(rows, length, -1)


def _with_images(base: nn.Module, ids: Tensor, pixels: Tensor) -> Tensor:
    """Embeddings with the images' features in them, float [B, T, H]: LLaVA's own way from pixels
    to there, without its count of image tokens, which reads values."""
    config, model = base.config, base.model
    seen = model.vision_tower(pixels, output_hidden_states=True, return_dict=True)
    features = seen.hidden_states[config.vision_feature_layer]
    if config.vision_feature_select_strategy == "default":
        features = features[:, 1:]
    features = model.multi_modal_projector(features).flatten(0, 1)
    embeds = base.get_input_embeddings()(ids)
    places = torch.zeros(*ids.shape, 1, dtype=torch.bool).expand_as(embeds)
    return embeds.masked_scatter(places, features.to(embeds.dtype))


def _kind(layer: nn.Module) -> Any:
    """What tells layers that cost differently apart."""
    parameters = tuple(
        (name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters()
    )
    return type(layer), getattr(layer, "attention_type", None), parameters


def _copy_with_layers(llm: nn.Module, chosen: list[int] | None) -> nn.Module:
    """A copy, with the chosen layers only."""
    decoder = unwrap_adapter(llm).get_decoder()
    layers = decoder_layers(decoder)
    if layers is None or chosen is None:
        return copy.deepcopy(llm).train()
    name = next(name for name, child in decoder.named_children() if child is layers)
    try:  # the other layers are taken out first: copying them is most of the time
        setattr(decoder, name, nn.ModuleList(layers[index] for index in chosen))
        return copy.deepcopy(llm).train()
    finally:
        setattr(decoder, name, layers)


def _make_fake(model: nn.Module, *, trained: torch.dtype, frozen: torch.dtype) -> None:
    """Puts fake CPU tensors in place of all tensors; tied ones stay tied."""
    fakes: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fakes[id(tensor)] = tensor, _fake(tensor, trained, frozen)
                store[name] = fakes[id(tensor)][1]


def _fake(tensor: Tensor, trained: torch.dtype, frozen: torch.dtype) -> Tensor:
    dtype = tensor.dtype
    if isinstance(tensor, nn.Parameter):
        if dtype.is_floating_point:
            dtype = trained if tensor.requires_grad else frozen
        fake = torch.empty(tensor.shape, dtype=dtype, device="cpu")
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return torch.empty(tensor.shape, dtype=dtype, device="cpu")


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Fused(torch.autograd.Function):
    """Stands for a fused attention kernel; has its memory, not its result."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[-1])
        log_sum = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Query float [B, H, T, D], key and value [B, Hkv, T, D] -> float [B, T, H, D]."""
    return _Fused.apply(query, key, value), None


AttentionInterface.register(FUSED_ATTENTION, _fused_attention)
AttentionMaskInterface.register(FUSED_ATTENTION, lambda *args, **kwargs: None)
