"""A LLaVA of parts: transformers' own model, with its loss and gradients."""

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Cohere2Config,
    Cohere2ForCausalLM,
    LlavaForConditionalGeneration,
    PhiConfig,
    PhiForCausalLM,
    SiglipConfig,
    SiglipModel,
)

from tests.tiny import tiny_llama
from tests.tiny_images import IMAGE, image_batch, plain_images, tiny_llava, tiny_tower
from xtuner_lite.methods.llava import LLaVAModel
from xtuner_lite.models.attention import PACKED_SDPA
from xtuner_lite.models.image_text_parts import find_parts, unused_of_tower
from xtuner_lite.models.llava import (
    build_llava,
    give_image_token_a_row,
    load_visual_encoder,
    num_extra_tokens,
)
from xtuner_lite.models.loading import load_causal_lm

STRATEGY = {"clip": "default", "dinov2": "default", "siglip": "full"}


@pytest.mark.parametrize("kind", STRATEGY)
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_are_those_of_transformers(kind, tied):
    method = LLaVAModel(
        tiny_llama(tie_word_embeddings=tied), tiny_tower(kind), image_token_id=IMAGE,
        visual_select_strategy=STRATEGY[kind],
    )  # fmt: skip
    assert type(method.llm) is LlavaForConditionalGeneration
    assert method.llm.config.get_text_config()._attn_implementation == PACKED_SDPA
    segments = [(1, 4), (2, 5), (0, 3), (1, 6)]
    batch = image_batch(plain_images, segments)
    out = method(batch)
    out.loss_sum.div(out.num_units).backward()
    gradients = {n: p.grad.clone() for n, p in method.llm.named_parameters() if p.requires_grad}
    method.llm.zero_grad()
    # The same samples as a batch of transformers: one row each, padded, with labels.
    lengths = batch["cu_seqlens"].diff().tolist()
    ids = torch.nn.utils.rnn.pad_sequence(batch["input_ids"][0].split(lengths), True)
    labels = torch.nn.utils.rnn.pad_sequence(batch["labels"][0].split(lengths), True, -100)
    mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    plain = method.llm(
        input_ids=ids, attention_mask=mask.long(), labels=labels, **batch["images"], use_cache=False
    )
    plain.loss.backward()
    assert (out.loss_sum / out.num_units).item() == pytest.approx(plain.loss.item(), abs=1e-5)
    assert gradients.keys() == dict(method.llm.named_parameters()).keys() - _frozen(method)
    for name, parameter in method.llm.named_parameters():
        if name in gradients:
            assert (gradients[name] - parameter.grad).abs().max() < 1e-5, name


def _frozen(method):
    return {name for name, p in method.llm.named_parameters() if not p.requires_grad}


def test_parts_are_put_in_not_copied():
    llm, tower = tiny_llama(), tiny_tower()
    embeddings, patches = llm.get_input_embeddings().weight, tower.embeddings.patch_embedding.weight
    model = build_llava(llm, tower, image_token_id=IMAGE)
    assert model.get_input_embeddings().weight is embeddings
    assert model.lm_head.weight is embeddings  # tied, as it was
    assert model.model.vision_tower.embeddings.patch_embedding.weight is patches
    assert llm.config._attn_implementation == PACKED_SDPA
    assert model.config.text_config is llm.config
    assert model.generation_config.eos_token_id == 2
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_projector_of_any_depth_is_saved_and_opened(tmp_path, depth):
    model = tiny_llava(projector_depth=depth).eval()
    layers = [n for n, _ in model.model.multi_modal_projector.named_parameters()]
    assert len(layers) == 2 * depth
    ids = torch.tensor([[5, *[IMAGE] * 4, 7, 8]])
    pixels = plain_images(1)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    assert again.config.model_type == ("llava" if depth == 2 else "llava_mlp")
    with torch.no_grad():
        assert torch.equal(
            again(input_ids=ids, **pixels).logits, model(input_ids=ids, **pixels).logits
        )
        # By hand: linear, then GELU and linear for each further layer.
        hidden = features = torch.randn(1, 4, 16)
        for index in range(1, depth + 1):
            hidden = torch.nn.functional.gelu(hidden) if index > 1 else hidden
            hidden = getattr(model.model.multi_modal_projector, f"linear_{index}")(hidden)
        assert torch.allclose(model.model.multi_modal_projector(features), hidden)


