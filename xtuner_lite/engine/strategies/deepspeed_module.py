"""The method as DeepSpeed sees it, and weights that ZeRO-3 leaves whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from xtuner_lite.models.packed_forward import unwrap_adapter
from xtuner_lite.structures import Batch, LossOutput


class TupleForward(nn.Module):
    """What DeepSpeed sees as the model: the method under autocast, with the loss in a tuple.

    DeepSpeed finds tensors in tuples, not in a LossOutput; an autocast around it, it switches off.
    """

    def __init__(self, method: nn.Module, context: Callable[[], AbstractContextManager]) -> None:
        super().__init__()
        self.method = method
        self.context = context

    def forward(self, batch: Batch) -> tuple[Tensor, LossOutput]:
        """(loss sum, the method's output)."""
        with self.context():
            output = self.method(batch)
        return output.loss_sum, output


def language_model_head(model: nn.Module) -> nn.Module | None:
    """The head of the language model in a method; None where it has none."""
    llm = getattr(model, "llm", None)
    get_head = getattr(unwrap_adapter(llm), "get_output_embeddings", None) if llm else None
    return get_head() if get_head else None


@contextmanager
def without_hooks(module: nn.Module | None) -> Iterator[None]:
    """Take away from ``module`` the forward hooks that the block gives it."""
    parts = list(module.modules()) if module is not None else []
    kinds = [hooks for m in parts for hooks in (m._forward_pre_hooks, m._forward_hooks)]
    before = [set(hooks) for hooks in kinds]
    yield
    for hooks, known in zip(kinds, before, strict=True):
        for key in set(hooks) - known:
            del hooks[key]


def keep_gathered(zero3: Any, parameters: list[nn.Parameter]) -> None:
    """Let ZeRO-3 hold ``parameters`` whole on every rank, except within the optimizer's step.

    Args:
        zero3: DeepSpeed's optimizer of stage 3, or its DeepSpeedZeRoOffload where none trains.
        parameters: of modules whose hooks do not fetch them (``without_hooks``).
    """
    for parameter in parameters:
        parameter.is_external_param = True  # a module that shares it does not release it
        if not parameter.ds_persist:
            parameter.ds_persist = True
            zero3.persistent_parameters.append(parameter)


def gather_missing(parameters: list[nn.Parameter]) -> None:
    """Gather those of ``parameters`` that are cut at the moment; the same ones on every rank."""
    missing = [p for p in parameters if p.ds_status.name == "NOT_AVAILABLE"]
    if missing:
        missing[0].all_gather(missing)
