"""The Runner and its loop on a regression toy: steps, hooks, resume, errors."""

import os
import signal

import pytest
import torch
from mmengine.hooks import Hook

from tests.toy import QUIET, ToyData, ToyMethod, toy_collate, toy_config
from xtuner_lite.engine.checkpoint import CheckpointError, list_checkpoints
from xtuner_lite.engine.optim import OptimWrapper
from xtuner_lite.runner.runner import Runner


class Recorder(Hook):
    """Writes down every stage it sees."""

    priority = "LOWEST"

    def __init__(self):
        self.seen, self.losses, self.rows, self.val = [], [], [], []

    def __getattribute__(self, name):
        if name in Hook.stages or name == "before_optimizer_step":
            object.__getattribute__(self, "seen").append(name)
        return super().__getattribute__(name)

    def before_optimizer_step(self, runner, batch_idx, data_batch, outputs):
        pass

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(outputs["loss"])
        self.rows.append([row for b in data_batch for rows in b["row_ids"] for row in rows])

    def after_val_epoch(self, runner, metrics=None):
        self.val.append(metrics)


def train(work_dir, **changes):
    recorder = Recorder()
    config = toy_config(work_dir, **changes)
    config["custom_hooks"] = [recorder, *config.get("custom_hooks", [])]
    runner = Runner.from_cfg(config)
    runner.train()
    return runner, recorder


def weights(runner):
    return {k: v.clone() for k, v in runner.model.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_an_iter_is_an_optimizer_step(tmp_path):
    # 12 samples, 2 x 2 per step: 3 steps an epoch, 2 epochs.
    runner, recorder = train(tmp_path)
    assert (runner.max_iters, runner.iter, runner.epoch, len(recorder.losses)) == (6, 6, 2, 6)
    assert recorder.losses[-1] < recorder.losses[0]
    per_epoch = ["before_train_epoch"]
    per_step = ["before_train_iter", "before_optimizer_step", "after_train_iter"]
    stages = [s for s in recorder.seen if s not in ("before_save_checkpoint",)]
    assert stages == (
        ["before_run", "before_train"]
        + 2 * (per_epoch + 3 * per_step + ["after_train_epoch"])
        + ["after_train", "after_run"]
    )


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (1, 8), (4, 2)])
def test_accumulation_changes_nothing(tmp_path, batch_size, accumulation):
    # 12 samples, 8 a step: also the short second step of an epoch is the same for every split.
    def run(name, size, counts):
        return train(
            tmp_path / name,
            train_dataloader=dict(
                dataset=dict(type=ToyData), batch_size=size, collate_fn=dict(type=toy_collate)
            ),
            optim_wrapper=dict(
                optimizer=dict(type="SGD", lr=0.1), dtype="fp32", accumulative_counts=counts
            ),
        )

    reference, expected = run("a", 8, 1)
    runner, recorder = run("b", batch_size, accumulation)
    assert recorder.losses == pytest.approx(expected.losses, rel=1e-6)
    for name, value in weights(runner).items():
        torch.testing.assert_close(value, weights(reference)[name], rtol=1e-6, atol=1e-7)


NOISY = dict(
    model=dict(type=ToyMethod, dropout=0.3),
    train_dataloader=dict(
        dataset=dict(type=ToyData, size=11, noise=0.1),
        batch_size=2,
        collate_fn=dict(type=toy_collate),
    ),
    param_scheduler=dict(type="WarmupCosineLR"),
)


@pytest.mark.parametrize("stop_after", [1, 4, 5])
def test_a_resumed_run_is_bit_identical(tmp_path, stop_after):
    whole, expected = train(tmp_path / "whole", **NOISY, train_cfg=dict(max_iters=8))

    class Stop(Hook):
        def after_train_iter(self, runner, **kwargs):
            runner.train_loop.stop_training = runner.iter + 1 == stop_after

    _, first = train(tmp_path / "cut", **NOISY, train_cfg=dict(max_iters=8), custom_hooks=[Stop()])
    torch.manual_seed(99)  # whatever happened in between
    resumed, rest = train(tmp_path / "cut", **NOISY, train_cfg=dict(max_iters=8), resume=True)
    assert first.losses + rest.losses == expected.losses
    assert first.rows + rest.rows == expected.rows
    assert_equal(weights(resumed), weights(whole))


