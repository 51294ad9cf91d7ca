"""What trains, by patterns."""

import pytest
import torch
from peft import LoraConfig

from tests.tiny import tiny_batch, tiny_llama, tiny_segments
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.freezing import freeze_parameters


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_frozen_parts_stay_and_the_rest_trains():
    sft = SupervisedFinetune(tiny_llama(), freeze=["embed_tokens", "*.layers.0.*"])
    assert {name.split(".")[3] for name in trained(sft)} == {"1", "weight"}  # layer 1, last norm
    before = {name: p.detach().clone() for name, p in sft.named_parameters()}
    sft(tiny_batch([tiny_segments(5, 6)])).loss_sum.backward()
    torch.optim.SGD(sft.trainable_parameters().values(), lr=0.1).step()
    moved = {name for name, p in sft.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained(sft)


def test_only_the_named_parts_train():
    sft = SupervisedFinetune(tiny_llama(), train_only=["mlp.down_proj"])
    assert trained(sft) == {f"llm.model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}


def test_a_part_of_an_adapter_is_frozen():
    sft = SupervisedFinetune(tiny_llama(), lora=LoraConfig(r=2), freeze=["lora_A"])
    assert len(trained(sft)) == 14
    assert all("lora_B" in name for name in trained(sft))


def test_a_tied_weight_goes_by_either_name():
    model = tiny_llama(tie_word_embeddings=True)
    freeze_parameters(model, freeze=["lm_head"])
    assert not model.model.embed_tokens.weight.requires_grad
    model = tiny_llama(tie_word_embeddings=True)
    freeze_parameters(model, train_only=["lm_head"])
    assert trained(model) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(freeze=["wte"]), r"freeze \['wte'\] match no trainable parameter; names look like"),
        (dict(train_only=["layers.7."]), r"train_only \['layers.7.'\] match no trainable"),
        (dict(freeze=["*"]), "leaves nothing to train"),
        (dict(freeze=["mlp"], train_only=["mlp"]), "are both given"),
    ],
)
def test_mistakes_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        freeze_parameters(tiny_llama(), **options)
