import json
from types import SimpleNamespace

import pytest

from tests.engine.hooks.toy_run import log_text, toy_loader, train
from xtuner_lite.engine.checkpoint import CheckpointError, list_checkpoints, verify_checkpoint
from xtuner_lite.engine.distributed import Ranks
from xtuner_lite.engine.hooks.checkpoint_hook import CheckpointHook, rule_of_metric


def checkpoint(**options):
    return {"checkpoint": {"type": "CheckpointHook", **options}}


def names(work_dir):
    return [path.name for path in list_checkpoints(work_dir)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["iter_6"]),
        ({"save_last": False}, []),
        ({"interval": 4}, ["iter_4", "iter_6"]),
        ({"interval": 2, "save_last": False}, ["iter_2", "iter_4", "iter_6"]),
        ({"interval": 1, "by_epoch": True}, ["iter_3", "iter_6"]),
        ({"interval": -1}, ["iter_6"]),
        ({"interval": 1, "max_keep_ckpts": 2}, ["iter_5", "iter_6"]),
        ({"interval": 1, "max_keep_ckpts": 1}, ["iter_6"]),
        ({"interval": 2, "max_keep_ckpts": -1}, ["iter_2", "iter_4", "iter_6"]),
    ],
)
def test_what_is_saved_and_kept(tmp_path, options, expected):
    train(tmp_path, checkpoint(**options))
    assert names(tmp_path) == expected
    for path in list_checkpoints(tmp_path):
        verify_checkpoint(path)


class Validation:
    """A stand-in for the runner's side of saving: a folder, its files, and scores to order."""

    def __init__(self, work_dir, hook):
        self.hook, self.saved = hook, []
        self.runner = SimpleNamespace(
            work_dir=str(work_dir),
            iter=0,
            rank=0,
            world_size=1,
            val_loop=object(),
            logger=SimpleNamespace(info=lambda *a: None, warning=lambda *a: None, error=print),
            save_checkpoint=self.save,
            finish_saving=lambda: None,
            strategy=SimpleNamespace(ranks=Ranks()),
        )
        self.step = 0
        hook.before_train(self.runner)

    def save(self, asynchronous=False):
        from xtuner_lite.engine.checkpoint import checkpoints_dir, write_checkpoint

        target = checkpoints_dir(self.runner.work_dir) / f"iter_{self.step}"
        self.saved.append(target.name)
        return write_checkpoint(target, lambda folder: (folder / "x").write_text("x"))

    def run(self, **metrics):
        """One step, then a validation with these results."""
        self.runner.iter = self.step
        self.step += 1
        self.hook.after_train_iter(self.runner, self.step, outputs={})
        if metrics:
            self.hook.after_val_epoch(self.runner, metrics)


def test_the_best_one_outlives_max_keep(tmp_path):
    hook = CheckpointHook(interval=1, max_keep_ckpts=1, save_best="loss")
    run = Validation(tmp_path, hook)
    kept = []
    for loss in (3.0, 1.0, 2.0, 1.5):
        run.run(loss=loss)
        kept.append(names(tmp_path))
    # After each step: the newest one, and the best one known when it was written.
    assert kept == [["iter_1"], ["iter_1", "iter_2"], ["iter_2", "iter_3"], ["iter_2", "iter_4"]]
    assert (hook.best_name, hook.best_score) == ("iter_2", 1.0)
    best = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert best == {"checkpoint": "iter_2", "step": 2, "metric": "loss", "value": 1.0}


def test_greater_is_better_for_an_accuracy(tmp_path):
    run = Validation(tmp_path, CheckpointHook(save_best="accuracy"))
    for accuracy in (0.2, 0.5, 0.4):
        run.run(accuracy=accuracy)
    assert run.saved == ["iter_1", "iter_2"]  # saved for being best alone


def test_nan_is_never_the_best(tmp_path):
    run = Validation(tmp_path, CheckpointHook(save_best="loss"))
    run.run(loss=float("nan"))
    run.run(loss=5.0)
    run.run(loss=float("nan"))
    assert run.saved == ["iter_2"]