def test_resume_without_a_seed_takes_the_saved_one(tmp_path):
    train(tmp_path, randomness=dict(), train_cfg=dict(max_iters=2))
    first, _ = train(tmp_path, randomness=dict(), train_cfg=dict(max_iters=4), resume=True)
    second, _ = train(tmp_path, randomness=dict(), train_cfg=dict(max_iters=5), resume=True)
    assert first.seed == second.seed


def test_resume_refuses_other_data_and_another_step_size(tmp_path):
    train(tmp_path)
    loader = dict(
        dataset=dict(type=ToyData, size=9), batch_size=1, collate_fn=dict(type=toy_collate)
    )
    with pytest.raises(
        CheckpointError,
        match=r"samples per optimizer step .*: saved 4, now 2; "
        r"samples in the training data: saved 12, now 9",
    ):
        train(tmp_path, train_dataloader=loader, resume=True)


def test_resume_of_a_damaged_newest_takes_the_one_before(tmp_path):
    runner, _ = train(tmp_path, default_hooks=dict(QUIET, checkpoint=dict(interval=2)))
    (list_checkpoints(tmp_path)[-1] / "model.safetensors").write_bytes(b"cut")
    resumed, recorder = train(tmp_path, resume=True)
    assert len(recorder.losses) == 2
    assert_equal(weights(resumed), weights(runner))


def test_resume_path_that_is_not_there(tmp_path):
    with pytest.raises(
        CheckpointError, match="nowhere is no checkpoint of a run: manifest.json is missing"
    ):
        train(tmp_path, resume=str(tmp_path / "nowhere"))


def test_resume_with_no_checkpoint_starts_at_zero(tmp_path):
    _, recorder = train(tmp_path, resume=True)
    assert len(recorder.losses) == 6


def test_missing_weights_stop_the_run_before_the_data_is_read(tmp_path, monkeypatch):
    from xtuner_lite.runner.assembly import Assembly

    def refuse(*args, **kwargs):
        raise AssertionError("the data was read")

    monkeypatch.setattr(Assembly, "_build_dataloader", refuse)
    runner = Runner.from_cfg(toy_config(tmp_path, load_from=str(tmp_path / "gone")))
    for action in (runner.train, runner.prepare_data):
        with pytest.raises(FileNotFoundError, match="load_from='.*gone' is not there; give"):
            action()


def test_load_from_takes_weights_only(tmp_path):
    first, _ = train(tmp_path / "a")
    runner, recorder = train(
        tmp_path / "b",
        load_from=str(list_checkpoints(tmp_path / "a")[-1]),
        train_cfg=dict(max_iters=1),
    )
    assert recorder.losses[0] < 0.9 * train(tmp_path / "c")[1].losses[0]


def test_validation_every_two_steps_and_at_the_end(tmp_path):
    loader = dict(
        dataset=dict(type=ToyData, size=5), batch_size=2, collate_fn=dict(type=toy_collate)
    )
    runner, recorder = train(
        tmp_path,
        val_dataloader=loader,
        train_cfg=dict(max_iters=5, val_interval=2),
        val_evaluator=dict(type="Perplexity"),
    )
    assert len(recorder.val) == 3
    model = runner.model.eval()
    samples = [runner.val_dataloader.dataset[i] for i in range(5)]
    output = model(toy_collate(samples))
    assert recorder.val[-1]["loss"] == pytest.approx(output.loss_sum.item() / 5, rel=1e-6)
    assert recorder.val[-1]["abs_error"] == pytest.approx(
        output.metrics["abs_error"].item() / 5, rel=1e-6
    )
    assert recorder.val[-1]["perplexity"] > 1


