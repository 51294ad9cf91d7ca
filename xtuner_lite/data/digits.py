"""Image data of real handwritten digits: captions, questions, and a part kept for testing.

The images are the 1,797 digits that scikit-learn carries (UCI's "Optical Recognition of Handwritten
Digits", 8x8 pixels, 17 greys). The texts were written for this project.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

NUM_IMAGES = 1797
NUM_TEST = 300
#: Folders of the images. Whoever reads the files can see what was learnt from what.
TRAIN_DIR, TEST_DIR = "images/train", "images/test"

_MAX_GREY = 16  # of scikit-learn's images

#: One wording: in a short run every learnt token should be about the digit.
CAPTION = "A handwritten {digit}."
#: Asked of an image in the captions' rows; the pre-training config keeps the image alone.
CAPTION_REQUESTS = ("Describe the image.", "What does the image show?", "Give a short caption.")


class Kind(NamedTuple):
    """One kind of question: its phrasings, and the answer for a digit."""

    questions: tuple[str, ...]
    answer: Callable[[int], str]


KINDS: dict[str, Kind] = {
    "which_digit": Kind(
        (
            "Which digit is this?",
            "What digit do you see?",
            "Which number is written here?",
            "Name the digit in the image.",
        ),
        lambda digit: str(digit),
    ),
    "larger_than_five": Kind(
        (
            "Is it larger than five?",
            "Is this digit greater than 5?",
            "Is the number above five?",
        ),
        lambda digit: "Yes" if digit > 5 else "No",
    ),
    "even_or_odd": Kind(
        (
            "Is it even or odd?",
            "Is this number odd or even?",
            "Even or odd?",
        ),
        lambda digit: "Odd" if digit % 2 else "Even",
    ),
}


class DigitsError(ValueError):
    """A size or number that cannot be used."""

    exit_code = 2  # a mistake of the user's, told without traceback


@dataclass(frozen=True)
class DigitRows:
    """What is written: LLaVA rows whose ``image`` is a path like 'images/train/0007.png'.

    Rows depend on the seed alone.
    """

    captions: list[dict[str, Any]]
    """Stage one: an image and its caption, once for each image of the training part."""
    questions: list[dict[str, Any]]
    """Stage two: an image and two questions, once for each image of the training part."""
    test: list[dict[str, Any]]
    """One question a row, with its ``kind``; the answer is the last turn."""
    digits: dict[str, int]
    """Image path -> the digit it shows."""
    indices: dict[str, int]
    """Image path -> its index in scikit-learn's data."""


def build_digit_rows(targets: np.ndarray, *, num_test: int = NUM_TEST, seed: int = 0) -> DigitRows:
    """Splits the images and writes their texts.

    Args:
        targets: int [N], the digit of each image.
        num_test: images kept for testing; every kind of question is asked of each.
        seed: of the split, the order and the choice of words.

    Raises:
        DigitsError: ``num_test`` leaves nothing to train on, or nothing to test with.
    """
    total = len(targets)
    if not 0 < num_test < total:
        raise DigitsError(
            f"num_test is {num_test}; of {total} images at least one is for testing and one for "
            f"training: give a number from 1 to {total - 1}"
        )
    chooser = random.Random(seed)
    order = list(range(total))
    chooser.shuffle(order)
    paths = {
        index: f"{TEST_DIR if place < num_test else TRAIN_DIR}/{index:04d}.png"
        for place, index in enumerate(order)
    }
    test, train = order[:num_test], order[num_test:]
    digit_of = {index: int(targets[index]) for index in order}
    return DigitRows(
        captions=[_caption(paths[i], digit_of[i], chooser) for i in train],
        questions=[_conversation(paths[i], digit_of[i], chooser) for i in train],
        test=[
            _row(f"{paths[i]}:{kind}", paths[i], [(KINDS[kind].questions[0], kind)], digit_of[i])
            | {"kind": kind}
            for i in test
            for kind in KINDS
        ],
        digits={paths[i]: digit_of[i] for i in order},
        indices={paths[i]: i for i in order},
    )


def _caption(path: str, digit: int, chooser: random.Random) -> dict[str, Any]:
    return {
        "id": path,
        "image": path,
        "conversations": [
            {"from": "human", "value": f"<image>\n{chooser.choice(CAPTION_REQUESTS)}"},
            {"from": "gpt", "value": CAPTION.format(digit=digit)},
        ],
    }


def _conversation(path: str, digit: int, chooser: random.Random) -> dict[str, Any]:
    """Which digit it is, mostly asked first, and one more question, each in any phrasing."""
    first, *others = KINDS
    kinds = [first, chooser.choice(others)]
    if chooser.random() < 1 / 3:  # the other one is asked of images alone too
        kinds.reverse()
    asked = [(chooser.choice(KINDS[kind].questions), kind) for kind in kinds]
    return _row(path, path, asked, digit)


def _row(name: str, path: str, asked: list[tuple[str, str]], digit: int) -> dict[str, Any]:
    turns = []
    for number, (question, kind) in enumerate(asked):
        mark = "" if number else "<image>\n"
        turns.append({"from": "human", "value": mark + question})
        turns.append({"from": "gpt", "value": KINDS[kind].answer(digit)})
    return {"id": name, "image": path, "conversations": turns}


def load_scikit_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: greys float [1797, 8, 8] from 0 to 16, and the digits int [1797].

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    data = load_digits()
    return data.images, data.target


def draw_digit(greys: np.ndarray, size: int) -> Any:
    """An image, white on black, ``size`` pixels wide and high, smoothly enlarged.

    Args:
        greys: float [8, 8], 0 (paper) to 16 (ink).
        size: pixels.

    Returns:
        A PIL image in mode "L".
    """
    import numpy as np
    from PIL import Image

    levels = np.round(np.clip(greys / _MAX_GREY, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(levels).resize((size, size), Image.Resampling.BICUBIC)
