"""Adapters: any peft config, what trains in float32, misfits named."""

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PromptTuningConfig

from tests.tiny import tiny_llama
from xtuner_lite.models.adapters import add_adapter, build_peft_config, without_input_casts


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_lora_goes_on_all_linear_layers_by_default():
    model = add_adapter(tiny_llama(), {"type": LoraConfig, "r": 2})
    names = trainable(model)
    assert len(names) == 2 * 7 * 2  # layers x linear layers x (A, B)
    assert not any("lm_head" in name for name in names)


def test_adapter_weights_are_float32_on_a_bf16_base():
    config = LoraConfig(r=2, modules_to_save=["lm_head"])
    model = add_adapter(tiny_llama(tie_word_embeddings=False).bfloat16(), config)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert any("lm_head" in name for name in trainable(model))
    assert model.get_base_model().model.embed_tokens.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, use_dora=True),
        LoraConfig(r=2, use_rslora=True),
        LoHaConfig(r=2),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        {"type": "LoraConfig", "r": 2},
        {"type": "peft.LoraConfig", "r": 2, "target_modules": ["q_proj"]},
    ],
    ids=lambda c: getattr(c, "peft_type", None) or c["type"],
)
def test_other_adapter_types(config):
    model = add_adapter(tiny_llama(), config)
    model(torch.tensor([[3, 4]])).logits.sum().backward()
    assert trainable(model)
    assert all(p.grad is not None for p in trainable(model).values())


def test_the_callers_config_is_left_alone():
    config = LoraConfig(r=2)
    add_adapter(tiny_llama(), config)
    assert config.target_modules is None


def test_target_modules_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match="LlamaForCausalLM: .*'wqkv'.*down_proj, gate_proj"):
        add_adapter(tiny_llama(), LoraConfig(target_modules=["wqkv"]))


def test_virtual_tokens_are_refused():
    with pytest.raises(ValueError, match="packed samples leave no place"):
        add_adapter(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


@pytest.mark.parametrize("config", [{"r": 2}, "LoraConfig", {"type": dict, "r": 2}])
def test_what_is_no_peft_config_is_refused(config):
    with pytest.raises(TypeError, match=r"no peft config; write lora=.*LoraConfig"):
        build_peft_config(config)


def test_input_casts_are_spared_under_autocast_only_and_come_back():
    model = add_adapter(tiny_llama(), LoraConfig(r=2))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    with without_input_casts(model):
        assert layer.cast_input_dtype_enabled
    with torch.autocast("cpu", torch.bfloat16):
        with without_input_casts(model):
            assert not layer.cast_input_dtype_enabled
        assert layer.cast_input_dtype_enabled


def test_lora_plus_is_a_rule_on_names():
    """B learns 16 times as fast as A (arXiv:2402.12354): after one Adam step, it moved so far."""
    from tests.tiny import tiny_batch, tiny_segments
    from xtuner_lite.engine.optim import OptimWrapper
    from xtuner_lite.methods.sft import SupervisedFinetune

    method = SupervisedFinetune(tiny_llama(), lora=LoraConfig(r=2, init_lora_weights=False))
    before = {name: p.detach().clone() for name, p in method.trainable_parameters().items()}
    wrapper = OptimWrapper(
        dict(type=torch.optim.AdamW, lr=1e-4, weight_decay=0.0),
        paramwise_cfg=dict(custom_keys={"lora_B": dict(lr_mult=16)}),
    )
    optimizer = wrapper.build(method)
    assert {g["lr"]: len(g["params"]) for g in wrapper.param_groups} == {1e-4: 14, 16e-4: 14}
    method(tiny_batch([tiny_segments(9, 12)])).loss_sum.backward()
    optimizer.step()
    for name, p in method.trainable_parameters().items():  # Adam's first step is lr * sign(grad)
        moved = (p - before[name]).abs().max().item()
        assert moved == pytest.approx(16e-4 if "lora_B" in name else 1e-4, rel=0.02), name
