"""DeepSpeed's ZeRO: optimizer state, gradients and weights cut over the ranks, kept on GPU or CPU."""

from __future__ import annotations

import atexit
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xtuner_lite.engine.distributed import Ranks
from xtuner_lite.engine.optim import OptimWrapper
from xtuner_lite.engine.pieces import Piece, PieceReader
from xtuner_lite.engine.strategies.deepspeed_config import (
    check_config,
    contradictions,
    optimizer_facts,
    passed_through,
    read_config,
)
from xtuner_lite.engine.strategies.deepspeed_pieces import load_share_pieces, share_pieces
from xtuner_lite.engine.strategies.deepspeed_start import (
    check_optimizer,
    ensure_process_group,
    import_deepspeed,
    use_cpu_adam,
)
from xtuner_lite.engine.strategies.deepspeed_zero import (
    FlatGroups,
    SplitParameters,
    ZeroOptimizer,
    gather_missing,
    keep_gathered,
    without_hooks,
)
from xtuner_lite.engine.strategies.single_device import TorchStrategy
from xtuner_lite.models.packed_forward import unwrap_adapter
from xtuner_lite.registry import STRATEGIES
from xtuner_lite.structures import DTYPE_NAMES, Batch, LossOutput

_SHORT_NAMES = {getattr(torch, long): short for short, long in DTYPE_NAMES.items()}


