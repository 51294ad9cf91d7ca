"""The three parts of an image-text model, and what in them trains or gets an adapter."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from xtuner_lite.models.image_inputs import is_image_text

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

Part = Literal["llm", "visual_encoder", "projector"]
#: Children of an encoder that turn its features into embeddings, so belong to the projector.
_MERGERS = ("merger", "deepstack_merger_list")
#: Settings of two peft configs that may differ though one adapter holds both.
_MAY_DIFFER = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class PartNames:
    """How the names of each part's modules begin, in an image-text model."""

    llm: tuple[str, ...]
    visual_encoder: tuple[str, ...]
    mergers: tuple[str, ...]

    def part_of(self, name: str) -> Part:
        """The part that a module or parameter of that name belongs to."""
        if _is_under(name, self.mergers):
            return "projector"
        if _is_under(name, self.visual_encoder):
            return "visual_encoder"
        return "llm" if _is_under(name, self.llm) else "projector"


def find_parts(model: PreTrainedModel) -> PartNames:
    """The parts of an image-text model (no PeftModel): encoder, language model, what is between.

    Raises:
        ValueError: it has no encoder for images.
    """
    encoder = model.get_encoder(modality="image") if is_image_text(model) else model
    if encoder is model or encoder is model.base_model:
        raise ValueError(
            f"{type(model).__name__} has no encoder for images; name an image-text model: "
            "llm=dict(type=load_image_text_model, path=...), or take SupervisedFinetune for text"
        )
    text = [model.get_decoder(), model.get_output_embeddings()]
    names = {id(module): name for name, module in model.named_modules()}
    visual = names[id(encoder)]
    mergers = [f"{visual}.{name}" for name in _MERGERS if hasattr(encoder, name)]
    return PartNames(
        llm=tuple(names[id(module)] for module in text if module is not None),
        visual_encoder=(visual,),
        mergers=tuple(mergers),
    )


def target_part(
    model: PreTrainedModel, config: PeftConfig, parts: Collection[Part], skip: Collection[str] = ()
) -> None:
    """Restricts an adapter to parts of the model: sets ``config.target_modules``.

    What it asks for is read as peft reads it: nothing or 'all-linear' means every linear layer but
    the head, a list the ends of names, a text a pattern for whole names.

    Args:
        model: the image-text model.
        config: changed in place.
        parts: where adapters may go.
        skip: names of modules that get none all the same.

    Raises:
        ValueError: nothing is left of it there.
    """
    wanted = getattr(config, "target_modules", None) or "all-linear"
    names = find_parts(model)
    head = model.get_output_embeddings()
    inside = {
        name: module for name, module in model.named_modules() if names.part_of(name) in parts
    }
    if wanted == "all-linear":
        chosen = [n for n, m in inside.items() if isinstance(m, nn.Linear) and m is not head]
    elif isinstance(wanted, str):
        chosen = [name for name in inside if re.fullmatch(wanted, name)]
    else:
        chosen = [n for n in inside if any(n == w or n.endswith(f".{w}") for w in wanted)]
    chosen = [name for name in chosen if name not in skip]
    if not chosen:
        leaves = {n.rpartition(".")[2] for n, m in inside.items() if isinstance(m, nn.Linear)}
        raise ValueError(
            f"target_modules={wanted!r} of the adapter for {' and '.join(parts)} names no module "
            f"there; its linear layers: {', '.join(sorted(leaves))}"
        )
    config.target_modules = pattern_of(chosen, [name for name, _ in model.named_modules()])


def merge_adapters(llm: PeftConfig, visual_encoder: PeftConfig) -> PeftConfig:
    """One adapter config for both parts; each must have gone through target_part.

    Raises:
        ValueError: they differ in more than rank, alpha and targets, which one adapter cannot do.
    """
    own, other = llm.to_dict(), visual_encoder.to_dict()
    different = sorted(
        key for key in own.keys() | other.keys()
        if key not in _MAY_DIFFER and (own.get(key) or None) != (other.get(key) or None)
    )  # fmt: skip
    if different or type(llm) is not type(visual_encoder):
        shown = [f"{key}={own.get(key)!r} and {other.get(key)!r}" for key in different]
        raise ValueError(
            f"llm_lora ({type(llm).__name__}) and visual_encoder_lora "
            f"({type(visual_encoder).__name__}) differ in {', '.join(shown) or 'their type'}; they "
            "are one adapter, which may differ in r, lora_alpha and target_modules only: give both "
            "the same values"
        )
    targets, ranks = visual_encoder.target_modules, "rank_pattern"
    for key, value in ((ranks, "r"), ("alpha_pattern", "lora_alpha")):
        if hasattr(llm, key):
            # The first pattern that fits a name counts: the encoder's own stand first.
            patterns = {**(getattr(visual_encoder, key) or {})}
            patterns[targets] = getattr(visual_encoder, value)
            setattr(llm, key, {**patterns, **(getattr(llm, key) or {})})
        elif getattr(llm, value, None) != getattr(visual_encoder, value, None):
            raise ValueError(
                f"{type(llm).__name__} has one {value} for all layers; give llm_lora and "
                "visual_encoder_lora the same"
            )
    llm.target_modules = f"{llm.target_modules}|{targets}"
    return llm


def pattern_of(names: Iterable[str], all_names: Iterable[str]) -> str:
    """A regular expression that matches ``names`` and no other of ``all_names``."""
    names = set(names)
    short = {re.sub(r"(?<=\.)\d+(?=\\?\.|$)", r"\\d+", name.replace(".", r"\.")) for name in names}
    pattern = "|".join(sorted(short))
    if {name for name in all_names if re.fullmatch(pattern, name)} != names:
        pattern = "|".join(re.escape(name) for name in sorted(names))
    return f"(?:{pattern})"


def unreached_parameters(model: nn.Module, output: Tensor) -> set[str]:
    """Names of the parameters from which no gradient path leads to ``output``.

    Args:
        model: its parameters wanted gradients when ``output`` was computed.
        output: float, with its graph.
    """
    reached, seen, queue = set(), set(), [output.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            reached.add(id(leaf))
        queue += [following for following, _ in node.next_functions]
    return {name for name, p in model.named_parameters() if id(p) not in reached}


@contextmanager
def all_wanting_gradients(model: nn.Module) -> Iterator[None]:
    """Every parameter wants a gradient inside, no dropout; all is as it was afterwards."""
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    was_training = model.training
    model.eval()
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        with torch.enable_grad():
            yield
    finally:
        model.train(was_training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])


def unused_of_tower(tower: PreTrainedModel, select_layer: int) -> set[str]:
    """Names of a vision tower's parameters that its chosen hidden state does not depend on.

    Layers behind the chosen one, the last norm, poolers: they cannot train, and DDP waits for
    gradients of all that does.
    """
    config = tower.config
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (1, getattr(config, "num_channels", 3), height, width)
    pixels = torch.zeros(shape, dtype=tower.dtype, device=tower.device)
    with all_wanting_gradients(tower):
        out = tower(pixels, output_hidden_states=True, return_dict=True)
        return unreached_parameters(tower, out.hidden_states[select_layer])


def _is_under(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
