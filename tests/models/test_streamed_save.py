"""A model written tensor by tensor is the folder that transformers writes, byte for byte."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from tests.tiny import tiny_llama
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.streamed_save import plan_save, write_planned


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def streamed(model, plan):
    state = model.state_dict()
    return (state[name].clone() for name in plan.names)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_the_same_files_as_transformers(tmp_path, tied, max_shard_size):
    model = tiny_llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    plan = plan_save(model, max_shard_size)
    write_planned(model, tmp_path / "ours", plan, streamed(model, plan))
    assert (len(plan.files) > 1) is (max_shard_size == "20KB")
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")


def test_bfloat16_opens_in_plain_transformers(tmp_path):
    model = tiny_llama().to(torch.bfloat16)
    plan = plan_save(model)
    write_planned(model, tmp_path, plan, streamed(model, plan))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert plain.dtype == torch.bfloat16
    theirs = plain.state_dict()
    assert all(torch.equal(theirs[name], value) for name, value in model.state_dict().items())


def test_what_trains_may_be_kept_in_another_dtype(tmp_path):
    model = tiny_llama().to(torch.bfloat16)
    model.model.embed_tokens.requires_grad_(False)
    plan = plan_save(model, trained_dtype=torch.float32)
    tensors = next(iter(plan.files.values()))
    assert {t.dtype for t in tensors if "embed" in t.name} == {torch.bfloat16}
    assert {t.dtype for t in tensors if "embed" not in t.name} == {torch.float32}
    assert tensors[-1].name == "model.embed_tokens.weight"  # narrow dtypes last
    state = model.state_dict()
    weights = (state[t.name].to(t.dtype) for t in tensors)
    write_planned(model, tmp_path, plan, weights)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(plain.lm_head.weight, state["lm_head.weight"])
    assert torch.equal(plain.model.norm.weight, state["model.norm.weight"])


def test_a_model_that_transformers_converts_is_not_planned():
    config = MixtralConfig(  # its experts are one tensor here and one file entry each on the disk
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    assert plan_save(MixtralForCausalLM(config)) is None


def test_after_an_error_the_rest_is_drawn(tmp_path):
    """The other ranks take part in gathering every tensor; they must not wait for this one."""
    method = SupervisedFinetune(tiny_llama())
    plan, drawn = method.plan_streamed_save(), []

    def stream(names):
        for name in names:
            drawn.append(name)
            yield name, torch.zeros(3)  # no tensor of the model has this shape

    with pytest.raises(RuntimeError, match=r"\[384, 32\] was announced, torch.float32 \[3\] came"):
        method.save_streamed(tmp_path / "out", plan, stream)
    assert drawn == ["llm." + name for name in plan.names]
    drawn.clear()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        method.save_streamed(tmp_path / "file", plan, stream)
    assert len(drawn) == len(plan.names) == 20
    drawn.clear()
    method.save_streamed(None, plan, stream)  # another rank
    assert len(drawn) == 20