def test_val_and_test_alone(tmp_path):
    loader = dict(
        dataset=dict(type=ToyData, size=5), batch_size=2, collate_fn=dict(type=toy_collate)
    )
    runner = Runner.from_cfg(toy_config(tmp_path, val_dataloader=loader, test_dataloader=loader))
    assert runner.val() == runner.test()
    with pytest.raises(ValueError, match="the config has no test_dataloader"):
        Runner.from_cfg(toy_config(tmp_path)).test()


def test_a_skipped_step_leaves_the_weights_alone(tmp_path):
    class Skip(Hook):
        def before_optimizer_step(self, runner, **kwargs):
            runner.train_loop.skip_step()

    start = ToyMethod().state_dict()
    runner, _ = train(tmp_path, custom_hooks=[Skip()])
    assert_equal(weights(runner), start)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_nan_never_reaches_the_weights(tmp_path, policy):
    loader = dict(
        dataset=dict(type=ToyData, poison=7), batch_size=2, collate_fn=dict(type=toy_collate)
    )
    hooks = dict(QUIET, nan_guard=dict(policy=policy))
    runner = Runner.from_cfg(toy_config(tmp_path, train_dataloader=loader, default_hooks=hooks))
    if policy == "stop":
        with pytest.raises(RuntimeError, match=r"loss nan, .*toy.json:8"):
            runner.train()
    else:
        runner.train()
    assert all(torch.isfinite(v).all() for v in weights(runner).values())


def test_a_step_without_targets_is_skipped(tmp_path):
    class Unlabelled(ToyData):
        def __getitem__(self, index):
            return {
                **super().__getitem__(index),
                "labels": super().__getitem__(index)["labels"] * 0 - 100,
            }

    start = ToyMethod().state_dict()
    runner, recorder = train(
        tmp_path,
        train_dataloader=dict(
            dataset=Unlabelled(), batch_size=2, collate_fn=dict(type=toy_collate)
        ),
    )
    assert_equal(weights(runner), start)


def test_a_method_that_counts_two_ways_is_refused(tmp_path):
    class Wrong(ToyMethod):
        def count_units(self, batch):
            return super().count_units(batch) + 1

    with pytest.raises(
        RuntimeError, match="count_units said 6 units for this step, its forward returned 4"
    ):
        train(tmp_path, model=dict(type=Wrong))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves_with_its_code(tmp_path, number, code):
    class Kill(Hook):
        def after_train_iter(self, runner, **kwargs):
            if runner.iter == 2:
                os.kill(os.getpid(), number)

    whole, expected = train(tmp_path / "whole", **NOISY)
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "cut", **NOISY, custom_hooks=[Kill()])
    assert stopped.value.code == code
    assert signal.getsignal(number) is handler
    resumed, rest = train(tmp_path / "cut", **NOISY, resume=True)
    assert rest.losses == expected.losses[3:]
    assert_equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_trains_float32_weights(tmp_path, dtype):
    runner, recorder = train(
        tmp_path,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=0.05), dtype=dtype, clip_grad=dict(max_norm=1.0)
        ),
        train_cfg=dict(max_epochs=6),
    )
    assert runner.model.linear.weight.dtype == torch.float32
    assert recorder.losses[-1] < recorder.losses[0]


def test_train_cfg_needs_exactly_one_length(tmp_path):
    with pytest.raises(ValueError, match="max_epochs=None and max_iters=None; give exactly one"):
        train(tmp_path, train_cfg=dict())


def test_a_scheduler_sees_the_length_of_the_run(tmp_path):
    runner, _ = train(tmp_path, param_scheduler=dict(type="WarmupCosineLR", warmup=0.0))
    assert runner.optim_wrapper.get_lr()["lr"][0] == pytest.approx(0.0, abs=1e-9)


def test_stop_training_ends_after_the_step(tmp_path):
    class Stop(Hook):
        def after_train_iter(self, runner, **kwargs):
            runner.train_loop.stop_training = True

    _, recorder = train(tmp_path, custom_hooks=[Stop()])
    assert len(recorder.losses) == 1


