"""A DeepSpeed JSON: what it may say, what contradicts the config, and how that is told."""

from __future__ import annotations

import builtins
import importlib.util
import json

import pytest

from xtuner_lite.engine.optim import OptimWrapper
from xtuner_lite.engine.strategies.deepspeed import DeepSpeed
from xtuner_lite.engine.strategies.deepspeed_config import PRESETS, check_config, read_config
from xtuner_lite.registry import STRATEGIES

ADAMW = dict(type="AdamW", lr=1e-3, weight_decay=0.1)


def stage2(**more):
    return {"zero_optimization": {"stage": 2}, **more}


def sections(**optim):
    return dict(
        train_dataloader=dict(batch_size=2),
        optim_wrapper=dict(optimizer=ADAMW, dtype="bf16", accumulative_counts=4, **optim),
    )


def test_every_preset_is_accepted_under_both_names():
    assert len(PRESETS) == 5
    for name in PRESETS:
        values, source = read_config(name)
        assert read_config(f"deepspeed_{name}") == (values, source)
        zero = check_config(values, source)
        assert zero.stage == int(name[4])
        assert (zero.offload_optimizer is not None) == name.endswith("offload")


def test_a_file_that_agrees_is_accepted(tmp_path):
    path = tmp_path / "agrees.json"
    path.write_text(
        json.dumps(
            stage2(
                train_batch_size="auto",
                train_micro_batch_size_per_gpu=2,
                gradient_accumulation_steps=4,
                gradient_clipping=1.0,
                bf16={"enabled": True},
                fp16={"enabled": "auto", "loss_scale_window": 1000},
                optimizer={"type": "adamw", "params": {"lr": 1e-3, "eps": "auto"}},
            )
        )
    )
    strategy = STRATEGIES.build(dict(type="DeepSpeed", config=str(path)))
    strategy.check_sections(**sections(clip_grad=dict(max_norm=1.0)))
    assert (strategy.stage, strategy.is_sharded) == (2, False)


@pytest.mark.parametrize(
    ("json_values", "path", "ours"),
    [
        (dict(train_micro_batch_size_per_gpu=8), "train_micro_batch_size_per_gpu is 8", "is 2"),
        (dict(train_batch_size=64), "train_batch_size is 64", "is 8"),
        (dict(gradient_accumulation_steps=2), "gradient_accumulation_steps is 2", "counts is 4"),
        (dict(gradient_clipping=0.5), "gradient_clipping is 0.5", "max_norm"),
        (dict(bf16={"enabled": False}), "bf16.enabled is False", "optim_wrapper.dtype"),
        (dict(fp16={"enabled": True}), "fp16.enabled is True", "optim_wrapper.dtype"),
        (dict(optimizer={"type": "Lamb"}), "optimizer.type is 'Lamb'", "is 'AdamW'"),
        (
            dict(optimizer={"type": "AdamW", "params": {"lr": 5e-5}}),
            "optimizer.params.lr is 5e-05",
            "optim_wrapper.optimizer.lr is 0.001",
        ),
        (
            dict(optimizer={"type": "AdamW", "params": {"betas": [0.9, 0.95]}}),
            "optimizer.params.betas",
            "(0.9, 0.999)",
        ),
    ],
)
def test_a_contradiction_names_both_places_and_values(json_values, path, ours):
    strategy = DeepSpeed(stage2(**json_values))
    with pytest.raises(ValueError, match="contradicts the run's config") as told:
        strategy.check_sections(**sections())
    assert path in str(told.value)
    assert "strategy.config" in str(told.value)
    assert ours in str(told.value)


def test_the_built_wrapper_is_compared_too():
    strategy = DeepSpeed(stage2(gradient_accumulation_steps=3))
    wrapper = OptimWrapper(dict(type="AdamW", lr=1e-3), accumulative_counts=2)
    with pytest.raises(ValueError, match="gradient_accumulation_steps is 3.*counts is 2"):
        strategy._check_against(wrapper, dtype="fp32")


def test_keys_of_the_loss_scaler_are_refused_under_fp16():
    strategy = DeepSpeed(stage2(fp16={"enabled": True, "initial_scale_power": 8}))
    changed = sections()
    changed["optim_wrapper"]["dtype"] = "fp16"
    with pytest.raises(ValueError, match="fp16.initial_scale_power is 8.*loss_scale"):
        strategy.check_sections(**changed)


def test_clipping_by_another_norm_is_refused():
    with pytest.raises(ValueError, match="norm_type is 1.0; DeepSpeed clips by the 2-norm"):
        DeepSpeed("zero2").check_sections(**sections(clip_grad=dict(max_norm=1.0, norm_type=1.0)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zero_optimisation": {}}, "unknown key 'zero_optimisation'; did you mean 'zero_opt"),
        ({"zero_optimization": {"stage": 2, "overlap_com": 1}}, "did you mean 'overlap_comm'"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}},
            "offload_optimizer: unknown key 'devise'; did you mean 'device'",
        ),
        (stage2(fp16={"enabeld": True}), "fp16: unknown key 'enabeld'; did you mean 'enabled'"),
        (stage2(optimizer={"typ": "AdamW"}), "optimizer: unknown key 'typ'"),
        (stage2(scheduler={"type": "WarmupLR"}), "scheduler is not taken.*param_scheduler"),
        (stage2(tensorboard={"enabled": True}), "tensorboard is not taken"),
        (stage2(data_types={}), "data_types is not taken"),
        (stage2(bf16={"bf16_optimizer_states": True}), "bf16.bf16_optimizer_states is not taken"),
        (stage2(bf16=True), "bf16 is True; it must be an object"),
        ({"zero_optimization": {"stage": 0}}, "stage is 0; it must be 1, 2 or 3"),
        ({}, "stage is None; it must be 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "much"}},
            "reduce_bucket_size",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "offload_param.device 'nvme' is not taken: use 'cpu'",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "only stage 3 can offload parameters",
        ),
    ],
)
def test_keys_that_are_wrong_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DeepSpeed(values)


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="'zero4' is neither a preset.*did you mean"):
        DeepSpeed("zero4")
    broken = tmp_path / "broken.json"
    broken.write_text('{"zero_optimization": {"stage": 2}')
    with pytest.raises(ValueError, match="broken.json is not valid JSON: .*line 1"):
        DeepSpeed(str(broken))
    twice = tmp_path / "twice.json"
    twice.write_text('{"zero_optimization": {"stage": 2, "stage": 3}}')
    with pytest.raises(ValueError, match="twice.json: key 'stage' is given twice"):
        DeepSpeed(str(twice))
    no_object = tmp_path / "list.json"
    no_object.write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, not an object"):
        DeepSpeed(str(no_object))


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name)
    )
    monkeypatch.setattr(builtins, "__import__", _without_deepspeed(builtins.__import__))
    with pytest.raises(ImportError, match="pip install 'deepspeed"):
        DeepSpeed("zero2")


def _without_deepspeed(own):
    def imported(name, *args, **kwargs):
        assert name.partition(".")[0] != "deepspeed", "imported although it is not installed"
        return own(name, *args, **kwargs)

    return imported


def test_half_weights_need_stage_2():
    with pytest.raises(ValueError, match="half_weights=True needs ZeRO stage 2 or 3"):
        DeepSpeed("zero1", half_weights=True)
