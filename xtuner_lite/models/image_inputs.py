"""What the forward of an image-text model takes beside token ids, for packed samples and alone.

Families differ: some want to know which tokens are an image's, some give each token three positions
(time, height, width), and each lays the pixels out in its own way.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Arguments that say which tokens are an image's (1) and which are text (0).
_TYPE_ARGUMENTS = ("token_type_ids", "mm_token_type_ids")
#: Model types whose pixel_values have the images in their second dimension, [1, images, ...].
_IMAGES_IN_SECOND = ("idefics2", "idefics3", "smolvlm")
#: Model types in which tokens of an image see each other both ways, in windows too.
_IMAGES_READ_BOTH_WAYS = ("gemma3",)


def is_image_text(base: nn.Module) -> bool:
    """Whether a transformers model has an encoder for images beside its language model."""
    config = getattr(base, "config", None)
    return config is not None and hasattr(config, "vision_config")


def image_token_id(base: PreTrainedModel) -> int | None:
    """Id of the token whose embedding a feature of an image replaces; None for a text model."""
    for name in ("image_token_id", "image_token_index"):
        if (value := getattr(base.config, name, None)) is not None:
            return int(value)
    return None


def packed_inputs(
    base: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    images: dict[str, Tensor],
) -> dict[str, Any]:
    """Inputs of the model's own body (``base.base_model``) for packed samples with images.

    Args:
        base: the transformers model.
        input_ids: int64 [B, T].
        position_ids: int64 [B, T], restarting at 0 on every segment.
        cu_seqlens: int32 [S + 1], segment borders in the flattened [B * T] tokens.
        images: model inputs of all images, in the order of their tokens.
    """
    inputs = {
        "input_ids": input_ids,
        "position_ids": rope_positions(base, input_ids, position_ids, cu_seqlens, images),
        **_token_types(base, input_ids),
        **_as_dtype(base, images),
    }
    if base.config.model_type in _IMAGES_READ_BOTH_WAYS:
        inputs["attention_mask"] = _both_ways_masks(base, input_ids, position_ids)
    return inputs


def plain_inputs(
    base: PreTrainedModel, input_ids: Tensor, images: dict[str, Tensor]
) -> dict[str, Any]:
    """Inputs of the model's own forward for one sample int64 [1, t], as its processor's are."""
    return {"input_ids": input_ids, **_token_types(base, input_ids), **_as_dtype(base, images)}


def rope_positions(
    base: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    images: dict[str, Tensor] | None,
) -> Tensor:
    """The positions that the family's rotary embedding takes, beginning anew in every segment.

    Returns:
        ``position_ids`` itself, int64 [B, T]; or int64 [4, B, T] where tokens have three positions
        (time, height, width): first the plain ones, which tell transformers the segments, then
        these.
    """
    body = base.base_model
    if not hasattr(body, "get_rope_index"):
        return position_ids
    if images is None:
        return position_ids.unsqueeze(0).expand(4, -1, -1)
    # Segments as the rows of one padded batch: the images go to them in order.
    flat, lengths = input_ids.reshape(-1), cu_seqlens.diff().tolist()
    lengths = [length for length in lengths if length]
    rows = nn.utils.rnn.pad_sequence(list(flat.split(lengths)), batch_first=True)
    ends = torch.tensor(lengths, device=flat.device).unsqueeze(1)
    mask = torch.arange(rows.shape[1], device=flat.device) < ends  # [S, longest]
    grids = {name: value for name, value in images.items() if name.endswith("_thw")}
    options = _token_types(base, rows)
    accepted = inspect.signature(body.get_rope_index).parameters
    options = {name: value for name, value in options.items() if name in accepted}
    positions, _ = body.get_rope_index(rows, attention_mask=mask.long(), **grids, **options)
    positions = positions[:, mask].reshape(3, *input_ids.shape)
    return torch.cat([position_ids.unsqueeze(0), positions.to(position_ids)])


def split_images(
    base: PreTrainedModel, segments: list[Tensor], images: dict[str, Tensor]
) -> list[dict[str, Tensor]] | None:
    """The model inputs of each segment's images; None where the layout does not tell.

    Args:
        base: the transformers model.
        segments: int64 [t] each, all segments of the batch in order.
        images: model inputs of all their images.
    """
    token = image_token_id(base)
    counts = [int((segment == token).sum()) for segment in segments]
    if "image_grid_thw" in images:
        return _split_by_grid(base, counts, images)
    dim = _images_dim(base)
    numbers = {value.shape[dim] for value in images.values() if value.ndim > dim}
    if len(numbers) != 1:
        return None
    number = numbers.pop()
    runs = [_runs(segment == token) for segment in segments]
    if sum(runs) == number:  # each image is one run of tokens
        rows = runs
    elif number and sum(counts) % number == 0:  # each has equally many
        rows = [count // (sum(counts) // number) for count in counts]
    else:
        return None
    if sum(rows) != number:
        return None
    parts = {name: value.split(rows, dim) for name, value in images.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(segments))]


def join_images(
    base: PreTrainedModel, first: dict[str, Tensor], second: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The images of one segment and then of another, as split_images gave them."""
    dim = 0 if "image_grid_thw" in first else _images_dim(base)
    return {name: torch.cat([value, second[name]], dim) for name, value in first.items()}


