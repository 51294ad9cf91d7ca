"""Questions with known answers, for the validation and test loops: asked, not learnt.

Three kinds of source become the same :class:`Question`: conversations whose last turn is the answer
(:class:`QuestionDataset`), multiple choice in MMBench's TSV form (:class:`MMBenchDataset`) and
places of things in RefCOCO's form (:class:`RefCOCODataset`).
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from xtuner_lite.data.choose_map_fn import map_function, recognised
from xtuner_lite.data.messages import BadRow, check_messages
from xtuner_lite.data.row_images import image_files
from xtuner_lite.data.sources import Row, open_sources, read_rows
from xtuner_lite.images.files import ImageError, image_name
from xtuner_lite.images.vision_inputs import images_of
from xtuner_lite.registry import DATASETS
from xtuner_lite.structures import Message

Box = tuple[float, float, float, float]
"""left, top, right, bottom, as shares of the image's width and height (0 to 1)."""


@dataclass(frozen=True)
class Question:
    """What is asked, and what is right."""

    name: str
    """The row's id, or its place in the file."""
    messages: tuple[Message, ...]
    """The conversation up to the question; images by name."""
    answers: tuple[str, ...]
    """Replies that are right; the first is shown."""
    kind: str | None = None
    """Figures are also given for each kind."""
    choices: tuple[tuple[str, str], ...] = ()
    """(letter, text) of each option, of a multiple-choice question."""
    box: Box | None = None
    """Of the thing that is asked for."""


class QuestionSet(Dataset, ABC):
    """Rows as questions; a subclass says what a row asks.

    The validation and test loops ask these questions (runner.reply_loops) instead of measuring a
    loss.

    Args:
        data: path, folder, glob or list of rows, as ChatDataset's.
        image_folder: image paths of the rows lie below it; None: beside the data file.
        limit: rows read at most; None reads all.
        name: in logs; default is the source's name.

    Raises:
        ValueError: there is no row, or a row is not of the form, or its image is missing or no
            image; it names the row.
        FileNotFoundError: the source is missing.
    """

    def __init__(
        self,
        data: Any,
        *,
        image_folder: str | Path | None = None,
        limit: int | None = None,
        name: str | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit!r} is too small; at least 1, or None")
        self.name = name or (str(data) if isinstance(data, (str, Path)) else "questions")
        sources = open_sources(data)
        self.files = image_files(sources, image_folder)
        rows = islice(chain.from_iterable(source.rows() for source in sources), limit)
        self._questions = [self._read(row) for row in rows]

    @abstractmethod
    def question_of(self, row: dict[str, Any], place: str) -> Question:
        """What a row asks. Raises BadRow or KeyError where it is not of the form."""

    def _read(self, row: Row) -> Question:
        if row.error is not None:
            raise ValueError(f"{row.place}: {row.error}")
        try:
            question = self.question_of(row.data, row.place)
            for image in images_of(question.messages):
                self.files.check(image_name(image))
            return question
        except ImageError as error:
            raise ValueError(f"{row.place}: {error}") from error
        except KeyError as error:
            given = ", ".join(map(str, row.data)) if isinstance(row.data, Mapping) else row.data
            raise ValueError(
                f"{row.place}: the row has no {error.args[0]!r}; it has: {given:.200}. Correct the "
                f"row, or choose another data set than {type(self).__name__}"
            ) from error
        except BadRow as error:
            raise ValueError(f"{row.place}: {error}") from error

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: int) -> Question:
        return self._questions[index]

    def opened(self, question: Question) -> list[Message]:
        """The question's messages with its images opened (PIL, RGB).

        Raises:
            ImageError: an image is missing, damaged or outside image_folder.
        """
        messages: list[Message] = []
        for message in question.messages:
            if isinstance(message["content"], list):
                parts = [self._opened_part(part, question.name) for part in message["content"]]
                message = {**message, "content": parts}
            messages.append(message)
        return messages

    def _opened_part(self, part: dict[str, Any], name: str) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        try:
            return {"type": "image", "image": self.files.open(image_name(part["image"]))}
        except ImageError as error:
            raise ImageError(f"question {name}: {error}") from error

    @property
    def fingerprint(self) -> str:
        """Digest of all questions and answers."""
        digest = hashlib.sha256()
        for question in self._questions:
            digest.update(repr(question).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:32]


