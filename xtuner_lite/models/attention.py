"""Attention for packed samples: each segment attends to itself alone, and nothing else is computed.

Registers ``packed_sdpa`` with transformers' AttentionInterface; importing this module is enough. No
model class is patched. With the flash-attention style keywords ``cu_seq_lens_q`` and
``cu_seq_lens_k`` it runs torch's scaled_dot_product_attention segment by segment (on CUDA one
variable-length flash kernel where torch has it); without them it is transformers' own ``sdpa``, so
generation and padded evaluation behave as always.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PACKED_SDPA = "packed_sdpa"

# Longest segment of the forward pass in progress, when it hands segment borders to the attention
# layers. The mask function is called once per forward and cannot see those keywords, only this.
_longest_segment: int | None = None


def segment_kwargs(cu_seqlens: Tensor) -> dict[str, Any]:
    """Keywords that tell the attention layers of a transformers model where segments end.

    Args:
        cu_seqlens: int32 [S + 1], segment borders in the flattened tokens, from 0 to the end.
    """
    longest = int(cu_seqlens.diff().max())
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


@contextmanager
def no_packing_mask(longest_segment: int) -> Iterator[None]:
    """Skips building the [T, T] mask of a packed forward pass of a ``packed_sdpa`` model.

    Only for a forward pass that gets ``segment_kwargs``: there the borders replace the mask, which
    would cost T * T bytes. A layer that does not receive them raises instead of leaking.

    Args:
        longest_segment: tokens of the longest segment. Layers that see fewer tokens back than that
            (sliding windows, chunks) keep their mask.
    """
    global _longest_segment
    before, _longest_segment = _longest_segment, longest_segment
    try:
        yield
    finally:
        _longest_segment = before


@torch.compiler.disable  # its answer depends on the batch: a compiled graph would fix one
def packed_sdpa_mask(
    *args: Any, local_size: int | None = None, use_vmap: bool = False, **kwargs: Any
) -> Tensor | None:
    """transformers' sdpa mask (bool [B, 1, Q, K] or None), or None where borders replace it.

    Args:
        args: those of ``sdpa_mask``.
        local_size: how far back a sliding or chunked layer sees, in tokens.
        use_vmap: True when the model adds a pattern of its own to the causal one.
        kwargs: those of ``sdpa_mask``.
    """
    sees_all = local_size is None or local_size >= (_longest_segment or 0)
    if _longest_segment is not None and sees_all and not use_vmap:
        return None
    return sdpa_mask(*args, local_size=local_size, use_vmap=use_vmap, **kwargs)


@torch.compiler.disable  # segments differ in every batch: it would be compiled anew for each
def packed_sdpa_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention output, float [B, T, H, D], where every token sees earlier tokens of its segment.

    Args:
        module: the attention layer (read for ``num_key_value_groups`` only).
        query: float [B, H, T, D].
        key: float [B, Hkv, T, D], H a multiple of Hkv.
        value: the same as key.
        attention_mask: bool [B, 1, T, T] where the layer needs one of its own (sliding windows
            shorter than a segment, generation with padding); it then rules alone.
        dropout: probability of dropping an attention weight.
        scaling: factor on the scores; None means D ** -0.5.
        cu_seq_lens_q: int32 [S + 1], segment borders in the flattened [B * T] tokens.
        max_length_q: tokens of the longest segment.
        kwargs: those of transformers' ``sdpa``.

    Raises:
        RuntimeError: the mask was replaced by segment borders that did not reach this layer.
        ValueError: a soft cap on the scores is asked for, which sdpa cannot do.
    """
    if attention_mask is not None or cu_seq_lens_q is None:
        if attention_mask is None and _longest_segment is not None:
            raise RuntimeError(
                f"{type(module).__name__} did not receive the borders of the packed samples "
                "(cu_seq_lens_q), so they would see each other; load the model with attn='sdpa'"
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("softcap") is not None:
        raise ValueError(
            f"attention {PACKED_SDPA!r} got softcap={kwargs['softcap']}, which torch's sdpa cannot "
            "do; load the model with attn='eager' or, on a GPU, attn='flash_attention_2'"
        )
    varlen = _varlen_kernel(query, dropout)
    if varlen is not None:
        return _by_one_kernel(varlen, query, key, value, cu_seq_lens_q, max_length_q, scaling), None
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    lengths = _lengths_per_row(cu_seq_lens_q.tolist(), query.shape[0], query.shape[2])
    rows = [
        _by_segment(q, k, v, row_lengths, dropout, scaling)
        for q, k, v, row_lengths in zip(
            query.split(1), key.split(1), value.split(1), lengths, strict=True
        )
    ]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)), None


def _lengths_per_row(borders: list[int], num_rows: int, row_length: int) -> list[list[int]]:
    """Segment lengths of each of ``num_rows`` rows; checks that the segments tile every row."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    for start, end in pairwise(borders):
        if end > start:
            rows[start // row_length].append(end - start)
    if any(sum(row) != row_length for row in rows):
        raise ValueError(
            f"cu_seqlens {borders} do not tile {num_rows} x {row_length} tokens; segments must "
            "start at 0, follow each other and not run over the end of a row (check the collator)"
        )
    return rows


def _by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """One row: query, key, value float [1, H, T, D] -> float [1, T, H, D]."""
    # split, not slices: its backward is one concatenation instead of one zero-filled tensor each.
    parts = zip(
        query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True
    )
    outputs = [
        scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, scale=scaling, is_causal=True
        ).transpose(1, 2)
        for q, k, v in parts
    ]
    return outputs[0].contiguous() if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _by_one_kernel(
    varlen: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int | None,
    scaling: float | None,
) -> Tensor:
    """All segments in one call; query, key, value float [B, H, T, D] -> float [B, T, H, D]."""
    batch, _, tokens, _ = query.shape
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]  # [B * T, H, D]
    longest = longest or int(cu_seqlens.diff().max())
    cu_seqlens = cu_seqlens.to(query.device, torch.int32)
    out = varlen(
        *flat,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.unflatten(0, (batch, tokens))


def _varlen_kernel(query: Tensor, dropout: float) -> Any | None:
    """torch's variable-length flash attention where it can run this query, else None."""
    if not query.is_cuda or dropout or query.dtype not in (torch.float16, torch.bfloat16):
        return None
    return _load_varlen_kernel(query.device)


@lru_cache(maxsize=8)
def _load_varlen_kernel(device: torch.device) -> Any | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    return varlen_attn if torch.cuda.get_device_capability(device) >= (8, 0) else None


AttentionInterface.register(PACKED_SDPA, packed_sdpa_forward)
AttentionMaskInterface.register(PACKED_SDPA, packed_sdpa_mask)
