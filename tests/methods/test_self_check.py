"""The check before the first step finds models that our way to the logits does not fit."""

import pytest
import torch
from peft import LoraConfig

from tests.tiny import tiny_batch, tiny_llama, tiny_segments
from xtuner_lite.methods.self_check import check_packed_forward
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.loading import load_causal_lm

BATCH = tiny_batch([tiny_segments(9, 6)])


def test_a_plain_model_passes():
    for head in ("chunked", "model"):
        check_packed_forward(tiny_llama(), BATCH, head=head)
        check_packed_forward(tiny_llama().bfloat16(), BATCH, head=head)
    check_packed_forward(tiny_llama(), tiny_batch([tiny_segments(5)]))


def scale_logits(model):
    """A forward that does something to the logits which no setting of the config tells."""
    own = model.forward

    def forward(*args, **kwargs):
        out = own(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    model.forward = forward
    return model


def test_a_forward_with_a_head_of_its_own_is_found():
    model = scale_logits(tiny_llama())
    with pytest.raises(RuntimeError, match="LlamaForCausalLM.*use head='model'"):
        check_packed_forward(model, BATCH)
    check_packed_forward(model, BATCH, head="model")


def test_samples_that_see_each_other_are_found():
    model = tiny_llama()
    decoder, own = model.model, model.model.forward

    def forward(input_ids, position_ids=None, **kwargs):
        # All tokens as one sample, as a recurrent layer that knows no borders would see them.
        cu_seqlens = torch.tensor([0, input_ids.shape[1]], dtype=torch.int32)
        if "cu_seq_lens_q" in kwargs:
            kwargs["cu_seq_lens_q"] = cu_seqlens
        return own(input_ids, position_ids=position_ids, **kwargs)

    decoder.forward = forward
    with pytest.raises(RuntimeError, match="packed samples see each other"):
        check_packed_forward(model, BATCH)


def test_it_runs_once_in_training_and_leaves_modes_and_random_numbers_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "xtuner_lite.methods.sft.check_packed_forward",
        lambda *args, **kwargs: calls.append(1) or check_packed_forward(*args, **kwargs),
    )
    sft = SupervisedFinetune(tiny_llama(attention_dropout=0.1))
    sft.llm.model.norm.eval()
    torch.manual_seed(0)
    first = sft(BATCH).loss_sum
    torch.manual_seed(0)
    assert torch.equal(sft(BATCH).loss_sum, first)
    assert calls == [1]
    assert sft.llm.model.layers[0].training
    assert not sft.llm.model.norm.training


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantised_bases_pass_and_train(tmp_path, quantization):
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=64).save_pretrained(tmp_path)
    model = load_causal_lm(tmp_path, dtype="bfloat16", quantization=quantization)
    sft = SupervisedFinetune(model, lora=LoraConfig(r=2))
    with torch.autocast("cpu", torch.bfloat16):
        out = sft(BATCH)
    out.loss_sum.backward()
    assert all(p.grad is not None for p in sft.trainable_parameters().values())
