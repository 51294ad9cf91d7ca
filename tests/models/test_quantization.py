"""QLoRA on the CPU: 4 and 8 bits, trained, saved, reopened in plain peft."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.tiny import tiny_batch, tiny_llama, tiny_segments
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.loading import load_causal_lm

pytest.importorskip("bitsandbytes")
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=64).bfloat16().save_pretrained(folder)
    return folder


def kinds_of_linear(model):
    return {type(m).__name__ for n, m in model.named_modules() if n.endswith("q_proj")}


def test_four_bits_are_nf4_with_double_quantisation(base):
    model = load_causal_lm(base, quantization="4bit")
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "Linear4bit"
    state = layer.weight.quant_state
    assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
    assert layer.compute_dtype == torch.bfloat16
    assert layer.weight.numel() * layer.weight.element_size() * 4 == 64 * 128 * 2  # of 16 bits
    assert type(model.lm_head).__name__ == "Linear"  # the head stays exact
    from bitsandbytes.functional import dequantize_4bit

    exact = load_causal_lm(base).model.layers[0].mlp.up_proj.weight.float()
    error = dequantize_4bit(layer.weight.data, state).float() - exact
    assert 0 < error.norm() / exact.norm() < 0.12  # NF4 on normal weights: about 0.09


def plain_config(bits):
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_trains_on_it_and_opens_in_plain_peft(bits, base, tmp_path):
    llm = load_causal_lm(base, quantization=bits)
    method = SupervisedFinetune(llm, lora=LoraConfig(r=2), activation_checkpointing=True)
    frozen = {n: p.detach().clone() for n, p in method.named_parameters() if not p.requires_grad}
    trained = method.trainable_parameters()
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for n, p in frozen.items() if "norm" in n} == {torch.bfloat16}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01)
    batch = tiny_batch([tiny_segments(9, 12)])
    losses = []
    for _ in range(6):
        with torch.autocast("cpu", torch.bfloat16):
            out = method.train()(batch)
        losses.append(out.loss_sum.item())
        out.loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    now = dict(method.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in frozen.items())
    method.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(str(base), quantization_config=plain_config(bits))
    plain = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    assert kinds_of_linear(plain.get_base_model()) == kinds_of_linear(method.llm.get_base_model())
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, method.eval().llm(IDS).logits)


def test_a_config_is_taken_as_it_is(base):
    given = dict(type=BitsAndBytesConfig, load_in_4bit=True, bnb_4bit_quant_type="fp4")
    model = load_causal_lm(base, quantization=given)
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.quant_type == "fp4"


def test_without_bitsandbytes_the_remedy_is_told(base, monkeypatch):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name == "bitsandbytes" else find_spec(name, *args),
    )
    with pytest.raises(ImportError, match="quantization='4bit' needs .*pip install bitsandbytes"):
        load_causal_lm(base, quantization="4bit")
