import json
import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tests.chat.seeing import save_seeing
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.vision_parts import picture
from xtuner_lite.engine.hooks.evaluate_chat_hook import EvaluateChatHook
from xtuner_lite.models.image_text import load_image_text_model
from xtuner_lite.models.processors import load_processor
from xtuner_lite.report.page import render_report
from xtuner_lite.report.run_record import RunRecord


class Texts:
    def __init__(self):
        self.texts = []

    def add_text(self, name, text, step):
        self.texts.append((name, text, step))


def make_runner(work_dir, *, rank=0, is_sharded=False):
    return SimpleNamespace(
        model=SimpleNamespace(llm=tiny_llama()),
        tokenizer=tiny_tokenizer(),
        strategy=SimpleNamespace(generation_context=nullcontext, is_sharded=is_sharded),
        work_dir=str(work_dir),
        iter=0,
        rank=rank,
        mark=lambda what, step=None: None,
        logger=logging.getLogger("chat"),
        visualizer=Texts(),
    )


def train(runner, hook, num_steps=4, start=0):
    runner.iter = start
    hook.before_train(runner)
    for runner.iter in range(start, num_steps):
        hook.after_train_iter(runner, runner.iter, [], {})
    runner.iter = num_steps
    hook.after_train(runner)


def records(work_dir):
    return [json.loads(line) for line in (work_dir / "chat_samples.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def _logged(caplog):
    caplog.set_level(logging.INFO, logger="chat")


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [0, 4]),
        ({"interval": 2}, [0, 2, 4]),  # the last round is not asked twice
        ({"interval": 3, "at_start": False}, [3, 4]),
        ({"interval": 3, "at_end": False}, [0, 3]),
    ],
)
def test_when_it_asks(tmp_path, options, steps):
    runner = make_runner(tmp_path)
    train(runner, EvaluateChatHook(["Who are you?"], max_new_tokens=2, **options))
    assert [record["step"] for record in records(tmp_path)] == steps
    assert [step for _, _, step in runner.visualizer.texts] == steps


def test_what_it_keeps(tmp_path, caplog):
    runner = make_runner(tmp_path)
    conversation = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Who are you?"},
    ]
    hook = EvaluateChatHook(
        ["two plus two", conversation], system="Be short.", max_new_tokens=3, at_end=False
    )
    train(runner, hook)
    first, second = records(tmp_path)
    assert first["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "two plus two"},
    ]
    assert second["messages"] == conversation
    assert "chat after step 0" in caplog.text
    assert "> two plus two" in caplog.text
    assert runner.visualizer.texts[0][0] == "chat"


def test_training_does_not_notice(tmp_path):
    runner = make_runner(tmp_path)
    model = runner.model.llm
    model.model.layers[0].eval()  # frozen dropout somewhere: each module's own mode must stay
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    before = {
        "modes": [module.training for module in model.modules()],
        "gradients": [p.grad.clone() for p in model.parameters()],
        "random": torch.get_rng_state(),
    }
    train(runner, EvaluateChatHook(["Hello"], temperature=1.0, max_new_tokens=4))
    assert [module.training for module in model.modules()] == before["modes"]
    assert torch.equal(torch.get_rng_state(), before["random"])
    for parameter, gradient in zip(model.parameters(), before["gradients"]):
        assert torch.equal(parameter.grad, gradient)


def test_a_failure_warns_and_the_other_questions_are_asked(tmp_path, caplog):
    runner = make_runner(tmp_path)
    bad = [{"role": "user", "content": "x " * 2000}]  # longer than the model's context
    train(runner, EvaluateChatHook([bad, "Hello"], max_new_tokens=2, at_end=False))
    assert "no chat sample after step 0" in caplog.text
    assert "ValueError" in caplog.text
    assert [r["messages"][-1]["content"] for r in records(tmp_path)] == ["Hello"]


def test_other_ranks_ask_only_where_the_model_is_sharded(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "xtuner_lite.engine.hooks.evaluate_chat_hook.generate_reply",
        lambda *args, **options: asked.append(args[2][-1]["content"]) or "reply",
    )
    for is_sharded in (False, True):
        runner = make_runner(tmp_path, rank=1, is_sharded=is_sharded)
        train(runner, EvaluateChatHook(["Hello"], at_end=False))
        assert asked == ["Hello"] * is_sharded
    assert not list(tmp_path.iterdir())
    assert not runner.visualizer.texts