def test_a_resume_knows_the_best_even_if_it_was_found_after_the_save(tmp_path):
    first = CheckpointHook(interval=1, save_best="loss")
    run = Validation(tmp_path, first)
    run.run(loss=1.0)
    resumed = CheckpointHook(interval=1, save_best="loss")
    resumed.load_state_dict(CheckpointHook(save_best="loss").state_dict())  # saved before the val
    run.runner.iter = 1
    resumed.before_train(run.runner)
    assert (resumed.best_name, resumed.best_score) == ("iter_1", 1.0)


def test_a_resume_in_another_folder_counts_the_best_anew(tmp_path):
    hook = CheckpointHook(save_best="loss")
    hook.load_state_dict({"best_score": 0.5, "best_name": "iter_9", "rule": "less"})
    run = Validation(tmp_path, CheckpointHook())
    run.runner.iter = 9
    hook.before_train(run.runner)
    assert (hook.best_name, hook.best_score) == (None, None)


def test_nothing_is_removed_when_the_new_one_is_not_whole(tmp_path, monkeypatch, capsys):
    import xtuner_lite.engine.hooks.checkpoint_hook as module

    def broken(path):
        raise CheckpointError(f"{path.name} is cut short")

    run = Validation(tmp_path, CheckpointHook(interval=1, max_keep_ckpts=1))
    run.run()
    monkeypatch.setattr(module, "verify_checkpoint", broken)
    run.run()
    assert names(tmp_path) == ["iter_1", "iter_2"]
    assert "older checkpoints are kept" in capsys.readouterr().out


def test_after_a_resume_from_an_older_step_the_newly_written_ones_stay(tmp_path):
    import os

    run = Validation(tmp_path, CheckpointHook(interval=1, max_keep_ckpts=2))
    for _ in range(2):
        run.run()
    for age, path in enumerate(list_checkpoints(tmp_path)):
        path.rename(path.with_name(f"iter_{age + 50}"))
        os.utime(path.with_name(f"iter_{age + 50}"), (age, age))
    run.run()  # writes iter_3
    run.run()  # writes iter_4
    assert names(tmp_path) == ["iter_3", "iter_4"]


def test_end_to_end_with_validation(tmp_path):
    runner, _ = train(
        tmp_path,
        checkpoint(interval=1, max_keep_ckpts=1, save_best="loss"),
        val_dataloader=toy_loader(size=4),
        train_cfg={"max_epochs": 2, "val_interval": 2},
    )
    best = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert best["checkpoint"] in names(tmp_path)
    assert "iter_6" in names(tmp_path)
    assert len(names(tmp_path)) <= 2
    assert "best loss so far" in log_text(runner)


def test_save_best_without_validation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="save_best='loss' but the run has no validation"):
        train(tmp_path, checkpoint(save_best="loss"))


def test_an_unknown_metric_names_those_there_are(tmp_path):
    run = Validation(tmp_path, CheckpointHook(save_best="bleu"))
    with pytest.raises(KeyError, match=r"none of the validation metrics \['loss'\]"):
        run.run(loss=1.0)


def test_auto_takes_the_first_metric(tmp_path):
    hook = CheckpointHook(save_best="auto")
    run = Validation(tmp_path, hook)
    run.run(loss=1.0, accuracy=0.1)
    run.run(loss=0.5, accuracy=0.0)
    assert (hook.rule, run.saved) == ("less", ["iter_1", "iter_2"])


def test_rules():
    assert rule_of_metric("val_loss") == "less"
    assert rule_of_metric("Perplexity") == "less"
    assert rule_of_metric("token_accuracy") == "greater"
    with pytest.raises(ValueError, match="set rule='less' or rule='greater'"):
        rule_of_metric("beauty")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval=0; use a number from 1 on, or None"),
        ({"max_keep_ckpts": 0}, "max_keep_ckpts=0; use a number from 1 on"),
        ({"interval": 1.5}, "interval=1.5"),
        ({"save_best": "loss", "rule": "min"}, "rule='min'; use 'less', 'greater' or None"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CheckpointHook(**options)
