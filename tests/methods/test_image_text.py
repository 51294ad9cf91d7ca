"""Image-text models of many families: packed as alone, gradients as transformers', parts frozen."""

import pytest
import torch
from peft import LoraConfig, PeftModel

from tests.tiny_images import ISOLATED, image_batch, tiny_image_text
from xtuner_lite.methods.image_text import ImageTextFinetune
from xtuner_lite.methods.self_check import check_packed_forward
from xtuner_lite.models.attention import PACKED_SDPA
from xtuner_lite.models.image_inputs import plain_inputs, split_images
from xtuner_lite.models.image_text import load_image_text_model
from xtuner_lite.models.image_text_parts import find_parts, pattern_of
from xtuner_lite.models.packed_forward import hands_segments_on

SEGMENTS = [(1, 4), (2, 5), (0, 6), (1, 3)]


def plain_gradients(model, batch):
    """Loss sum and gradients of transformers' own forward, segment by segment."""
    model.zero_grad()
    lengths = batch["cu_seqlens"].diff().tolist()
    ids, labels = batch["input_ids"][0].split(lengths), batch["labels"][0].split(lengths)
    images = split_images(model, list(ids), batch["images"])
    total = 0.0
    for i, segment in enumerate(ids):
        inputs = {"input_ids": segment[None]}
        if (segment == 383).any():
            inputs = plain_inputs(model, segment[None], images[i])
        logits = model(**inputs, use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.float(), labels[i][1:], reduction="sum", ignore_index=-100
        )
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_ten_families_are_isolated():
    assert len(ISOLATED) == 10


@pytest.mark.parametrize("family", ISOLATED)
def test_loss_and_gradients_of_packed_samples_are_those_of_each_alone(family):
    model, tokens, images = tiny_image_text(family)
    batch = image_batch(images, SEGMENTS, tokens=tokens)
    expected, gradients = plain_gradients(model, batch)
    for attn in ["sdpa", PACKED_SDPA] if hands_segments_on(model.config.model_type) else ["sdpa"]:
        model.config.get_text_config()._attn_implementation = attn
        method = ImageTextFinetune(model, freeze_visual_encoder=False)
        model.zero_grad()
        out = method(batch)
        assert out.num_units == 18
        out.loss_sum.backward()
        assert out.loss_sum.item() == pytest.approx(expected, rel=1e-5)
        for name, parameter in model.named_parameters():
            if name in gradients:
                scale = gradients[name].abs().max().clamp_min(1)
                assert (parameter.grad - gradients[name]).abs().max() <= 1e-5 * scale, name
            else:
                assert parameter.grad is None or not parameter.grad.any(), name


def test_a_family_that_reads_prompts_both_ways_is_refused():
    model, tokens, images = tiny_image_text("paligemma")
    batch = image_batch(images, SEGMENTS, tokens=tokens)
    with pytest.raises(RuntimeError, match="PaliGemma.*load_image_text_model"):
        ImageTextFinetune(model)(batch)
    with pytest.raises(RuntimeError, match="both directions.*one of another family"):
        ImageTextFinetune(model, head="model")(batch)


def test_images_that_leak_into_the_next_sample_are_found(monkeypatch):
    model, tokens, images = tiny_image_text("internvl")
    batch = image_batch(images, SEGMENTS, tokens=tokens)
    own = model.model.language_model.forward

    def one_sample(*args, position_ids=None, **kwargs):
        if position_ids is not None:
            position_ids = torch.arange(position_ids.shape[1])[None]
        return own(*args, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(model.model.language_model, "forward", one_sample)
    with pytest.raises(RuntimeError, match="packed samples see each other"):
        check_packed_forward(model, batch)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm", "gemma3"])
def test_what_is_frozen_stays_and_the_rest_trains(family):
    batch = None
    for frozen in ("llm", "visual_encoder", "projector"):
        model, tokens, images = tiny_image_text(family)
        batch = image_batch(images, SEGMENTS, tokens=tokens)
        flags = {"freeze_visual_encoder": False, f"freeze_{frozen}": True}
        method = ImageTextFinetune(model, **flags)
        parts = find_parts(model)
        method(batch).loss_sum.backward()
        seen = set()
        for name, parameter in model.named_parameters():
            seen.add(parts.part_of(name))
            if parts.part_of(name) == frozen:
                assert not parameter.requires_grad, name
                assert parameter.grad is None, name
            else:
                assert parameter.requires_grad, name
        assert seen == {"llm", "visual_encoder", "projector"}


@pytest.mark.parametrize("family", ISOLATED)
def test_lora_goes_on_the_parts_that_train_and_opens_in_plain_peft(family, tmp_path):
    model, tokens, images = tiny_image_text(family)
    batch = image_batch(images, SEGMENTS, tokens=tokens)
    method = ImageTextFinetune(model, lora=LoraConfig(r=2), freeze_projector=True)
    names = [n for n, p in method.llm.named_parameters() if p.requires_grad]
    decoder = find_parts(model).llm[0]
    assert names
    assert all(f".{decoder}." in f".{name}" and "lora_" in name for name in names)
    assert any(name.endswith("q_proj.lora_A.default.weight") for name in names)
    out = method(batch)
    out.loss_sum.backward()
    with torch.no_grad():
        for name, parameter in method.llm.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    expected = method(batch).loss_sum.item()
    assert expected != pytest.approx(out.loss_sum.item(), abs=1e-3)
    method.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_image_text(family)[0], str(tmp_path))
    assert ImageTextFinetune.forward(
        _around(method, again), batch
    ).loss_sum.item() == pytest.approx(expected, rel=1e-5)


def _around(method, model):
    method.llm = model
    return method


def test_a_saved_model_opens_again_with_the_packed_attention(tmp_path):
    model, tokens, images = tiny_image_text("llava")
    batch = image_batch(images, SEGMENTS, tokens=tokens)
    method = ImageTextFinetune(model)
    expected = method(batch).loss_sum.item()
    method.save_pretrained(tmp_path)
    again = load_image_text_model(tmp_path)
    assert again.config.get_text_config()._attn_implementation == PACKED_SDPA
    assert again.config.vision_config._attn_implementation == "sdpa"
    assert ImageTextFinetune(again)(batch).loss_sum.item() == pytest.approx(expected, rel=1e-6)


def test_mistakes_are_named(tmp_path):
    from tests.tiny import tiny_llama

    with pytest.raises(ValueError, match="no encoder for images.*load_image_text_model"):
        ImageTextFinetune(tiny_llama())
    model = tiny_image_text("llava")[0]
    with pytest.raises(ValueError, match="leaves nothing to train"):
        ImageTextFinetune(model, freeze_llm=True, freeze_projector=True)
    with pytest.raises(ValueError, match="names no module.*q_proj"):
        ImageTextFinetune(model, lora=LoraConfig(target_modules=["fc1"]))
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llama' model, which is no image-text model"):
        load_image_text_model(tmp_path)


def test_a_pattern_matches_its_names_and_no_others():
    names = ["a.layers.0.q", "a.layers.1.q", "b.layers.0.q", "head"]
    assert pattern_of(names[:2], names) == r"(?:a\.layers\.\d+\.q)"
    only_first = pattern_of(names[:1], names)
    assert only_first == r"(?:a\.layers\.0\.q)"
