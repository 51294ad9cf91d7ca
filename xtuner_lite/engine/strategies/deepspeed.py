"""DeepSpeed's ZeRO: optimizer state, gradients and weights cut over the ranks, on GPU or CPU."""

from __future__ import annotations

import atexit
import dataclasses
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xtuner_lite.engine.distributed import Ranks
from xtuner_lite.engine.optim import OptimWrapper
from xtuner_lite.engine.pieces import Piece, PieceReader
from xtuner_lite.engine.strategies.deepspeed_agreement import check_agreement, run_facts
from xtuner_lite.engine.strategies.deepspeed_config import (
    check_config,
    passed_through,
    read_config,
)
from xtuner_lite.engine.strategies.deepspeed_module import (
    TupleForward,
    gather_missing,
    keep_gathered,
    language_model_head,
    without_hooks,
)
from xtuner_lite.engine.strategies.deepspeed_pieces import load_share_pieces, share_pieces
from xtuner_lite.engine.strategies.deepspeed_start import (
    check_optimizer,
    ensure_process_group,
    import_deepspeed,
    use_cpu_adam,
)
from xtuner_lite.engine.strategies.deepspeed_weights import (
    choose_half_weights,
    masters_of,
    store_weights,
    whole_tensors,
)
from xtuner_lite.engine.strategies.deepspeed_zero import (
    FlatGroups,
    SplitParameters,
    ZeroOptimizer,
)
from xtuner_lite.engine.strategies.single_device import TorchStrategy
from xtuner_lite.registry import STRATEGIES
from xtuner_lite.structures import DTYPE_NAMES, Batch, LossOutput

_SHORT_NAMES = {getattr(torch, long): short for short, long in DTYPE_NAMES.items()}


@STRATEGIES.register_module()
class DeepSpeed(TorchStrategy):
    """ZeRO stage 1, 2 or 3. Losses, norms and weights are those of one device up to rounding.

    Batch size, accumulation, clipping, precision and optimizer are the config's; a DeepSpeed JSON
    that says otherwise is an error. Needs the package ``deepspeed`` (``pip install deepspeed``).

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

    keeps_gradients = False  # ZeRO moves them into its flat shares during backward

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
        self._deepspeed = import_deepspeed(self.device)
        zero = check_config(self._values, self._source)
        self.stage = int(zero.stage)
        self.is_sharded = self.stage == 3
        self._offloads = zero.offload_optimizer is not None
        self._half_weights, self._cpu_adam = half_weights, cpu_adam
        self._batch_size: int | None = None
        self._engine: Any = None
        self._forward: TupleForward | None = None
        self._zero: ZeroOptimizer | None = None
        self._names: dict[int, str] = {}
        self._is_half = False  # the model's own weights are bf16 copies of float32 ones
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
        half = train and choose_half_weights(
            model, self._half_weights, self.precision, stage=self.stage
        )
        store_weights(model, self.precision, half=half)
        self._is_half = half
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
        return {name: whole for name, whole in self.stream_weights(names) if whole is not None}

    @torch.no_grad()
    def stream_weights(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor | None]]:
        """See Strategy.stream_weights."""
        state = self.model.state_dict(keep_vars=True)
        if self._engine is None or not (self.is_sharded or self._is_half):  # whole as they are
            yield from ((name, state[name].detach()) for name in names if name in state)
            return
        trained, masters = {}, {}
        if self._zero is not None:
            masters = masters_of(self._zero.shares())
            parameters = self.model.parameters()
            trained = {id(p): self._names[id(p)] for p in parameters if p.requires_grad}
        yield from whole_tensors(
            state, names, masters, trained,
            device=self.device, is_main=self.is_main, world_size=self.world_size,
        )  # fmt: skip

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
        facts = run_facts(
            optim_wrapper, batch_size=self._batch_size, world_size=self.world_size, dtype=dtype
        )
        check_agreement(self._values, facts, self._source)

    def _refuse_unsplittable(self, model: nn.Module) -> None:
        packed = [n for n, p in model.named_parameters() if not p.is_floating_point()]
        if self.stage == 3 and packed:
            raise ValueError(
                f"ZeRO stage 3 cuts every weight, and {len(packed)} of this model are quantised "
                f"({packed[0]}, ...): bitsandbytes keeps their scales beside them and cannot use a "
                "cut one. Use config='zero2' (the 4-bit base stays whole on each GPU), or load the "
                "base unquantised."
            )

    def _start_engine(self, model: nn.Module, train: bool) -> None:
        config = self._engine_config()
        self._forward = TupleForward(model, self.forward_context)
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
        head = language_model_head(model) if self.stage == 3 else None
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
            "bf16": {"enabled": self._is_half},
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


def _silence_unknown_output() -> None:
    # It warns that it finds no tensor in the method's LossOutput; TupleForward hands it the loss.
    sys.modules["deepspeed.runtime.zero.utils"].warned = True


def _destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
