from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.engine.hooks.toy_run import log_text, train
from xtuner_lite.engine.hooks.trainability_hook import (
    TrainabilityReportHook,
    collapse_name,
    collapse_names,
    format_report,
    group_parameters,
)


class Layer(nn.Module):
    """A frozen 4x4 matrix with a LoRA of rank 2 beside it."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 4, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x):
        return self.base(x) + self.lora_B["default"](self.lora_A["default"](x))


class Model(nn.Module):
    def __init__(self, unused=False):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        if unused:
            self.unused = nn.Linear(4, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


class Log:
    def __init__(self):
        self.infos, self.warnings = [], []

    def info(self, text):
        self.infos.append(text)

    def warning(self, text):
        self.warnings.append(text)


def run(model, hook, num_steps, *, lr=0.1, forward=None, zero_lr_steps=0):
    """Trains with the stages the hook uses, in the loop's order; returns the log."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    log = Log()
    runner = SimpleNamespace(
        strategy=SimpleNamespace(keeps_gradients=True),
        model=model,
        iter=0,
        logger=log,
        optim_wrapper=SimpleNamespace(
            get_lr=lambda: {"lr": [g["lr"] for g in optimizer.param_groups]}
        ),
    )
    hook.before_train(runner)
    x = torch.arange(8.0).reshape(2, 4)
    for runner.iter in range(num_steps):
        optimizer.param_groups[0]["lr"] = 0.0 if runner.iter < zero_lr_steps else lr
        (forward or model)(x).backward()
        outputs = {"loss": 1.0, "num_units": 2.0}
        hook.before_optimizer_step(runner, runner.iter, None, outputs)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        hook.after_train_iter(runner, runner.iter, None, {**outputs, "updated": 1.0})
    return log


def test_lora_a_is_waited_for_without_a_warning():
    log = run(Model(), TrainabilityReportHook(), 3)
    assert log.warnings == []
    assert log.infos[1:] == [
        "2 lora_A tensors have a gradient of zero at this step, as they must while their lora_B is "
        "zero; they start moving with the next one",
        "all 4 trainable tensors got a gradient and moved (after 2 updates)",
    ]


def test_a_module_that_is_never_used_is_named():
    log = run(Model(unused=True), TrainabilityReportHook(patience=3), 5)
    assert len(log.warnings) == 2
    assert log.warnings[0].startswith(
        "step 1: 2 of 6 trainable tensors got no gradient, or only zeros: unused.bias (1), "
        "unused.weight (1)."
    )
    assert log.warnings[1].startswith(
        "2 of 6 trainable tensors have not moved in 3 updates: unused.weight (1), unused.bias (1)."
    )


def test_updates_lost_to_rounding_are_seen():
    model = nn.Sequential(nn.Linear(4, 1, bias=False)).to(torch.bfloat16)
    nn.init.constant_(model[0].weight, 100.0)  # bf16 steps are 0.5 there
    log = run(
        model,
        TrainabilityReportHook(patience=2),
        3,
        lr=1e-3,
        forward=lambda x: model(x.bfloat16()).mean(),
    )
    assert len(log.warnings) == 1
    assert log.warnings[0].startswith(
        "1 of 1 trainable tensors have not moved in 2 updates: *.weight (1)."
    )


def test_steps_with_learning_rate_zero_do_not_count():
    log = run(Model(), TrainabilityReportHook(patience=2), 5, zero_lr_steps=3)
    assert log.warnings == []
    assert log.infos[-1].endswith("(after 2 updates)")


def test_a_first_step_that_is_not_finite_says_nothing():
    model, hook, log = Model(), TrainabilityReportHook(), Log()
    strategy = SimpleNamespace(keeps_gradients=True)
    runner = SimpleNamespace(model=model, iter=0, logger=log, strategy=strategy)
    hook.before_train(runner)
    hook.before_optimizer_step(runner, 0, None, {"loss": float("nan"), "num_units": 2.0})
    assert log.warnings == []


def test_a_loss_that_reaches_nothing_is_an_error():
    leaf = torch.zeros((), requires_grad=True)
    with pytest.raises(RuntimeError, match="none of the 4 trainable tensors got a gradient"):
        run(Model(), TrainabilityReportHook(), 1, forward=lambda x: leaf * 1.0)


def test_nothing_trainable_is_an_error_before_training(tmp_path):
    model = Model().requires_grad_(False)
    with pytest.raises(
        ValueError, match="no trainable parameter: all is frozen. Give model a lora"
    ):
        TrainabilityReportHook().before_train(SimpleNamespace(model=model, logger=Log()))


def test_the_report():
    # 2 layers: base 16, lora_A 8 and lora_B 8 weights each.
    report = format_report(group_parameters(Model().named_parameters()))
    assert report.splitlines() == [
        "parameters (names under layers.*.):",
        "trained: 32 parameters (50.00%) in 4 tensors",
        "    lora_A.default.weight  2 x  16  float32",
        "    lora_B.default.weight  2 x  16  float32",
        "frozen: 32 parameters (50.00%) in 2 tensors",
        "    base.weight  2 x  32  float32",
    ]
    assert format_report(group_parameters(Model(unused=True).named_parameters())).startswith(
        "trained: 52 parameters"
    )


def test_under_the_runner(tmp_path):
    runner, _ = train(tmp_path, {"trainability": {"type": "TrainabilityReportHook"}})
    assert "trained: 5 parameters (100.00%) in 2 tensors" in log_text(runner)
    assert "all 2 trainable tensors got a gradient and moved (after 1 update)" in log_text(runner)


def test_names():
    assert collapse_name("model.layers.11.mlp.experts.3.w1") == "model.layers.*.mlp.experts.*.w1"
    assert collapse_name("q_proj.lora_A.weight") == "q_proj.lora_A.weight"
    assert collapse_names(["a.0.w", "a.1.w", "b"]) == "a.*.w (2), b (1)"
    assert collapse_names([f"w_{i}" for i in range(12)]).endswith("w_9 (1) and 2 more")


def test_patience_is_checked():
    with pytest.raises(ValueError, match="patience=0; use 1 or more"):
        TrainabilityReportHook(patience=0)


def test_where_gradients_are_taken_away_their_norm_is_looked_at():
    model, log = Model(), Log()
    strategy = SimpleNamespace(keeps_gradients=False)
    runner = SimpleNamespace(model=model, iter=0, logger=log, strategy=strategy)
    hook = TrainabilityReportHook()
    hook.before_train(runner)
    outputs = {"loss": 1.0, "num_units": 2.0, "grad_norm": 0.25}
    hook.before_optimizer_step(runner, 0, None, outputs)
    assert log.infos[-1].startswith("gradient norm of the first step: 0.25; which tensors")
    hook.before_train(runner)
    with pytest.raises(RuntimeError, match="none of the .* trainable tensors got a gradient"):
        hook.before_optimizer_step(runner, 0, None, {**outputs, "grad_norm": 0.0})
