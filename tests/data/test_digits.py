"""The digits data: answers that fit the digit, and test images that nothing learns from."""

import numpy as np
import pytest

from xtuner_lite.data.digits import (
    CAPTION,
    KINDS,
    DigitsError,
    build_digit_rows,
    draw_digit,
)

TARGETS = np.arange(40) % 10


def rows(**options):
    return build_digit_rows(TARGETS, **{"num_test": 12, **options})


def test_training_and_test_share_no_image():
    made = rows()
    learnt = {row["image"] for row in made.captions} | {row["image"] for row in made.questions}
    tested = {row["image"] for row in made.test}
    assert (len(learnt), len(tested)) == (28, 12)
    assert len({made.indices[path] for path in learnt | tested}) == 40
    assert all(path.startswith("images/train/") for path in learnt)
    assert all(path.startswith("images/test/") for path in tested)


def test_every_answer_fits_the_digit_of_its_image():
    made, kind_of = rows(), {}
    for kind, (questions, _) in KINDS.items():
        kind_of |= dict.fromkeys(questions, kind)
    seen = set()
    for row in [*made.questions, *made.test]:
        digit = made.digits[row["image"]]
        assert digit == TARGETS[made.indices[row["image"]]]
        turns = [turn["value"] for turn in row["conversations"]]
        assert turns[0].startswith("<image>\n")
        assert "".join(turns).count("<image>") == 1
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            kind = kind_of[question.removeprefix("<image>\n")]
            wanted = {
                "which_digit": str(digit),
                "larger_than_five": "Yes" if digit in (6, 7, 8, 9) else "No",
                "even_or_odd": "Even" if digit in (0, 2, 4, 6, 8) else "Odd",
            }[kind]
            assert answer == wanted
            seen.add((kind, answer))
    assert len(seen) == 10 + 2 + 2


def test_captions_name_the_digit():
    made = rows()
    for row in made.captions:
        _, caption = row["conversations"]
        digit = made.digits[row["image"]]
        assert caption["value"] == CAPTION.format(digit=digit)


def test_a_test_row_says_its_kind():
    made = rows()
    assert len(made.test) == 36
    assert [row["kind"] for row in made.test].count("even_or_odd") == 12
    assert len({row["id"] for row in made.test}) == 36
    assert all(len(row["conversations"]) == 2 for row in made.test)


def test_the_seed_decides_everything():
    assert rows() == rows()
    assert rows(seed=1).indices != rows().indices


@pytest.mark.parametrize("number", [0, 40, -1])
def test_a_split_without_a_part_is_refused(number):
    with pytest.raises(DigitsError, match="give a number from 1 to 39"):
        rows(num_test=number)


def test_ink_is_white_and_the_size_is_as_asked():
    greys = np.zeros((8, 8))
    greys[:, 4:] = 16
    image = draw_digit(greys, 56)
    assert (image.mode, image.size) == ("L", (56, 56))
    pixels = np.asarray(image)
    assert pixels[:, :20].max() == 0
    assert pixels[:, -20:].min() == 255