def test_after_train_epoch_still_shows_the_epoch_that_ended(tmp_path):
    epochs = []

    class Watch(Hook):
        def before_train_epoch(self, runner):
            epochs.append(("begin", runner.epoch))

        def after_train_epoch(self, runner):
            epochs.append(("end", runner.epoch, runner.iter))

    train(tmp_path, custom_hooks=[Watch()])
    assert epochs == [("begin", 0), ("end", 0, 3), ("begin", 1), ("end", 1, 6)]


EVAL = dict(dataset=dict(type=ToyData, size=5), batch_size=2, collate_fn=dict(type=toy_collate))


def test_val_after_train_evaluates_the_trained_model(tmp_path):
    runner, recorder = train(tmp_path, val_dataloader=EVAL)
    assert runner.val() == recorder.val[1]  # the validation after the last of the two epochs
    assert recorder.val[1]["loss"] < recorder.val[0]["loss"]


def test_val_alone_takes_the_weights_that_resume_names(tmp_path):
    trained, recorder = train(tmp_path, val_dataloader=EVAL)
    runner = Runner.from_cfg(toy_config(tmp_path, val_dataloader=EVAL, resume=True))
    assert runner.val() == recorder.val[-1]


@pytest.mark.parametrize("look", ["val", "prepare_data"])
def test_a_look_before_training_does_not_make_it_forget_to_resume(tmp_path, look):
    train(tmp_path, train_cfg=dict(max_iters=4))
    recorder = Recorder()
    config = toy_config(tmp_path, val_dataloader=EVAL, resume=True, custom_hooks=[recorder])
    runner = Runner.from_cfg(config)
    getattr(runner, look)()
    runner.train()
    assert len(recorder.losses) == 2  # steps 5 and 6


def test_resume_on_another_frozen_base_is_refused(tmp_path):
    class OtherBase(ToyMethod):
        def __init__(self, **options):
            super().__init__(**options)
            self.linear.bias.data.fill_(0.5)

    OtherBase.__name__ = "ToyMethod"
    train(tmp_path, model=dict(type=ToyMethod, frozen_bias=True), train_cfg=dict(max_iters=2))
    with pytest.raises(CheckpointError, match="the model under the trained weights"):
        train(tmp_path, model=dict(type=OtherBase, frozen_bias=True), resume=True)


def test_resume_with_another_number_of_schedules_is_refused(tmp_path):
    train(tmp_path, param_scheduler=dict(type="WarmupCosineLR"), train_cfg=dict(max_iters=2))
    with pytest.raises(CheckpointError, match="has 1 learning-rate schedules, this run 0"):
        train(tmp_path, resume=True)


def test_a_metric_of_another_contract_is_refused(tmp_path):
    with pytest.raises(
        TypeError, match="val_evaluator holds a DumpResults; a metric must subclass"
    ):
        train(
            tmp_path,
            val_dataloader=EVAL,
            val_evaluator=dict(type="DumpResults", out_file_path="x.pkl"),
        )


def test_an_optim_wrapper_may_be_an_object(tmp_path):
    wrapper = OptimWrapper(dict(type="AdamW", lr=0.05), accumulative_counts=3, dtype="fp32")
    runner, recorder = train(tmp_path, optim_wrapper=wrapper)
    assert len(recorder.losses) == 4  # 12 samples, 2 x 3 a step, 2 epochs


def test_a_pickled_checkpoint_is_opened_on_request_only(tmp_path):
    weights = {"linear.weight": torch.full((1, 4), 0.25), "linear.bias": torch.zeros(1)}
    torch.save({"state_dict": weights, "meta": {"iter": 3}}, tmp_path / "old.pth")
    options = dict(load_from=str(tmp_path / "old.pth"), val_dataloader=EVAL)
    with pytest.raises(ValueError, match="a pickled checkpoint, which is not opened unasked"):
        Runner.from_cfg(toy_config(tmp_path, **options)).val()
    runner = Runner.from_cfg(toy_config(tmp_path, allow_pth=True, **options))
    runner.val()
    assert torch.equal(runner.model.linear.weight.detach(), weights["linear.weight"])
