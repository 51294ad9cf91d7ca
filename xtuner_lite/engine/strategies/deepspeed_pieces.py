"""Training state of ZeRO's flat shares, as pieces of parameters and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from xtuner_lite.engine.checkpoint import CheckpointError
from xtuner_lite.engine.pieces import WEIGHT, Piece, PieceReader
from xtuner_lite.engine.strategies.deepspeed_zero import Share, Slice


def share_pieces(shares: Iterable[Share], optimizer: Optimizer) -> Iterator[Piece]:
    """The pieces of this rank: the float32 weights that are updated, and their state.

    Raises:
        CheckpointError: the optimizer keeps state that is not one value per element.
    """
    for share in shares:
        tensors, scalars = _sorted_state(share.flat, optimizer)
        for part in share.slices:
            piece = {WEIGHT: part.of(share.flat.detach())}
            piece.update({key: part.of(value) for key, value in tensors.items()})
            yield Piece(part.name, part.shape, part.start, part.stop, piece, dict(scalars))


@torch.no_grad()
def load_share_pieces(shares: Iterable[Share], optimizer: Optimizer, reader: PieceReader) -> None:
    """Put weights and state back into the shares; the model's own weights are not touched.

    Raises:
        CheckpointError: a parameter is missing or has another shape; its state is kept in blocks,
            or differs within one share where ZeRO keeps it once (the step count).
    """
    for share in shares:
        state: dict[str, Tensor] = {}
        scalars: dict[str, Any] | None = None
        for part in share.slices:
            piece = reader.piece(part.name, part.shape, part.start, part.stop)
            if piece.opaque:
                raise CheckpointError(
                    f"{reader.folder}: the optimizer's state of {part.name} is kept in blocks, "
                    "which ZeRO cannot cut. Resume with the strategy of the saved run, or start a "
                    "new run from its weights with --load-from."
                )
            part.of(share.flat).copy_(piece.tensors.pop(WEIGHT))
            for key, value in piece.tensors.items():
                if key not in state:
                    state[key] = _buffer(share.flat, optimizer, key, value.dtype)
                part.of(state[key]).copy_(value)
            scalars = _agreed(scalars, piece.scalars, part, reader)
        _set_state(share.flat, optimizer, {**state, **(scalars or {})})


def _sorted_state(flat: Tensor, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(one value per element, one value for the share) of the optimizer's state."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for key, value in optimizer.state.get(flat, {}).items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            # CPUAdam counts steps in an int, torch in a float32 tensor; stored in torch's way.
            is_count = key == "step" and not isinstance(value, Tensor)
            scalars[key] = torch.tensor(float(value)) if is_count else value
        elif value.numel() == flat.numel():
            tensors[key] = value.detach().reshape(-1)
        else:
            raise CheckpointError(
                f"optimizer {type(optimizer).__name__} keeps {key} of {value.numel()} values for "
                f"{flat.numel()} elements; a checkpoint under ZeRO holds state of one value per "
                "element. Use AdamW, or another strategy."
            )
    return tensors, scalars


def _buffer(flat: Tensor, optimizer: Optimizer, key: str, dtype: torch.dtype) -> Tensor:
    """The state's own tensor where there is one (a roll-back), else zeros, as padding has."""
    own = optimizer.state.get(flat, {}).get(key)
    if isinstance(own, Tensor) and own.shape == flat.shape and own.dtype == dtype:
        return own
    return torch.zeros_like(flat, dtype=dtype, requires_grad=False)


def _agreed(
    known: dict[str, Any] | None, new: dict[str, Any], part: Slice, reader: PieceReader
) -> dict[str, Any]:
    if known is not None and {k: float(v) for k, v in known.items()} != {
        k: float(v) for k, v in new.items()
    }:
        raise CheckpointError(
            f"{reader.folder}: weight {part.name} was updated another number of times than the "
            f"weights beside it ({new} and {known}); ZeRO counts steps once for all of them. "
            "Resume with the strategy of the saved run."
        )
    return new


def _set_state(flat: Tensor, optimizer: Optimizer, state: dict[str, Any]) -> None:
    if not state:
        optimizer.state.pop(flat, None)
        return
    step = state.get("step")
    if isinstance(step, Tensor) and type(optimizer).__name__ == "DeepSpeedCPUAdam":
        state["step"] = int(step.item())
    optimizer.state[flat] = state