@STRATEGIES.register_module()
class DeepSpeed(TorchStrategy):
    """ZeRO stage 1, 2 or 3. Losses, norms and weights are those of one device up to rounding.

    Batch size, accumulation, clipping, precision and optimizer are the config's; a DeepSpeed JSON that
    says otherwise is an error. Needs the package ``deepspeed`` (``pip install deepspeed``).

    Args:
        config: 'zero1', 'zero2', 'zero3', 'zero2_offload', 'zero3_offload' (XTuner's names
            deepspeed_zero2 ... too), a JSON file, or a dict of DeepSpeed's form. "auto" is filled.
        device: as SingleDevice's.
        half_weights: bf16 only. True stores what trains in bf16 too, beside float32 copies that are
            cut over the ranks: 2 bytes a parameter less. False stores it in float32, as the other
            strategies do. None takes True where more than half of the parameters train, in stages
            2 and 3; DeepSpeed's own bf16.enabled in a JSON means the same dtype, not this choice.
        cpu_adam: with an offloaded optimizer, take DeepSpeed's CPUAdam in the place of Adam and
            AdamW; it is compiled at its first use. False leaves torch's, several times slower.
        ranks: the processes of the run (filled in by the Runner).

    Raises:
        FileNotFoundError, ValueError: ``config`` is not found, not JSON or has keys that are
            unknown, not supported or in contradiction to the run's config.
        ImportError: DeepSpeed is not installed or too old.
    """

    def __init__(
        self,
        config: str | dict[str, Any],
        *,
        device: str | None = None,
        half_weights: bool | None = None,
        cpu_adam: bool = True,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(device, ranks=ranks)
        self._values, self._source = read_config(config)
        self._deepspeed = import_deepspeed(self.device, self.ranks.local_rank)
        zero = check_config(self._values, self._source)
        self.stage = int(zero.stage)
        self.is_sharded = self.stage == 3
        self._offloads = zero.offload_optimizer is not None
        self._half_weights, self._cpu_adam = half_weights, cpu_adam
        self._batch_size: int | None = None
        self._engine: Any = None
        self._forward: _Forward | None = None
        self._zero: ZeroOptimizer | None = None
        self._names: dict[int, str] = {}
        self._head: list[nn.Parameter] = []
        self._norm: Tensor | None = None
        if half_weights and self.stage == 1:
            raise ValueError(
                "strategy.half_weights=True needs ZeRO stage 2 or 3: stage 1 sums gradients in the "
                "dtype of the weights. Use config='zero2', which takes less memory besides."
            )

    def check_sections(
        self, train_dataloader: Any = None, optim_wrapper: Any = None, **others: Any
    ) -> None:
        """Compare the DeepSpeed config with sections of the run's config, before anything is built.

        Raises:
            ValueError: it contradicts them; both places and values are named.
        """
        if isinstance(train_dataloader, Mapping):
            self._batch_size = train_dataloader.get("batch_size", 1)
        self._check_against(optim_wrapper, dtype=None)

    def prepare(
        self, model: nn.Module, optim_wrapper: OptimWrapper | None, *, train: bool
    ) -> nn.Module:
        """See Strategy.prepare.

        Raises:
            ValueError: the DeepSpeed config contradicts ``optim_wrapper``; an optimizer or weights
                that ZeRO cannot cut.
        """
        self._set_precision(optim_wrapper)
        self._check_against(optim_wrapper, dtype=_SHORT_NAMES[self.precision.dtype])
        self._refuse_unsplittable(model)
        self.model = model
        self._store_weights(model, train)
        if ensure_process_group(self.ranks):
            atexit.register(_destroy_process_group)
        if not train and self.stage < 3:  # nothing is cut
            model.to(self.device)
            return model
        self._names = {id(p): name for name, p in model.named_parameters()}
        if train:
            self._build_optimizer(optim_wrapper)
            allow = bool(self._values.get("zero_allow_untested_optimizer", False))
            check_optimizer(optim_wrapper.optimizer, allow_untested=allow, source=self._source)
            if self._offloads and self._cpu_adam:
                use_cpu_adam(optim_wrapper, self.ranks)
        self._start_engine(model, train)
        return model

    def forward(self, batch: Batch, *, is_last: bool = True) -> LossOutput:
        """See Strategy.forward."""
        if self._engine is None:
            return super().forward(batch)
        gather_missing(self._head)
        self._forward.training = self.model.training
        if not (self.model.training and torch.is_grad_enabled()):
            return self._forward(batch)[1]
        self._engine.set_gradient_accumulation_boundary(is_last)
        loss_sum, output = self._engine(batch)
        # Hooks on the returned tensor tell DeepSpeed that backward begins; it may be another one.
        return dataclasses.replace(output, loss_sum=loss_sum)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """See Strategy.forward_context."""
        with self.precision.autocast():
            if self.is_sharded:  # the cache would keep a cast copy of every gathered weight
                torch.set_autocast_cache_enabled(False)
            yield

    def generation_context(self) -> AbstractContextManager:
        """See Strategy.generation_context."""
        gather_missing(self._head)
        return self.forward_context()

    def backward(self, loss_sum: Tensor, num_units: float, *, is_last: bool = True) -> None:
        """See Strategy.backward."""
        if self.precision.scaler is not None:
            self._engine.optimizer.override_loss_scale(self.precision.scaler.get_scale())
        self._engine.set_gradient_accumulation_boundary(is_last)
        # DeepSpeed takes the mean over the ranks of what each gives; the sum is wanted.
        loss = loss_sum / num_units * self.world_size
        self._engine.backward(loss, scale_wrt_gas=False)

    def clip_gradients(self) -> float:
        """See Strategy.clip_gradients; ``step`` cuts them."""
        self._norm = self._zero.scaled_norm()
        return self._norm.item() / float(self._engine.optimizer.loss_scale)

    def step(self) -> bool:
        """See Strategy.step; False also where the gradient is not finite without a scaler."""
        norm = self._norm if self._norm is not None else self._zero.scaled_norm()
        if not math.isfinite(norm.item()):
            self._norm = norm
            self.discard_gradients()
            return False
        with self._zero.known_norm(norm):
            self._engine.step()
        self._norm = None
        self._update_scale(found_inf=False)
        return True

    def discard_gradients(self) -> None:
        """See Strategy.discard_gradients."""
        self._zero.discard()
        norm, self._norm = self._norm, None
        self._update_scale(found_inf=norm is not None and not math.isfinite(norm.item()))

    @torch.no_grad()
    def full_weights(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """See Strategy.full_weights; float32 where they train. Empty on other ranks if cut."""
        state = self.model.state_dict(keep_vars=True)
        return {
            name: tensor
            for name, tensor in self._whole_tensors(state, names)
            if tensor is not None
        }

    @torch.no_grad()
    def stream_weights(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor | None]]:
        """See Strategy.stream_weights."""
        yield from self._whole_tensors(self.model.state_dict(keep_vars=True), names)

    def pieces(self) -> Iterable[Piece]:
        """See Strategy.pieces."""
        return share_pieces(self._zero.shares(), self.optim_wrapper.optimizer)

    def load_pieces(self, reader: PieceReader) -> None:
        """See Strategy.load_pieces."""
        with self.ranks.together():
            load_share_pieces(self._zero.shares(), self.optim_wrapper.optimizer, reader)
        self._zero.publish()

    def close(self) -> None:
        """Release what DeepSpeed holds of the model; training is over."""
        engine, self._engine, self._zero = self._engine, None, None
        if engine is not None:
            engine.destroy()

    # --- setting up

    def _check_against(self, optim_wrapper: Any, dtype: str | None) -> None:
        """Raises ValueError where the DeepSpeed config contradicts ``optim_wrapper`` (or a config).

        Args:
            dtype: the run's compute dtype, where it is known already.
        """
        read = _reader(optim_wrapper)
        accumulation, clip = read("accumulative_counts", 1), read("clip_grad", None) or {}
        if clip.get("norm_type", 2.0) != 2.0:
            raise ValueError(
                f"optim_wrapper.clip_grad.norm_type is {clip['norm_type']}; DeepSpeed clips by the "
                "2-norm only. Leave it out, or use another strategy."
            )
        facts: dict[str, tuple[Any, str]] = {
            "gradient_accumulation_steps": (accumulation, "optim_wrapper.accumulative_counts"),
            "gradient_clipping": (
                float(clip.get("max_norm", 0.0)), "optim_wrapper.clip_grad.max_norm (0: none)"
            ),
        }  # fmt: skip
        if self._batch_size is not None:
            place = "train_dataloader.batch_size"
            facts["train_micro_batch_size_per_gpu"] = (self._batch_size, place)
            facts["train_batch_size"] = (
                self._batch_size * accumulation * self.world_size,
                f"{place} x accumulative_counts x processes",
            )
        told = read("dtype", AUTO_DTYPE)
        if dtype is None and told != AUTO_DTYPE:
            dtype = {long: short for short, long in DTYPE_NAMES.items()}.get(told, told)
        if dtype is not None:
            place = f"optim_wrapper.dtype ({told!r}: {dtype})"
            facts["bf16.enabled"] = (dtype == "bf16", f"{place}, bf16,")
            facts["fp16.enabled"] = (dtype == "fp16", f"{place}, fp16,")
        facts |= optimizer_facts(read("optimizer_cfg", None) or read("optimizer", None))
        contradictions(self._values, facts, self._source)

    def _refuse_unsplittable(self, model: nn.Module) -> None:
        packed = [n for n, p in model.named_parameters() if not p.is_floating_point()]
        if self.stage == 3 and packed:
            raise ValueError(
                f"ZeRO stage 3 cuts every weight, and {len(packed)} of this model are quantised "
                f"({packed[0]}, ...): bitsandbytes keeps their scales beside them and cannot use a "
                "cut one. Use config='zero2' (the 4-bit base stays whole on each GPU), or load the "
                "base unquantised."
            )

    def _store_weights(self, model: nn.Module, train: bool) -> None:
        self.precision.prepare(model)
        if self._half_weights is None:
            floating = [p for p in model.parameters() if p.is_floating_point()]
            trained = sum(p.numel() for p in floating if p.requires_grad)
            most = trained > sum(p.numel() for p in floating) / 2
            self._half_weights = (
                train and most and self.stage > 1 and self.precision.dtype == torch.bfloat16
            )
        elif self._half_weights and self.precision.dtype != torch.bfloat16:
            raise ValueError(
                f"strategy.half_weights=True needs bf16, and optim_wrapper.dtype gives "
                f"{_SHORT_NAMES[self.precision.dtype]}; leave half_weights out, or set dtype='bf16'"
            )
        if self._half_weights:
            self.precision.reason += "; trained weights too, beside float32 copies (half_weights)"
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(torch.bfloat16)

    def _start_engine(self, model: nn.Module, train: bool) -> None:
        config = self._engine_config()
        self._forward = _Forward(model, self.forward_context)
        if self.stage == 3:
            _silence_unknown_output()
            self._deepspeed.zero.Init(module=model, config_dict_or_path=config)
            for buffer in model.buffers():
                buffer.data = buffer.data.to(self.device)
        else:
            model.to(self.device)
        optimizer = self.optim_wrapper.optimizer if train else None
        # The head runs chunk by chunk, and ranks have different numbers of chunks: were it gathered
        # for each, ranks would wait for each other for ever. ZeRO-3 keeps it gathered instead.
        head = _language_model_head(model) if self.stage == 3 else None
        with without_hooks(head):
            self._engine, *_ = self._deepspeed.initialize(
                model=self._forward, optimizer=optimizer, config=config, dist_init_required=False
            )
        atexit.register(self.close)
        zero = self._engine.optimizer
        if train:
            assert zero.optimizer is optimizer, "DeepSpeed put another optimizer in the place"
            kind = SplitParameters if self.stage == 3 else FlatGroups
            self._zero = kind(zero, self._names, self.rank)
        if head is not None:
            self._head = list(head.parameters())
            keep_gathered(zero, self._head)

    def _engine_config(self) -> dict[str, Any]:
        wrapper = self.optim_wrapper
        accumulation = wrapper.accumulative_counts if wrapper else 1
        clip = (wrapper.clip_grad if wrapper else None) or {}
        return {
            **passed_through(self._values),
            "train_micro_batch_size_per_gpu": self._batch_size or 1,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": float(clip.get("max_norm", 0.0)),
            "bf16": {"enabled": bool(self._half_weights)},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_allow_untested_optimizer": True,  # check_optimizer has decided
            "zero_force_ds_cpu_optimizer": False,
        }

    # --- inside a run

    def _update_scale(self, *, found_inf: bool) -> None:
        """What GradScaler.update does; DeepSpeed, not it, looks at the gradients."""
        scaler = self.precision.scaler
        if scaler is None:
            return
        state = scaler.state_dict()
        state["_growth_tracker"] = 0 if found_inf else state["_growth_tracker"] + 1
        if found_inf:
            state["scale"] *= state["backoff_factor"]
        elif state["_growth_tracker"] == state["growth_interval"]:
            state["scale"] *= state["growth_factor"]
            state["_growth_tracker"] = 0
        scaler.load_state_dict(state)

    def _whole_tensors(
        self, state: Mapping[str, Tensor], names: Iterable[str]
    ) -> Iterator[tuple[str, Tensor | None]]:
        if not (self.is_sharded and self._engine) and not self._half_weights:
            yield from ((name, state[name].detach()) for name in names if name in state)
            return
        masters = self._masters()
        for name in names:
            if name not in state:
                continue
            tensor = state[name]
            own = self._names.get(id(tensor))
            if own in masters or (own and tensor.requires_grad and self._zero):
                yield name, self._gather_master(tensor, masters.get(own, []))
            elif hasattr(tensor, "ds_id"):
                with self._deepspeed.zero.GatheredParameters([tensor]):
                    yield name, tensor.detach().cpu().clone() if self.is_main else None
            else:
                yield name, tensor.detach().cpu() if self.is_main else None

    def _masters(self) -> dict[str, list[tuple[int, int, Tensor]]]:
        """Name -> (start, stop, elements) of this rank's float32 weights."""
        found: dict[str, list[tuple[int, int, Tensor]]] = {}
        for share in self._zero.shares() if self._zero else ():
            for part in share.slices:
                entry = (part.start, part.stop, part.of(share.flat.detach()))
                found.setdefault(part.name, []).append(entry)
        return found

    def _gather_master(
        self, parameter: Tensor, parts: list[tuple[int, int, Tensor]]
    ) -> Tensor | None:
        shape = getattr(parameter, "ds_shape", parameter.shape)
        whole = torch.zeros(math.prod(shape), dtype=torch.float32, device=self.device)
        for start, stop, elements in parts:
            whole[start:stop] = elements
        if self.world_size > 1:
            dist.reduce(whole, dst=0)
        return whole.view(shape).cpu() if self.is_main else None


#: optim_wrapper.dtype before the device has decided.
AUTO_DTYPE = "auto"


class _Forward(nn.Module):
    """What DeepSpeed sees as the model: the method under autocast, with the loss in a tuple.

    DeepSpeed finds tensors in tuples, not in a LossOutput; and it switches off an autocast around it.
    """

    def __init__(
        self, method: nn.Module, context: Callable[[], AbstractContextManager]
    ) -> None:
        super().__init__()
        self.method = method
        self.context = context

    def forward(self, batch: Batch) -> tuple[Tensor, LossOutput]:
        """(loss sum, the method's output)."""
        with self.context():
            output = self.method(batch)
        return output.loss_sum, output


def _language_model_head(model: nn.Module) -> nn.Module | None:
    """The head of the language model in a method; None where it has none."""
    llm = getattr(model, "llm", None)
    get_head = getattr(unwrap_adapter(llm), "get_output_embeddings", None) if llm else None
    return get_head() if get_head else None


def _reader(optim_wrapper: Any) -> Callable[[str, Any], Any]:
    """A getter over an OptimWrapper, a config of one, or None."""
    if isinstance(optim_wrapper, Mapping):
        return optim_wrapper.get
    return lambda name, default: getattr(optim_wrapper, name, default)


def _silence_unknown_output() -> None:
    # It warns that it finds no tensor in the method's LossOutput; _Forward hands it the loss.
    sys.modules["deepspeed.runtime.zero.utils"].warned = True


def _destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
