"""Every adapter type of peft: trained, saved, reopened in plain peft, continued; or refused."""

import peft
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_batch, tiny_llama, tiny_segments
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.adapters import REFUSED, add_adapter
from xtuner_lite.models.loading import load_causal_lm

#: name -> (config class, settings); docs/howto/tuning_methods.md lists these names.
COMMON = {
    "LoRA": ("LoraConfig", dict(r=2)),
    "DoRA": ("LoraConfig", dict(r=2, use_dora=True)),
    "rsLoRA": ("LoraConfig", dict(r=2, use_rslora=True)),
    "PiSSA": ("LoraConfig", dict(r=2, init_lora_weights="pissa")),
    "OLoRA": ("LoraConfig", dict(r=2, init_lora_weights="olora")),
    "OFT": ("OFTConfig", dict(oft_block_size=4)),
    "BOFT": ("BOFTConfig", dict(boft_block_size=4)),
    "VeRA": ("VeraConfig", dict(r=4)),
    "LoHa": ("LoHaConfig", dict(r=2)),
    "LoKr": ("LoKrConfig", dict(r=2)),
    "IA3": ("IA3Config", dict(target_modules=["k_proj", "down_proj"],
                              feedforward_modules=["down_proj"])),
    "LayerNorm tuning": ("LNTuningConfig", dict(target_modules=["input_layernorm"])),
    "trainable tokens": ("TrainableTokensConfig",
                         dict(token_indices=[5, 6, 7], target_modules=["embed_tokens"])),
}  # fmt: skip
OTHERS = {
    "BEFT": ("BeftConfig", {}),
    "C3A": ("C3AConfig", dict(block_size=8)),
    "DEFT": ("DeftConfig", {}),
    "DeLoRA": ("DeloraConfig", {}),
    "FourierFT": ("FourierFTConfig", dict(n_frequency=10)),
    "FRoD": ("FrodConfig", {}),
    "GLoRA": ("GloraConfig", {}),
    "GraLoRA": ("GraloraConfig", dict(r=4, gralora_k=2)),
    "HiRA": ("HiraConfig", {}),
    "HRA": ("HRAConfig", dict(r=2)),
    "Lily": ("LilyConfig", {}),
    "MiSS": ("MissConfig", dict(r=2)),
    "OSF": ("OSFConfig", {}),
    "PEANuT": ("PeanutConfig", {}),
    "PSOFT": ("PsoftConfig", dict(r=4)),
    "PVeRA": ("PveraConfig", dict(r=4)),
    "RandLoRA": ("RandLoraConfig", dict(r=4)),
    "RoAd": ("RoadConfig", dict(group_size=8)),
    "SHiRA": ("ShiraConfig", dict(r=2)),
    "Supertuning": ("SupertuningConfig", {}),
    "TinyLoRA": ("TinyLoraConfig", {}),
    "Uni-LoRA": ("UniLoraConfig", {}),
    "VB-LoRA": ("VBLoRAConfig", dict(r=2, num_vectors=8, vector_length=16, topk=2)),
    "WaveFT": ("WaveFTConfig", dict(n_frequency=10)),
}
VIRTUAL_TOKENS = {
    "CartridgeConfig", "CPTConfig", "MultitaskPromptTuningConfig", "PrefixTuningConfig",
    "PromptEncoderConfig", "PromptTuningConfig",
}  # fmt: skip
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


def check_type(name, settings, base, folder):
    if not hasattr(peft, name):
        pytest.skip(f"this peft has no {name}")
    method = SupervisedFinetune(
        load_causal_lm(base), lora=dict(type=getattr(peft, name), **settings)
    )
    with torch.no_grad():
        before = method.eval().llm(IDS).logits
    optimizer = torch.optim.SGD(method.trainable_parameters().values(), lr=0.05)
    batch = tiny_batch([tiny_segments(5, 6)])
    for _ in range(2):  # with a zero matrix in front, the other one moves in the second step only
        method.train()(batch).loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad()
    method.save_pretrained(folder)
    with torch.no_grad():
        trained = method.eval().llm(IDS).logits
        assert (trained - before).abs().max() > 1e-4
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(base)), folder)
        torch.testing.assert_close(plain.eval()(IDS).logits, trained, atol=1e-5, rtol=1e-5)
        again = SupervisedFinetune(
            load_causal_lm(base), lora=dict(type=getattr(peft, name), **settings)
        )
        again.load_pretrained(folder)  # what load_from does
        torch.testing.assert_close(again.eval().llm(IDS).logits, trained, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMMON)
def test_a_common_type(name, base, tmp_path):
    check_type(*COMMON[name], base, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_type(name, base, tmp_path):
    check_type(*OTHERS[name], base, tmp_path)


def test_every_type_of_peft_is_tested_or_refused():
    kinds = {
        name
        for name, value in vars(peft).items()
        if isinstance(value, type) and issubclass(value, peft.PeftConfig)
    } - {"PeftConfig", "PromptLearningConfig"}
    tested = {name for name, _ in (COMMON | OTHERS).values()}
    by_peft = {kind: config.__name__ for kind, config in peft_configs().items()}
    refused = {by_peft[kind] for kind in REFUSED if kind in by_peft}
    assert kinds - tested - refused - VIRTUAL_TOKENS == set()
    assert tested.isdisjoint(refused | VIRTUAL_TOKENS)


def peft_configs():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {getattr(k, "value", k): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_trained_is_refused_with_the_reason(kind):
    settings = dict(total_step=10) if kind == "ADALORA" else {}
    if kind not in peft_configs():
        pytest.skip(f"this peft has no {kind}")
    if kind == "ADAMSS":
        pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match=f"{REFUSED[kind][:30]}.*Use an adapter inside layers"):
        add_adapter(tiny_llama(), peft_configs()[kind](**settings))


@pytest.mark.parametrize("name", sorted(VIRTUAL_TOKENS))
def test_virtual_tokens_are_refused(name):
    config = getattr(peft, name)(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="packed samples leave no place"):
        add_adapter(tiny_llama(), config)


def test_a_start_that_looks_at_data_is_refused():
    with pytest.raises(ValueError, match="init_lora_weights='eva', which looks at data"):
        add_adapter(tiny_llama(), peft.LoraConfig(init_lora_weights="eva"))


def test_the_documentation_lists_what_is_tested():
    from pathlib import Path

    page = Path(__file__).parents[2] / "docs/howto/tuning_methods.md"
    text = page.read_text(encoding="utf-8")
    missing = [name for name in (COMMON | OTHERS) if name not in text]
    missing += [name for name in VIRTUAL_TOKENS if name not in text]
    missing += [
        peft_configs()[k].__name__ for k in REFUSED if peft_configs()[k].__name__ not in text
    ]
    assert missing == []
