"""Validation and test by questions with known answers: the model replies and is scored."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner_lite.data.dataloader import StepDataLoader
from xtuner_lite.data.question_sets import Question, QuestionSet
from xtuner_lite.engine.reply_metrics import Replies, ReplyMetric
from xtuner_lite.images.files import shown_name
from xtuner_lite.images.vision_inputs import images_of, vision_of
from xtuner_lite.models.generate_batch import generate_replies
from xtuner_lite.registry import LOOPS
from xtuner_lite.runner.loops import EvalLoop

if TYPE_CHECKING:
    from xtuner_lite.runner.runner import Runner


class ReplyLoop(EvalLoop):
    """Asks every question of a question set, scores the replies and writes them down.

    The replies are greedy. They go to ``work_dir/replies/<stage>_<step>.jsonl``, one object a line:
    name, kind, question, images, reply, answers, and the score of each metric. The ranks share the
    questions; under a strategy that shards the model (FSDP2, ZeRO-3) every rank asks all of them,
    because all must run the model together.

    Args:
        runner: the runner that owns the parts.
        dataloader: its ``dataset`` is a question set, its ``batch_size`` questions asked at once.
        evaluator: reply metrics, or their configs; without one, ExactMatch.
        max_new_tokens: longest reply, in tokens.
        stop_words: texts that end a reply.
        num_shown: replies of each round that the log shows.

    Raises:
        TypeError: the data set holds no questions, or the evaluator a metric of losses.
        ValueError: the config has no tokenizer, or one of text for questions with images.
    """

    always = ()

    def __init__(
        self,
        runner: Runner,
        dataloader: StepDataLoader,
        evaluator: Any = None,
        *,
        max_new_tokens: int = 32,
        stop_words: Sequence[str] = (),
        num_shown: int = 3,
    ) -> None:
        if not isinstance(dataloader.dataset, QuestionSet):
            raise TypeError(
                f"{type(self).__name__} asks questions, and {self.stage}_dataloader.dataset is a "
                f"{type(dataloader.dataset).__name__}; use a QuestionDataset, MMBenchDataset or "
                f"RefCOCODataset, or leave out {self.stage}_cfg"
            )
        if runner.tokenizer is None:
            raise ValueError(
                f"{type(self).__name__} needs a tokenizer to ask with; add tokenizer=... to the "
                "config"
            )
        questions = dataloader.dataset
        if vision_of(runner.tokenizer) is None and any(
            images_of(questions[place].messages) for place in range(len(questions))
        ):
            raise ValueError(
                f"the questions of {self.stage}_dataloader have images, and the tokenizer reads "
                "text only; use tokenizer=dict(type=load_processor, ...) or load_llava_processor"
            )
        super().__init__(runner, dataloader, evaluator or [dict(type="ExactMatch")])
        self.options = {"max_new_tokens": max_new_tokens, "stop_words": tuple(stop_words)}
        self.num_shown = num_shown

    def _check_metric(self, metric: Any) -> None:
        if not isinstance(metric, ReplyMetric):
            raise TypeError(
                f"{self.stage}_evaluator holds a {type(metric).__name__}, and {self.stage}_"
                "dataloader.dataset questions; their metrics score replies (ExactMatch, "
                "ContainsAnswer, ChoiceAccuracy, BoxAccuracy, or a subclass of "
                "xtuner_lite.engine.reply_metrics.ReplyMetric)"
            )

    def _take_in_all(self) -> None:
        runner, stage = self.runner, self.stage
        questions, ranks = self.dataloader.dataset, runner.strategy.ranks
        everyone_asks_all = runner.strategy.is_sharded
        places = list(range(len(questions)))
        if not everyone_asks_all:
            places = places[ranks.rank :: ranks.world_size]
        counts = ranks.is_main or not everyone_asks_all  # else each reply would be counted often
        begin, records = time.perf_counter(), []
        size = self.dataloader.batch_size
        for index, start in enumerate(range(0, len(places), size)):
            batch = [questions[place] for place in places[start : start + size]]
            runner.call_hook(f"before_{stage}_iter", batch_idx=index, data_batch=batch)
            runner.mark(f"{stage} batch {index}", runner.iter)
            output = Replies(batch, self._ask(questions, batch))
            if counts:
                for metric in self.metrics:
                    metric.update(batch, output)
                records += zip(places[start : start + size], self._records(output), strict=True)
            runner.call_hook(
                f"after_{stage}_iter", batch_idx=index, data_batch=batch, outputs=[output]
            )
        gathered = sorted(
            (record for part in ranks.gather(records) for record in part), key=lambda pair: pair[0]
        )
        seconds = time.perf_counter() - begin
        ranks.on_main(lambda: self._keep([record for _, record in gathered], seconds))

    def _ask(self, questions: QuestionSet, batch: list[Question]) -> list[str]:
        runner = self.runner
        with runner.strategy.generation_context():
            return generate_replies(
                runner.model.llm,
                runner.tokenizer,
                [questions.opened(question) for question in batch],
                batch_size=len(batch),
                **self.options,
            )

    def _records(self, output: Replies) -> list[dict[str, Any]]:
        return [
            {
                "name": question.name,
                "kind": question.kind,
                "question": _text_of(question),
                "images": _images_of(question),
                "reply": reply,
                "answers": list(question.answers),
                "scores": {metric.name: metric.score(question, reply) for metric in self.metrics},
            }
            for question, reply in zip(output.questions, output.texts, strict=True)
        ]

    def _keep(self, records: list[dict[str, Any]], seconds: float) -> None:
        """Writes the file (aside, then renamed) and shows the first replies of each kind."""
        runner = self.runner
        folder = Path(runner.work_dir) / "replies"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.stage}_{runner.iter:06d}.jsonl"
        aside = file.with_suffix(".part")
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        aside.write_text("".join(lines), encoding="utf-8")
        os.replace(aside, file)
        shown = [
            f"  > {record['question'].strip()}\n  {record['reply'].strip()}"
            f"   (right: {record['answers'][0]})"
            for record in _first_of_each_kind(records, self.num_shown)
        ]
        runner.logger.info(
            "\n".join([f"{len(records)} replies in {seconds:.1f} s, kept in {file}", *shown])
        )


def _first_of_each_kind(records: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """Records to show: one of each kind before a second of any."""
    seen: dict[Any, int] = {}
    ranked = []
    for place, record in enumerate(records):
        turn = seen.get(record["kind"], 0)
        seen[record["kind"]] = turn + 1
        ranked.append((turn, place))
    return [records[place] for _, place in sorted(ranked)[: max(number, 0)]]


def _text_of(question: Question) -> str:
    """The last turn's text."""
    content = question.messages[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _images_of(question: Question) -> list[str]:
    return [
        shown_name(str(part["image"]))
        for message in question.messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image"
    ]


@LOOPS.register_module()
class ReplyValLoop(ReplyLoop):
    """Validation by questions: hooks see the ``val`` stages. The ``val_cfg`` section."""

    stage = "val"


@LOOPS.register_module()
class ReplyTestLoop(ReplyLoop):
    """Test by questions: hooks see the ``test`` stages. The ``test_cfg`` section."""

    stage = "test"


REPLY_LOOPS = {"val": ReplyValLoop, "test": ReplyTestLoop}
