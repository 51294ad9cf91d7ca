"""Validation and test by questions, in the Runner."""

import json

import pytest

from tests.ranks import run_ranks
from tests.tiny import tiny_speaker, tiny_tokenizer
from tests.vision_parts import picture
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.runner.runner import Runner

ROWS = [
    {"id": "greeting", "kind": "short", "input": "Say hi!", "output": "Hi!"},
    {"id": "story", "kind": "long", "input": "Tell me a story.", "output": "Once"},
    {"id": "again", "kind": "short", "input": "Again!", "output": "hi"},
]
QUESTIONS = dict(type="QuestionDataset", data=ROWS)
QUIET = dict(logger=None, checkpoint=None)


def config(work_dir, **changes):
    """A model that answers 'Hi!' to everything."""
    tokenizer = tiny_tokenizer()
    cfg = dict(
        model=SupervisedFinetune(llm=tiny_speaker(tokenizer, "Hi!"), tokenizer=tokenizer),
        tokenizer=tokenizer,
        work_dir=str(work_dir),
        val_dataloader=dict(batch_size=2, dataset=QUESTIONS),
        randomness=dict(seed=0),
        default_hooks=QUIET,
    )
    return cfg | changes


def replies(work_dir, name="val_000000"):
    file = work_dir / "replies" / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_question_is_asked_and_scored(tmp_path):
    results = Runner.from_cfg(config(tmp_path)).val()
    assert results == {
        "exact_match": pytest.approx(2 / 3),
        "exact_match/long": 0.0,
        "exact_match/short": 1.0,
    }
    assert [record["name"] for record in replies(tmp_path)] == ["greeting", "story", "again"]
    assert replies(tmp_path)[1] == {
        "name": "story", "kind": "long", "question": "Tell me a story.", "images": [],
        "reply": "Hi!", "answers": ["Once"], "scores": {"exact_match": 0.0},
    }  # fmt: skip


def test_the_test_loop_and_other_metrics(tmp_path):
    cfg = config(
        tmp_path,
        test_dataloader=dict(dataset=QUESTIONS),
        test_evaluator=[dict(type="ContainsAnswer"), dict(type="ExactMatch")],
        test_cfg=dict(type="ReplyTestLoop", stop_words=["!"]),
    )
    results = Runner.from_cfg(cfg).test()
    assert results["contains_answer"] == pytest.approx(2 / 3)
    assert [record["reply"] for record in replies(tmp_path, "test_000000")] == ["Hi"] * 3


def test_validation_while_training(tmp_path):
    rows = [{"input": "Hello there!", "output": "Hi!"}] * 4
    cfg = config(
        tmp_path,
        train_dataloader=dict(
            dataset=dict(type="ChatDataset", data=rows, packing="none", cache=False)
        ),
        train_cfg=dict(max_iters=4, val_interval=2),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.0)),
    )
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert len(replies(tmp_path, "val_000002")) == len(replies(tmp_path, "val_000004")) == 3
    assert runner.model.training


def shares(work_dir):
    runner = Runner.from_cfg(config(work_dir, launcher="pytorch"))
    return runner.val()


@pytest.mark.slow  # two ranks: 12 s
def test_ranks_share_the_questions(tmp_path):
    first, second = run_ranks(shares, tmp_path)
    assert first == second
    assert first["exact_match"] == pytest.approx(2 / 3)
    assert [record["name"] for record in replies(tmp_path)] == ["greeting", "story", "again"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(val_evaluator=dict(type="Perplexity")), "holds a Perplexity.*their metrics score"),
        (
            dict(
                val_dataloader=dict(
                    dataset=dict(type="ChatDataset", data=ROWS, packing="none", cache=False)
                ),
                val_evaluator=dict(type="ExactMatch"),
            ),
            "holds a ExactMatch, which scores replies; val_dataloader.dataset must be",
        ),
        (
            dict(
                val_dataloader=dict(
                    dataset=dict(type="ChatDataset", data=ROWS, packing="none", cache=False)
                ),
                val_cfg=dict(type="ReplyValLoop"),
            ),
            "val_dataloader.dataset is a ChatDataset",
        ),
    ],
)
def test_metrics_and_data_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(TypeError, match=message):
        Runner.from_cfg(config(tmp_path, **changes)).val()


def test_questions_with_images_need_a_tokenizer_that_reads_them(tmp_path):
    """Told when the run is built and not at its first validation."""
    picture().save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": "red"}]
    rows = [{"image": "a.png", "conversations": turns}]
    questions = dict(type="QuestionDataset", data=rows, image_folder=str(tmp_path))
    with pytest.raises(
        ValueError, match="val_dataloader have images, and the tokenizer reads text"
    ):
        Runner.from_cfg(config(tmp_path, val_dataloader=dict(dataset=questions))).val()
