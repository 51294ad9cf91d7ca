"""Exports of a LLaVA: transformers' form and XTuner's answer like the run they come from."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.tiny import tiny_llama, tiny_tokenizer
from tests.tiny_images import IMAGE, plain_images, tiny_tower
from xtuner_lite.cli.main import main
from xtuner_lite.export.llava import export_llava
from xtuner_lite.export.merge import merge_adapter
from xtuner_lite.export.publish import RECEIPT, ExportError
from xtuner_lite.methods.llava import LLaVAModel
from xtuner_lite.models.image_text import load_image_text_model
from xtuner_lite.models.llava import load_visual_encoder
from xtuner_lite.models.llava_xtuner import UnnamedPart
from xtuner_lite.models.loading import load_causal_lm

KINDS = {
    "projector": dict(freeze_llm=True, freeze_visual_encoder=True),
    "lora": dict(llm_lora=LoraConfig(r=2), freeze_visual_encoder=True),
    "loras": dict(
        llm_lora=LoraConfig(r=2, lora_alpha=4),
        visual_encoder_lora=LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "fc1"]),
    ),
    "tower": dict(llm_lora=LoraConfig(r=2), freeze_visual_encoder=False),
    "whole": dict(),
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tiny_llama(tie_word_embeddings=False).save_pretrained(folder / "llm")
    tiny_tower().save_pretrained(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def runs(parts, tmp_path_factory):
    """kind -> folder that a run of it would have saved, with random trained weights."""
    found = {}
    for kind, options in [*KINDS.items(), ("deep", {**KINDS["lora"], "projector_depth": 3})]:
        method = LLaVAModel(
            load_causal_lm(parts / "llm"), load_visual_encoder(parts / "clip"),
            image_token_id=IMAGE + 1, **options,
        )  # fmt: skip
        random = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in method.trainable_parameters().values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=random)
        found[kind] = tmp_path_factory.mktemp(kind)
        method.save_pretrained(found[kind])
        tiny_tokenizer().save_pretrained(found[kind])
    return found


def logits(model):
    ids = torch.tensor([[5, 6, *[IMAGE + 1] * 4, 7, 8, 9]])
    torch.manual_seed(0)
    with torch.no_grad():
        return model.eval()(input_ids=ids, **plain_images(1)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_hugging_face_form_answers_the_same(runs, tmp_path, kind):
    receipt = export_llava(runs[kind], tmp_path / "out")
    assert receipt.verification["tokens_equal"]
    assert receipt.verification["max_logit_difference"] < 1e-3
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    expected = logits(load_image_text_model(runs[kind]))
    assert torch.allclose(logits(model), expected, atol=1e-4)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {RECEIPT, "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert "llava.json" not in names
    assert "adapter_config.json" not in names


@pytest.mark.parametrize("kind", [*KINDS, "deep"])
def test_xtuners_layout_answers_the_same(runs, tmp_path, kind):
    receipt = export_llava(runs[kind], tmp_path / "out", form="xtuner")
    assert receipt.verification["tokens_equal"]
    folders = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert (
        folders
        == {
            "projector": {"projector"},
            "lora": {"projector", "llm_adapter"},
            "deep": {"projector", "llm_adapter"},
            "loras": {"projector", "llm_adapter", "visual_encoder_adapter"},
            "tower": {"projector", "llm_adapter", "visual_encoder"},
            "whole": {"projector", "llm", "visual_encoder"},
        }[kind]
    )
    names = set(load_file(tmp_path / "out" / "projector" / "model.safetensors"))
    assert {"model.0.weight", "model.2.bias"} <= names
    if kind == "whole":
        text = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "llm")
        own = AutoModelForImageTextToText.from_pretrained(runs[kind])
        assert torch.equal(text.lm_head.weight, own.lm_head.weight)


@pytest.mark.parametrize("kind", ["loras", "tower", "whole"])
def test_xtuners_layout_opens_again_and_has_a_hugging_face_form(runs, parts, tmp_path, kind):
    out = tmp_path / "xtuner"
    export_llava(runs[kind], out, form="xtuner")
    others = {"llm": parts / "llm", "visual_encoder": parts / "clip"}
    inside = {"llm": out / "llm", "visual_encoder": out / "visual_encoder"}
    named = {name: place for name, place in others.items() if not inside[name].is_dir()}
    expected = logits(load_image_text_model(runs[kind]))
    assert torch.allclose(logits(load_image_text_model(out, **named)), expected, atol=1e-4)
    export_llava(out, tmp_path / "hf", **named)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    assert torch.allclose(logits(plain), expected, atol=1e-4)
    if kind != "loras":
        with pytest.raises(ValueError, match="holds one of its own that was trained"):
            load_image_text_model(out, **others)


def test_an_adapter_of_a_tower_from_transformers_4(runs, parts, tmp_path):
    out = tmp_path / "out"
    export_llava(runs["loras"], out, form="xtuner")
    file = out / "visual_encoder_adapter" / "adapter_model.safetensors"
    renamed = {
        name.replace("base_model.model.", "base_model.model.vision_model."): tensor
        for name, tensor in load_file(file).items()
    }
    assert all(".vision_model.encoder." in name for name in renamed)
    save_file(renamed, file)
    model = load_image_text_model(out, llm=parts / "llm", visual_encoder=parts / "clip")
    assert torch.allclose(logits(model), logits(load_image_text_model(runs["loras"])), atol=1e-4)


def test_what_xtuners_layout_does_not_say(runs, parts, tmp_path, caplog):
    out = tmp_path / "out"
    export_llava(runs["projector"], out, form="xtuner")
    others = {"llm": parts / "llm", "visual_encoder": parts / "clip"}
    with pytest.raises(UnnamedPart, match="which does not say which llm it belongs to"):
        load_image_text_model(out)
    with pytest.raises(ExportError, match="in XTuner's layout already"):
        export_llava(out, tmp_path / "again", form="xtuner", **others)
    file = out / "projector" / "config.json"
    saved = json.loads(file.read_text())
    assert saved["visual_select_layer"] == -2
    file.write_text(json.dumps({**saved, "hidden_act": "relu"}))
    with pytest.raises(ValueError, match="hidden_act='relu'"):
        load_image_text_model(out, **others)
    del saved["visual_select_layer"]
    file.write_text(json.dumps(saved))
    load_image_text_model(out, **others)
    assert "does not say which hidden state" in caplog.text


def test_xtuners_adapters_open_in_plain_peft(runs, parts, tmp_path):
    export_llava(runs["loras"], tmp_path / "out", form="xtuner")
    own = load_image_text_model(runs["loras"]).get_base_model()
    text = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(parts / "llm"), tmp_path / "out" / "llm_adapter"
    )
    ours = own.model.language_model.layers[1].mlp.up_proj
    theirs = text.get_base_model().model.layers[1].mlp.up_proj
    assert torch.equal(ours.lora_A["default"].weight, theirs.lora_A["default"].weight)
    assert ours.scaling == theirs.scaling == {"default": 2.0}
    tower = PeftModel.from_pretrained(
        load_visual_encoder(parts / "clip"), tmp_path / "out" / "visual_encoder_adapter"
    )
    ours = own.model.vision_tower.encoder.layers[0].mlp.fc1
    theirs = tower.get_base_model().encoder.layers[0].mlp.fc1
    assert torch.equal(ours.lora_B["default"].weight, theirs.lora_B["default"].weight)
    assert ours.scaling == theirs.scaling == {"default": 3.0}


def test_half_precision_is_told_and_checked(runs, tmp_path):
    receipt = export_llava(runs["lora"], tmp_path / "out", dtype="bf16")
    assert receipt.options["dtype"] == "bfloat16"
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert receipt.verification["max_logit_difference"] > 0
    assert receipt.verification["tolerance"] == 0.2


def test_an_export_that_answers_otherwise_is_not_published(runs, tmp_path, monkeypatch):
    import xtuner_lite.export.llava as module

    def wrong(folder):
        model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        model.model.multi_modal_projector.linear_1.weight.data.mul_(1.5)
        return model

    monkeypatch.setattr(module, "_open_plain", wrong)
    with pytest.raises(ExportError, match="does not answer like its source"):
        export_llava(runs["lora"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_named(runs, parts, tmp_path):
    with pytest.raises(ExportError, match="3 layer.*no Hugging Face form.*--format xtuner"):
        export_llava(runs["deep"], tmp_path / "out")
    with pytest.raises(ExportError, match="holds no LLaVA"):
        export_llava(tmp_path, tmp_path / "out")
    with pytest.raises(ExportError, match="'llama' model"):
        export_llava(parts / "llm", tmp_path / "out")
    with pytest.raises(ExportError, match="convert llava FOLDER OUT"):
        merge_adapter("auto", runs["lora"], tmp_path / "out")
    with pytest.raises(ValueError, match="load_image_text_model puts it together"):
        load_causal_lm(runs["projector"])
    assert not (tmp_path / "out").exists()


def test_the_command(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", "llava", str(runs["lora"]), str(out)]) == 0
    said = capsys.readouterr().out
    assert "2 prompts, greedy tokens the same" in said
    assert "no processor" in said
    receipt = json.loads((out / RECEIPT).read_text())
    assert receipt["what"] == "llava"
    assert receipt["options"]["form"] == "hf"
