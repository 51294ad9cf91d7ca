"""The words every part of the project shares: messages, batch keys and the result of a method.

Imports no torch, so that data tools and configs can use it without paying for torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

#: Label of a position that teaches nothing (the value torch's cross entropy ignores by default).
IGNORE_INDEX = -100

#: Short names of the compute dtypes that configs may use beside torch's own.
DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


class Message(TypedDict, total=False):
    """One turn of a conversation, in the form the OpenAI API and Hugging Face templates use.

    ``role`` and ``content`` are required (``content`` may be '' or None beside ``tool_calls``).
    """

    role: Role
    content: str | list[dict[str, Any]] | None  # text, or parts: {"type": "text" | "image", ...}
    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str
    reasoning_content: str
    loss: bool | float  # False: not learnt; a number: weight of its tokens; absent: by train_on


class Batch(TypedDict, total=False):
    """What a collator returns and a training method takes. B samples, T tokens, S segments.

    A segment is one conversation or document inside a packed sample; the padding behind a sample is
    a segment of its own. There is no attention mask on purpose: transformers isolates packed
    segments from restarting position_ids only while ``attention_mask`` is None.
    """

    input_ids: Tensor  # int64 [B, T]
    labels: Tensor  # int64 [B, T], not shifted; IGNORE_INDEX on every segment's first token
    position_ids: Tensor  # int64 [B, T], restarts at 0 on every segment
    cu_seqlens: Tensor  # int32 [S + 1], segment borders in the flattened [B * T] tokens
    loss_weights: Tensor  # float32 [B, T], optional; absent means 1 for every label
    num_tokens: int  # tokens that are not padding
    row_ids: list[list[str]]  # B lists: the source rows of each sample, 'file:line'
    segment_sources: Tensor  # int64 [S], in mixtures: index into source_names; -1 for padding
    source_names: list[str]  # in mixtures: the data sets it is made of
    # With a vision tokenizer, in every batch: what the model's forward takes for the images of all
    # samples, in the order of their tokens; without any image those of a filler segment.
    images: dict[str, Tensor]
    num_images: int  # without the filler's


@dataclass
class LossOutput:
    """What a training method returns for one micro-batch.

    The loss is a sum over counted units, never a mean, so that the loop can divide by the units of
    the whole optimizer step (all micro-batches, all ranks) and accumulation changes nothing.
    """

    loss_sum: Tensor
    """float32 scalar with a graph: the loss summed over the units of this micro-batch."""
    num_units: float
    """Units summed over: target tokens for SFT, pairs for DPO. 0 is allowed."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """name -> sum over the units (logged divided by num_units), or (sum, count) for another
    divisor. Detached scalars. A step whose count is 0 does not log the name. 'loss/<source>' is the
    loss of one data set of a mixture; its count is logged as 'units/<source>'. Every rank gives the
    same names."""
