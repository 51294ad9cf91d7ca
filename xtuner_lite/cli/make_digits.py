"""``xtuner-lite make-digits``: write the image data of the two-stage demo."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

HELP = "write images of handwritten digits with captions, questions and a test set (LLaVA format)"

#: Names of the files in the folder; the shipped configs read them.
CAPTIONS_FILE, QUESTIONS_FILE, TEST_FILE = "captions.json", "questions.json", "test.json"
DEFAULT_SIZE = 112  # pixels: 8 x 8 patches of 14
_LARGEST = 1024
_IMAGES = "[0-9][0-9][0-9][0-9].png"  # what our images are called; others are left alone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments to its parser."""
    parser.add_argument("out", metavar="OUT_DIR", help="folder to write into; made when missing")
    parser.add_argument(
        "--size",
        type=int,
        default=DEFAULT_SIZE,
        help="pixels of an image's side (default: %(default)s)",
    )
    parser.add_argument(
        "--num-test",
        type=int,
        default=300,
        metavar="N",
        help="images kept for testing, of 1,797 (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the split and the words (default: %(default)s)"
    )
    parser.add_argument(
        "--force", action="store_true", help="write again into a folder that has such files"
    )


def run(args: argparse.Namespace) -> int:
    """Writes images and files and says what is in them. Returns the exit code.

    Raises:
        DigitsError: a number that cannot be used.
        OutputError: the files are there, and --force is not given.
        ImportError: scikit-learn is missing.
    """
    folder = Path(args.out).expanduser()
    counts = write_digits(
        folder, size=args.size, num_test=args.num_test, seed=args.seed, force=args.force
    )
    for name, what in zip((CAPTIONS_FILE, QUESTIONS_FILE, TEST_FILE), counts):
        print(f"wrote {what} to {folder / name}")
    print("the images lie beside them, in images/")
    print("train on them: smollm2_135m_dinov2_small_pretrain_digits, then ..._finetune_digits")
    return 0


def write_digits(
    folder: Path, *, size: int = DEFAULT_SIZE, num_test: int = 300, seed: int = 0,
    force: bool = False,
) -> Sequence[str]:  # fmt: skip
    """Writes the images (PNG) and the three files of rows; what is in each file, in words.

    Raises:
        DigitsError: ``size`` is below 8 or above 1024, or see build_digit_rows.
        OutputError: a file is there and ``force`` is False.
        ImportError: scikit-learn is missing.
    """
    from xtuner_lite.cli.make_identity import OutputError, write_rows
    from xtuner_lite.data.digits import (
        TEST_DIR,
        TRAIN_DIR,
        DigitsError,
        build_digit_rows,
        draw_digit,
        load_scikit_digits,
    )

    if not 8 <= size <= _LARGEST:
        raise DigitsError(f"size is {size}; an image has 8 to {_LARGEST} pixels a side")
    files = [folder / name for name in (CAPTIONS_FILE, QUESTIONS_FILE, TEST_FILE)]
    images = [image for part in (TRAIN_DIR, TEST_DIR) for image in (folder / part).glob(_IMAGES)]
    if not force and (there := [file for file in [*files, *images] if file.exists()]):
        raise OutputError(
            f"{there[0]} exists and is not overwritten; give another folder, or --force to "
            "replace it"
        )
    greys, targets = load_scikit_digits()
    rows = build_digit_rows(targets, num_test=num_test, seed=seed)
    for part in (TRAIN_DIR, TEST_DIR):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for old in (folder / part).glob(_IMAGES):  # of another split
            old.unlink()
    for path, index in rows.indices.items():
        draw_digit(greys[index], size).save(folder / path)
    write_rows(rows.captions, files[0], force=force)
    write_rows(rows.questions, files[1], force=force)
    write_rows(rows.test, files[2], force=force)
    return (
        f"{len(rows.captions)} captions",
        f"{len(rows.questions)} conversations of two questions",
        f"{len(rows.test)} questions about {num_test} other images",
    )