def test_the_image_token_gets_the_mean_row():
    for tied in (True, False):
        llm = tiny_llama(tie_word_embeddings=tied)
        mean = llm.get_input_embeddings().weight.double().mean(0).float()
        give_image_token_a_row(llm, 385)
        rows = llm.get_input_embeddings().weight
        assert rows.shape[0] == 386 == llm.get_output_embeddings().weight.shape[0]
        assert torch.equal(rows[384], mean)
        assert torch.equal(rows[385], mean)
    before = tiny_llama().get_input_embeddings().weight
    llm = tiny_llama()
    give_image_token_a_row(llm, 100)
    assert torch.equal(llm.get_input_embeddings().weight, before)


def test_towers_are_opened_alone_and_out_of_both(tmp_path):
    vision = CLIPVisionConfig(**_small(), projection_dim=8)
    text = dict(_small(), vocab_size=20, max_position_embeddings=8)
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=CLIPTextConfig(**text)))
    clip.save_pretrained(tmp_path / "clip")
    tower = load_visual_encoder(tmp_path / "clip")
    assert type(tower).__name__ == "CLIPVisionModel"
    assert num_extra_tokens(tower) == 1
    own = clip.vision_model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in tower.state_dict().items())
    siglip = SiglipModel(SiglipConfig(vision_config=_small(), text_config=text))
    siglip.save_pretrained(tmp_path / "siglip")
    tower = load_visual_encoder(tmp_path / "siglip", dtype="bf16")
    assert type(tower).__name__ == "SiglipVisionModel"
    assert num_extra_tokens(tower) == 0
    assert tower.dtype == torch.bfloat16
    model = build_llava(tiny_llama(), tower, image_token_id=IMAGE, visual_select_strategy="full")
    assert model.model.vision_tower.dtype == torch.float32  # that of the language model


def _small():
    return dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "layer"), [("clip", -2), ("dinov2", -1), ("siglip", 1)])
def test_what_lies_behind_the_chosen_layer_is_unused(kind, layer):
    tower = tiny_tower(kind)
    tower.requires_grad_(False)
    unused = unused_of_tower(tower, layer)
    assert not any(p.requires_grad for p in tower.parameters())
    assert tower.training
    numbers = {n.split("layers.")[-1].split("layer.")[-1].split(".")[0] for n in unused}
    numbers = {int(n) for n in numbers if n.isdigit()}
    assert numbers == {-2: {2}, -1: set(), 1: {1, 2}}[layer]
    assert not any("patch" in name for name in unused)


def test_parts_of_a_llava():
    parts = find_parts(tiny_llava())
    assert parts.part_of("model.vision_tower.encoder.layers.0") == "visual_encoder"
    assert parts.part_of("model.multi_modal_projector.linear_1.weight") == "projector"
    assert parts.part_of("model.language_model.norm.weight") == "llm"
    assert parts.part_of("lm_head.weight") == "llm"


def test_what_does_not_fit_together_is_refused(tmp_path):
    with pytest.raises(ValueError, match="changes its logits .logit_scale=0.0625"):
        build_llava(
            Cohere2ForCausalLM(Cohere2Config(**_text())), tiny_tower(), image_token_id=IMAGE
        )
    with pytest.raises(ValueError, match="head of PhiForCausalLM has a bias"):
        build_llava(PhiForCausalLM(PhiConfig(**_text())), tiny_tower(), image_token_id=IMAGE)
    with pytest.raises(ValueError, match="'default', 'full'"):
        build_llava(tiny_llama(), tiny_tower(), image_token_id=IMAGE, visual_select_strategy="cls")
    with pytest.raises(ValueError, match="projector_depth is 0"):
        build_llava(tiny_llama(), tiny_tower(), image_token_id=IMAGE, projector_depth=0)
    tiny_llama().save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="no vision tower of patches"):
        load_visual_encoder(tmp_path / "text")
    tiny_llava().save_pretrained(tmp_path / "llava")
    with pytest.raises(ValueError, match="can see already.*ImageTextFinetune"):
        load_visual_encoder(tmp_path / "llava")
    with pytest.raises(ValueError, match="'llava' model, which is no causal language model"):
        load_causal_lm(tmp_path / "llava")


def _text():
    return dict(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, pad_token_id=0,
    )  # fmt: skip
