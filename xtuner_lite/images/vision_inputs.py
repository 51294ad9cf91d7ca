"""What turns images into a model's inputs: its processor, and the tokens that stand for an image.

A vision tokenizer is a tokenizer that carries a :class:`VisionInputs`; everything that takes a
tokenizer takes it too. The processor is transformers' own, so that training, chat and whoever opens
the exported folder see the same pixels and the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xtuner_lite.images.files import ImageError, ImageFiles, image_name, is_data_uri, to_rgb
from xtuner_lite.structures import Message
from xtuner_lite.templates.adapter import ChatTemplate
from xtuner_lite.templates.layout import Layout, RowRefused, Span, TemplateError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

_ATTRIBUTE = "vision"
#: Keys of a processor's output that belong to the text.
_TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
#: Width and height of the blank image that a batch without images gets.
_FILLER_SIZE = (64, 64)

Size = tuple[int, int]
"""Width and height, in pixels."""


def vision_of(tokenizer: Any) -> VisionInputs | None:
    """The VisionInputs that a tokenizer carries; None for a tokenizer of text."""
    return getattr(tokenizer, _ATTRIBUTE, None)


def give_vision(tokenizer: PreTrainedTokenizerBase, processor: ProcessorMixin) -> None:
    """Makes a tokenizer a vision tokenizer.

    Args:
        tokenizer: carries the chat template; its ids are those of ``processor.tokenizer``.
        processor: transformers' processor of the model.

    Raises:
        ValueError: the processor knows no image token.
    """
    setattr(tokenizer, _ATTRIBUTE, VisionInputs(processor))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes a tokenizer's files, and those of the processor that it carries."""
    tokenizer.save_pretrained(str(folder))
    if (vision := vision_of(tokenizer)) is not None:
        vision.save_pretrained(folder)