@DATASETS.register_module()
class QuestionDataset(QuestionSet):
    """Conversations whose last turn is the right answer; everything before it is asked.

    Args:
        data, image_folder, limit, name: see QuestionSet.
        map_fn: as ChatDataset's; LLaVA rows, OpenAI messages and others are recognised.
        kind_key: key of a row that names the kind of question; rows without it have none.
        answers_key: key of a row that lists further right answers.
    """

    def __init__(
        self,
        data: Any,
        *,
        image_folder: str | Path | None = None,
        map_fn: str | Callable[..., Any] | dict[str, Any] = "auto",
        kind_key: str = "kind",
        answers_key: str = "answers",
        limit: int | None = None,
        name: str | None = None,
    ) -> None:
        if map_fn == "auto":
            self._map_fn, _, _ = recognised(read_rows(data), name or str(data)[:80])
        else:
            self._map_fn = map_function(map_fn)
        self._kind_key, self._answers_key = kind_key, answers_key
        super().__init__(data, image_folder=image_folder, limit=limit, name=name)

    def question_of(self, row: dict[str, Any], place: str) -> Question:
        """See QuestionSet."""
        mapped = self._map_fn(row)
        messages = check_messages(mapped["messages"], images=True)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise BadRow("the last turn is not the assistant's, so there is no answer to compare")
        kind = row.get(self._kind_key)
        more = row.get(self._answers_key) or []
        answers = (messages[-1]["content"], *([more] if isinstance(more, str) else more))
        return Question(
            name=str(row.get("id", place)),
            messages=tuple(messages[:-1]),
            answers=tuple(str(answer) for answer in answers),
            kind=None if kind is None else str(kind),
        )


@DATASETS.register_module()
class MMBenchDataset(QuestionSet):
    """Multiple choice in MMBench's form: a TSV file with images in base64.

    Columns: ``index``, ``question``, ``image``, options ``A`` to ``E`` (empty ones are left out),
    ``answer`` (a letter), and if it likes ``hint``, ``category`` (the kind) and ``l2-category``. An
    ``image`` may be the index of an earlier row, whose image is meant.

    Args:
        data, limit, name: see QuestionSet.
        instruction: stands behind the options.
        kind_key: column that names the kind.
    """

    LETTERS = "ABCDE"

    def __init__(
        self,
        data: Any,
        *,
        instruction: str = "Answer with the option's letter from the given choices directly.",
        kind_key: str = "category",
        limit: int | None = None,
        name: str | None = None,
    ) -> None:
        self._instruction, self._kind_key = instruction, kind_key
        self._images: dict[str, str] = {}  # by the index of their row
        super().__init__(data, limit=limit, name=name)

    def question_of(self, row: dict[str, Any], place: str) -> Question:
        """See QuestionSet."""
        choices = tuple((letter, str(row[letter])) for letter in self.LETTERS if row.get(letter))
        answer = str(row.get("answer") or "").strip()
        if answer not in dict(choices):
            raise BadRow(
                f"the answer is {answer!r}, none of the options "
                f"{', '.join(dict(choices)) or '(there are none)'}; MMBench's test split has no "
                "answers: use the dev split"
            )
        lines = [str(row["hint"])] if row.get("hint") else []
        lines += [str(row["question"]), *(f"{letter}. {text}" for letter, text in choices)]
        encoded = self._image_of(row)
        image = {"type": "image", "image": f"data:image/jpeg;base64,{encoded}"}
        text = {"type": "text", "text": "\n" + "\n".join([*lines, self._instruction])}
        kind = row.get(self._kind_key)
        return Question(
            name=str(row.get("index", place)),
            messages=({"role": "user", "content": [image, text]},),
            answers=(answer,),
            kind=str(kind) if kind else None,
            choices=choices,
        )

    def _image_of(self, row: dict[str, Any]) -> str:
        """The image in base64, remembered for rows that name this one's."""
        image = str(row["image"]).strip()
        if image.isdigit():
            if image not in self._images:
                raise BadRow(
                    f"its image is that of the row with index {image}, and no row before it has "
                    "this index; keep the rows of the published file together, in their order"
                )
            image = self._images[image]
        if "index" in row:
            self._images[str(row["index"])] = image
        return image


