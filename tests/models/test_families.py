"""The families of the shipped configs: a small model of each trains packed as it does apart."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.tiny import tiny_batch, tiny_segments
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.loading import load_causal_lm

SMALL = dict(
    vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
    initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LATENT = dict(
    num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8,
    v_head_dim=8,
)  # fmt: skip
FAMILIES = {
    "llama": {},  # InternLM2, InternLM2.5, Llama 3, DeepSeek LLM, SmolLM2
    "internlm3": {},
    "qwen2": {},  # Qwen2.5
    "qwen3": {},
    "mistral": {},
    "gemma3_text": dict(sliding_window=4, query_pre_attn_scalar=8),
    "phi3": dict(sliding_window=None, partial_rotary_factor=1.0),  # Phi-3, Phi-4
    "glm": {},  # GLM-4-9B-Chat
    "glm4": {},
    "deepseek_v2": dict(LATENT, moe_intermediate_size=16, n_routed_experts=4, n_shared_experts=1,
                        num_experts_per_tok=2, first_k_dense_replace=1, n_group=1, topk_group=1),
    "smollm3": {},
    "minicpm3": dict(LATENT, dim_model_base=16, scale_emb=2, scale_depth=1.4),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_packed_samples_train_as_apart(family, tmp_path):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SMALL | FAMILIES[family]))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    method = SupervisedFinetune(
        load_causal_lm(tmp_path), lora=LoraConfig(r=2, target_modules="all-linear")
    ).eval()
    first, second = tiny_segments(9, 12)
    packed = method(tiny_batch([[first, second]])).loss_sum
    apart = sum(method(tiny_batch([[ids]])).loss_sum for ids in (first, second))
    torch.testing.assert_close(packed, apart, atol=1e-3, rtol=1e-4)
    own = 0.0  # the model's own forward on each sample alone
    for ids in (first, second):
        logits = method.llm(torch.tensor([ids])).logits[0, 1:-1].float()
        own += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[2:]), reduction="sum")
    torch.testing.assert_close(packed, own, atol=1e-3, rtol=1e-4)
    method.train()(tiny_batch([[first, second]])).loss_sum.backward()  # self-check included
    assert all(p.grad is not None for p in method.trainable_parameters().values())