class VisionInputs:
    """Images as model inputs, and the text that stands in their places.

    Args:
        processor: transformers' processor: image processor, tokenizer and image token.

    Attributes:
        image_token: what a chat template writes where an image stands.
        image_token_id: id of the token whose embedding is replaced by a feature of the image.

    Raises:
        ValueError: the processor knows no image token.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor
        self.image_token: str = getattr(processor, "image_token", None) or ""
        if not self.image_token:
            raise ValueError(
                f"{type(processor).__name__} has no image_token, so the places of images in a text "
                "cannot be told; use the processor of an image-text model"
            )
        self._texts: dict[Size, str] = {}
        self._counts: dict[Size, int] = {}
        self._filler: tuple[list[int], dict[str, Tensor]] | None = None
        tokenizer = processor.tokenizer
        # Gemma 3 writes one token where an image begins and repeats another.
        token = getattr(tokenizer, "image_token", None) or self.image_token
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(token)

    # ------------------------------------------------------------------ text

    def text_of(self, size: Size) -> str:
        """The text that stands for an image of that size: the image token, repeated and framed.

        Raises:
            ImageError: the image processor refuses the size.
            TemplateError: the processor writes tokens that are no text.
        """
        size = (int(size[0]), int(size[1]))
        if size not in self._texts:
            ids = self._processed(self.image_token, [_blank(size)])["input_ids"][0]
            ids = [int(i) for i in ids]
            tokenizer = self.processor.tokenizer
            text = tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            if tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
                raise TemplateError(
                    f"{type(self.processor).__name__} writes tokens for an image that its "
                    "tokenizer does not read back; this model's images cannot be trained on"
                )
            self._counts[size] = ids.count(self.image_token_id)
            self._texts[size] = text
        return self._texts[size]

    def expansion(self, size: Size) -> list[int]:
        """Token ids that stand for an image of that size."""
        text = self.text_of(size)
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def num_image_tokens(self, size: Size) -> int:
        """How many of these are image tokens, each of which becomes a feature of the image."""
        self.text_of(size)
        return self._counts[(int(size[0]), int(size[1]))]

    def expand(self, text: str, sizes: Sequence[Size]) -> str:
        """A rendered text with the images' tokens in their places.

        Raises:
            TemplateError, RowRefused: it has another number of places than there are images.
        """
        return self.expand_layout(Layout(text, (), ends_learnt=False), sizes).text

    def expand_layout(self, layout: Layout, sizes: Sequence[Size]) -> Layout:
        """A layout with the images' tokens in their places; none of them is learnt.

        Args:
            layout: a rendered conversation; the image token stands once for each image.
            sizes: of the images, in order.

        Raises:
            TemplateError: the template writes no places for the images.
            RowRefused: it writes another number of them.
        """
        pieces = layout.text.split(self.image_token)
        if len(pieces) - 1 != len(sizes):
            self._refuse(len(pieces) - 1, len(sizes))
        texts = [self.text_of(size) for size in sizes]
        whole, shifts, at = [pieces[0]], [], len(pieces[0])
        for text, piece in zip(texts, pieces[1:]):
            shifts.append((at, len(text)))  # where the mark stood, and what stands there now
            whole += [text, piece]
            at += len(self.image_token) + len(piece)
        spans = [span for old in layout.spans for span in self._moved(old, shifts)]
        return Layout("".join(whole), tuple(spans), layout.ends_learnt)

    def _moved(self, span: Span, shifts: list[tuple[int, int]]) -> list[Span]:
        """The span in the expanded text, cut where images stand in it."""
        mark = len(self.image_token)
        moved, begin, offset = [], span.start, 0
        for at, size in shifts:
            if at >= span.end:
                break
            if at >= span.start:
                moved.append(Span(begin + offset, at + offset, span.weight))
                begin = at + mark
            offset += size - mark
        moved.append(Span(begin + offset, span.end + offset, span.weight))
        return [piece for piece in moved if piece.end > piece.start]

    def _refuse(self, found: int, wanted: int) -> None:
        if found == 0:
            raise TemplateError(
                f"the chat template writes no image token ({self.image_token!r}) for "
                f"{wanted} image(s): the model would not see them. Use the model's own template, "
                "or load_llava_processor, which teaches a text template to write images"
            )
        raise RowRefused(
            f"the template writes {found} image token(s) for {wanted} image(s); a template that "
            "drops or repeats images, or a text that holds the token itself"
        )

    def check_no_image_token(self, text: str, what: str) -> None:
        """Raises RowRefused if a text holds the image token, which only an image may put there."""
        for token in {self.image_token, self.processor.tokenizer.decode([self.image_token_id])}:
            if token and token in text:
                raise RowRefused(
                    f"{what} holds the text {token!r}, which stands for an image; take it out, or "
                    "give the row its images (images=[...] with as many <image> marks)"
                )

    def prompt(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        *,
        template: ChatTemplate | None = None,
    ) -> tuple[list[int], dict[str, Tensor]]:
        """What a model generates a reply from: token ids, and the model inputs of the images.

        Args:
            messages: the conversation; images are PIL images or what ``image_name`` takes, paths
                from the working directory.
            tools: JSON schemas of tools, for the template.
            template: of the tokenizer; None makes one.

        Raises:
            ImageError: an image cannot be read.
            TemplateError, RowRefused: the template writes no images, or refuses the conversation.
        """
        files = ImageFiles(Path(Path.cwd().anchor))
        pictures, plain = [], []
        for index, message in enumerate(messages):
            content = message.get("content")
            if isinstance(content, list):
                parts = []
                for part in content:
                    if part.get("type") == "image":
                        pictures.append(_opened(part["image"], files))
                        part = {"type": "image"}
                    else:
                        self.check_no_image_token(part["text"], f"message {index + 1}")
                    parts.append(part)
                message = {**message, "content": parts}
            elif content:
                self.check_no_image_token(content, f"message {index + 1}")
            plain.append(message)
        tokenizer = self.processor.tokenizer
        text = (template or ChatTemplate(tokenizer)).render_prompt(plain, tools)
        text = self.expand(text, [picture.size for picture in pictures])
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids, self.model_inputs(pictures)

    # ---------------------------------------------------------------- pixels

    def model_inputs(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What the model's forward takes for these images: pixel_values and what goes with it.

        Args:
            images: RGB, in the order of their tokens.

        Raises:
            ImageError: the image processor refuses one of them.
        """
        if not images:
            return {}
        text = self.image_token * len(images)
        data = self._processed(text, list(images), return_tensors="pt")
        return {key: value for key, value in data.items() if key not in _TEXT_KEYS}

    def filler(self) -> tuple[list[int], dict[str, Tensor]]:
        """Token ids and model inputs of a small blank image, for batches without one.

        They are made once: treat them as read-only.
        """
        if self._filler is None:
            self._filler = self.expansion(_FILLER_SIZE), self.model_inputs([_blank(_FILLER_SIZE)])
        return self._filler

    def _processed(self, text: str, images: list[Image.Image], **options: Any) -> Any:
        try:
            return self.processor(text=[text], images=images, add_special_tokens=False, **options)
        except (ValueError, TypeError, ZeroDivisionError, IndexError) as error:
            sizes = ", ".join(f"{image.width}x{image.height}" for image in images)
            raise ImageError(
                f"{type(self.processor).__name__} refuses image(s) of {sizes} pixels: {error}"
            ) from error

    # ---------------------------------------------------------------- others

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the processor's files; the tokenizer's are written with them, alike."""
        self.processor.save_pretrained(str(folder))

    def settings(self) -> dict[str, Any]:
        """Plain values that decide tokens and pixels, for the data cache's key."""
        processor = self.processor.to_dict()
        return {"class": type(self.processor).__name__, "settings": repr(sorted(
            (key, repr(value)) for key, value in processor.items() if key != "tokenizer"
        ))}  # fmt: skip


def images_of(messages: Sequence[Message]) -> list[Any]:
    """What the image parts of a conversation name, in order."""
    return [
        part["image"]
        for message in messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
        if isinstance(part, dict) and part.get("type") == "image"
    ]


def image_spans(input_ids: np.ndarray, image_token_id: int, counts: Sequence[int]) -> list[Size]:
    """Tokens [first, end) of each image in a row.

    Args:
        input_ids: int [T].
        counts: image tokens of each image, in order; their sum is that of the row.
    """
    places = np.flatnonzero(input_ids == image_token_id)
    borders = np.cumsum([0, *counts])
    return [
        (int(places[begin]), int(places[end - 1]) + 1)
        for begin, end in zip(borders[:-1], borders[1:])
    ]


def _opened(image: Any, files: ImageFiles) -> Image.Image:
    """A picture of a conversation in RGB: given as one, or named."""
    if hasattr(image, "convert") and hasattr(image, "size"):
        return to_rgb(image)
    name = image_name(image)
    return files.open(name if is_data_uri(name) else str(Path(name).absolute()))


def _blank(size: Size) -> Image.Image:
    from PIL import Image

    return Image.new("RGB", size, (128, 128, 128))