@DATASETS.register_module()
class RefCOCODataset(QuestionSet):
    """Where something is in an image, in RefCOCO's form; the answer is a box.

    Rows of both forms XTuner reads: ``img_id`` ('COCO_train2014_000000581857_2'), ``sents``,
    ``bbox`` (left, top, width, height in pixels), ``height`` and ``width`` of the image; or
    ``image``, ``sents`` and ``bbox`` (left, top, right, bottom in percent).

    Args:
        data, image_folder, limit, name: see QuestionSet.
        instruction: the question; ``{}`` is the thing asked for.
        kind_key: key of a row that names the kind.
    """

    def __init__(
        self,
        data: Any,
        *,
        image_folder: str | Path | None = None,
        instruction: str = "[refer] give me the location of {}",
        kind_key: str = "kind",
        limit: int | None = None,
        name: str | None = None,
    ) -> None:
        if "{}" not in instruction:
            raise ValueError(f"instruction={instruction!r} has no {{}} for the thing asked for")
        self._instruction, self._kind_key = instruction, kind_key
        super().__init__(data, image_folder=image_folder, limit=limit, name=name)

    def question_of(self, row: dict[str, Any], place: str) -> Question:
        """See QuestionSet."""
        box, thing = _box_of(row), str(row["sents"])
        image = row["image"] if "image" in row else f"{_coco_number(row['img_id'])}.jpg"
        content = [
            {"type": "text", "text": self._instruction.replace("{}", thing) + "\n"},
            {"type": "image", "image": image},
        ]
        kind = row.get(self._kind_key)
        percent = [int(value * 100) for value in box]
        return Question(
            name=str(row.get("id", f"{row.get('img_id', place)}-{thing}")),
            messages=({"role": "user", "content": content},),
            answers=("{{<{}><{}><{}><{}>}}".format(*percent),),
            kind=str(kind) if kind else None,
            box=box,
        )


def _coco_number(img_id: str) -> str:
    """'000000581857' of 'COCO_train2014_000000581857_2'."""
    parts = str(img_id).split("_")
    if len(parts) < 2:
        raise BadRow(f"img_id {img_id!r} is not of the form COCO_train2014_000000581857_2")
    return parts[-2]


def _box_of(row: Mapping[str, Any]) -> Box:
    """The row's box as shares of the image."""
    box = row["bbox"]
    box = json.loads(box) if isinstance(box, str) else box
    if not isinstance(box, (list, tuple)) or len(box) != 4:
        raise BadRow(f"bbox is {box!r}; it must be four numbers")
    a, b, c, d = (float(value) for value in box)
    if row.get("width") and row.get("height"):
        width, height = float(row["width"]), float(row["height"])
        found = (a / width, b / height, (a + c) / width, (b + d) / height)
    else:
        found = (a / 100, b / 100, c / 100, d / 100)
    left, top, right, bottom = found
    # Rounding of published boxes may lead a little over the border.
    if not (-0.01 <= left < right <= 1.01 and -0.01 <= top < bottom <= 1.01):
        raise BadRow(
            f"bbox {box!r} is no box inside the image: give left, top, width, height in pixels "
            "beside 'width' and 'height' of the image, or left, top, right, bottom in percent"
        )
    return found


__all__ = ["MMBenchDataset", "Question", "QuestionDataset", "QuestionSet", "RefCOCODataset"]
