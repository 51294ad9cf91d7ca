"""What an image-text model answers about an image, before and after an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtuner_lite.export.verify import Comparison
from xtuner_lite.models.image_inputs import image_token_id
from xtuner_lite.models.packed_forward import unwrap_adapter

_QUESTIONS = ("What does the picture show?", "Describe the image.")
_NUM_NEW_TOKENS = 8
_IMAGE_SIZE = (96, 64)


@dataclass(frozen=True)
class ImageAnswers:
    """What a model said.

    Args:
        prompts: token ids int64 [1, t] of each prompt.
        images: model inputs of each prompt's image.
        tokens: the greedy tokens that follow, int64 [n].
        logits: float32 [t + n - 1, V] for each prompt with its tokens.
        has_processor: whether the image was a picture that went through the model's processor.
    """

    prompts: list[Tensor]
    images: list[dict[str, Tensor]]
    tokens: list[Tensor]
    logits: list[Tensor]
    has_processor: bool


@torch.no_grad()
def image_answers(model: Any, folder: Path) -> ImageAnswers:
    """Asks a model about an image.

    Args:
        model: an image-text model in float32, or a PeftModel around one.
        folder: where its processor lies, if it has one.
    """
    base = unwrap_adapter(model)
    prompts, images, has_processor = _prompts(base, folder)
    answers = [_continued(base, ids, image) for ids, image in zip(prompts, images)]
    return ImageAnswers(
        prompts, images, [tokens for tokens, _ in answers], [logits for _, logits in answers],
        has_processor,
    )  # fmt: skip


@torch.no_grad()
def compare_answers(answers: ImageAnswers, model: Any, tolerance: float) -> Comparison:
    """How far another model is from these answers, on the same tokens.

    Args:
        answers: of the source.
        model: the export, in float32.
        tolerance: of the largest difference of any logit, in standard deviations of the logits.
    """
    std = float(torch.cat([logits.flatten() for logits in answers.logits]).std())
    largest, ties, problems = 0.0, [], []
    pairs = zip(answers.prompts, answers.images, answers.tokens, answers.logits)
    for number, (ids, image, tokens, logits) in enumerate(pairs):
        whole = torch.cat([ids, tokens[None, :-1]], dim=1)
        other = model(input_ids=whole, **image, use_cache=False).logits[0].float()
        if other.shape != logits.shape:
            problems.append(
                f"prompt {number}: {list(other.shape)} logits instead of {list(logits.shape)}"
            )
            continue
        largest = max(largest, float((other - logits).abs().max()))
        for place in range(ids.shape[1] - 1, whole.shape[1]):
            said, wanted = int(other[place].argmax()), int(logits[place].argmax())
            if said != wanted:
                gap = float(logits[place, wanted] - logits[place, said])
                text = f"prompt {number}, token {place}: {said} instead of {wanted}, by {gap:.2g}"
                (ties if gap <= tolerance * std else problems).append(text)
    if not largest <= tolerance * std:
        problems.append(
            f"logits differ by {largest / std:.2g} of their standard deviation, {tolerance:g} is "
            "allowed"
        )
    return Comparison(
        num_prompts=len(answers.prompts), num_new_tokens=_NUM_NEW_TOKENS,
        max_logit_difference=largest, logit_std=std, tolerance=tolerance,
        tokens_equal=not ties and not problems, near_ties=ties, problems=problems,
    )  # fmt: skip


def _prompts(base: Any, folder: Path) -> tuple[list[Tensor], list[dict[str, Tensor]], bool]:
    if (folder / "processor_config.json").is_file():
        from xtuner_lite.images.vision_inputs import vision_of
        from xtuner_lite.models.processors import load_processor

        tokenizer = load_processor(folder)
        vision = vision_of(tokenizer)
        picture = _picture()
        inputs, tokens = vision.model_inputs([picture]), vision.expansion(picture.size)
        asked = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in _QUESTIONS]
        begin = tokenizer("User: ", add_special_tokens=False)["input_ids"]
        rows = [[*begin, *tokens, *question] for question in asked]
        return [torch.tensor([row]) for row in rows], [inputs] * len(rows), True
    config = base.config
    size = config.vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    random = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, height, width, generator=random)
    image = [image_token_id(base)] * config.image_seq_length
    vocabulary = min(config.get_text_config().vocab_size, image_token_id(base))
    words = [[(7919 * (i + 1) * (j + 3)) % vocabulary for j in range(8)] for i in range(2)]
    rows = [[*row[:3], *image, *row[3:]] for row in words]
    return [torch.tensor([row]) for row in rows], [{"pixel_values": pixels}] * 2, False


def _picture() -> Any:
    """A picture with shapes and colours, always the same."""
    from PIL import Image, ImageDraw

    picture = Image.linear_gradient("L").resize(_IMAGE_SIZE).convert("RGB")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((10, 8, 50, 48), fill=(200, 40, 30))
    draw.rectangle((60, 20, 88, 56), fill=(20, 90, 210))
    return picture


def _continued(base: Any, ids: Tensor, image: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The greedy tokens after a prompt, int64 [n], and all logits but the last, [t + n - 1, V]."""
    whole = ids
    for _ in range(_NUM_NEW_TOKENS):
        logits = base(input_ids=whole, **image, use_cache=False).logits[0].float()
        whole = torch.cat([whole, logits[-1].argmax().reshape(1, 1)], dim=1)
    return whole[0, ids.shape[1] :], logits