def _both_ways_masks(
    base: PreTrainedModel, input_ids: Tensor, position_ids: Tensor
) -> dict[str, Tensor]:
    """Masks [B, 1, T, T] of each kind of layer: within segments, causal but inside an image.

    transformers 5.23 makes them too, but looks an image's tokens up by their place in the segment
    instead of in the row (layers with windows), so that text would see ahead.
    """
    config = base.config.get_text_config()
    segment = (position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1).cumsum(1)
    is_image = input_ids == image_token_id(base)
    begins = is_image & ~nn.functional.pad(is_image, (1, 0))[:, :-1]
    image = torch.where(is_image, begins.cumsum(1), 0)  # [B, T], 0 for text
    place = torch.arange(input_ids.shape[1], device=input_ids.device)
    causal = place[:, None] >= place[None, :]
    same_image = (image[:, :, None] == image[:, None, :]) & is_image[:, None, :]
    full = (segment[:, :, None] == segment[:, None, :]) & (causal | same_image)  # [B, T, T]
    near = place[None, :] > place[:, None] - config.sliding_window
    masks = {"full_attention": full, "sliding_attention": full & near}
    if config._attn_implementation == "sdpa":
        return {kind: mask.unsqueeze(1) for kind, mask in masks.items()}
    lowest = torch.finfo(base.dtype).min
    zeros = torch.zeros((), dtype=base.dtype, device=input_ids.device)
    return {
        kind: zeros.where(mask, torch.full_like(zeros, lowest)).unsqueeze(1)
        for kind, mask in masks.items()
    }


def _images_dim(base: PreTrainedModel) -> int:
    return 1 if base.config.model_type in _IMAGES_IN_SECOND else 0


def _split_by_grid(
    base: PreTrainedModel, counts: list[int], images: dict[str, Tensor]
) -> list[dict[str, Tensor]] | None:
    """By each image's grid of patches, int64 [images, 3]; pixel_values is [patches of all, ...]."""
    grid = images["image_grid_thw"]
    patches = grid.prod(-1).tolist()
    merged = getattr(base.config.vision_config, "spatial_merge_size", 1) ** 2
    parts, image = [], 0
    for count in counts:
        first, tokens = image, 0
        while tokens < count and image < len(patches):
            tokens += patches[image] // merged
            image += 1
        if tokens != count:
            return None
        start, end = sum(patches[:first]), sum(patches[:image])
        parts.append(
            {
                name: value[start:end] if name == "pixel_values" else value[first:image]
                for name, value in images.items()
            }
        )
    return parts


def _runs(marks: Tensor) -> int:
    """Number of unbroken runs of True in bool [t]."""
    padded = torch.nn.functional.pad(marks.int(), (1, 0))
    return int((padded.diff() == 1).sum())


def _token_types(base: PreTrainedModel, input_ids: Tensor) -> dict[str, Tensor]:
    accepted = inspect.signature(type(base.base_model).forward).parameters
    token = image_token_id(base)
    types = (input_ids == token).to(torch.int64) if token is not None else None
    return {name: types for name in _TYPE_ARGUMENTS if name in accepted and types is not None}


def _as_dtype(base: PreTrainedModel, images: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pixels in the dtype of the encoder; not every family casts them itself."""
    encoder = base.get_encoder(modality="image")
    dtype = next((p.dtype for p in encoder.parameters() if p.is_floating_point()), torch.float32)
    return {
        name: value.to(dtype) if value.is_floating_point() and name == "pixel_values" else value
        for name, value in images.items()
    }


def segment_lengths(cu_seqlens: Tensor) -> list[int]:
    """Tokens of each segment."""
    return [end - start for start, end in pairwise(cu_seqlens.tolist())]