def test_where_the_model_is_sharded_a_failure_inside_it_ends_the_run(tmp_path, monkeypatch, caplog):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("xtuner_lite.engine.hooks.evaluate_chat_hook.generate_reply", fail)
    error = ValueError("too long")
    train(make_runner(tmp_path, is_sharded=True), EvaluateChatHook(["Hello"]))
    assert "too long" in caplog.text
    error = RuntimeError("out of memory")
    train(make_runner(tmp_path), EvaluateChatHook(["Hello"]))
    with pytest.raises(RuntimeError, match="out of memory"):
        train(make_runner(tmp_path, is_sharded=True), EvaluateChatHook(["Hello"]))


def test_a_resume_keeps_each_round_once(tmp_path):
    hook = {"questions": ["Hello"], "interval": 2, "max_new_tokens": 2}
    train(make_runner(tmp_path), EvaluateChatHook(**hook), num_steps=4)
    train(make_runner(tmp_path), EvaluateChatHook(**hook), num_steps=6, start=2)
    assert [record["step"] for record in records(tmp_path)] == [0, 2, 4, 6]


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="questions='Hello'; give a list"):
        EvaluateChatHook("Hello")
    with pytest.raises(ValueError, match=r"questions=\[\]"):
        EvaluateChatHook([])
    with pytest.raises(ValueError, match="interval=0"):
        EvaluateChatHook(["Hello"], interval=0)
    runner = make_runner(tmp_path)
    runner.tokenizer = None
    with pytest.raises(ValueError, match="needs a tokenizer"):
        EvaluateChatHook(["Hello"]).before_train(runner)


# ------------------------------------------------------------------ images


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return save_seeing(tmp_path_factory.mktemp("see"))


def seeing_runner(work_dir, seeing):
    runner = make_runner(work_dir)
    runner.model.llm = load_image_text_model(seeing["whole"])
    runner.tokenizer = load_processor(seeing["whole"])
    return runner


def test_questions_about_images(tmp_path, seeing, caplog):
    red, blue = str(seeing["red"]), str(seeing["blue"])
    parts = [{"type": "image", "image": picture("green")}, {"type": "text", "text": "What?"}]
    questions = [
        dict(image=red, text="What?"),
        dict(image=[blue, red], text="Which?"),
        [{"role": "user", "content": parts}],
        "What?",
    ]
    runner = seeing_runner(tmp_path, seeing)
    hook = EvaluateChatHook(questions, system="Look.", max_new_tokens=6, at_end=False)
    train(runner, hook)
    samples = records(tmp_path)
    assert [len(sample["messages"]) for sample in samples] == [2, 2, 1, 2]
    assert [part.get("image") for part in samples[1]["messages"][1]["content"]] == [blue, red, None]
    assert samples[2]["messages"][0]["content"][0]["image"] == "image of 40x30 pixels"
    assert len({sample["reply"] for sample in samples}) == 4
    (_, text, _) = runner.visualizer.texts[0]
    for shown in ("> [red.png] What?", "> [blue.png] [red.png] Which?", "> What?"):
        assert shown in text
        assert shown in caplog.text
    page = render_report(RunRecord(tmp_path, samples=samples))
    assert "user: [blue.png] [red.png] Which?" in page
    assert "[image of 40x30 pixels] What?" in page


@pytest.mark.parametrize(
    ("image", "told"),
    [("none.png", "the image none.png does not exist"), ("{damaged}", "no image that Pillow")],
)
def test_an_image_that_cannot_be_read_is_told_before_training(tmp_path, seeing, image, told):
    hook = EvaluateChatHook([dict(image=image.format(**seeing), text="What?")])
    with pytest.raises(ValueError, match=f"EvaluateChatHook: .*{told}"):
        hook.before_train(seeing_runner(tmp_path, seeing))


def test_an_image_for_a_tokenizer_of_text_is_told_before_training(tmp_path, seeing):
    hook = EvaluateChatHook([dict(image=str(seeing["red"]), text="What?")])
    with pytest.raises(ValueError, match="has an image, and the tokenizer reads text only"):
        hook.before_train(make_runner(tmp_path))


@pytest.mark.parametrize("question", [dict(image="a.png"), dict(images="a", text="b"), 3])
def test_a_question_of_no_known_form(question):
    with pytest.raises(ValueError, match="allowed: a text, dict"):
        EvaluateChatHook([question])
