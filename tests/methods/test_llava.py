"""LLaVAModel: what trains, what a checkpoint holds, and where trained weights may come from."""

import json

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForImageTextToText

from tests.tiny import tiny_llama, tiny_tokenizer
from tests.tiny_images import IMAGE, image_batch, plain_images, tiny_llava, tiny_tower
from xtuner_lite.methods.llava import LLaVAModel
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.image_text import load_image_text_model
from xtuner_lite.models.llava import load_visual_encoder
from xtuner_lite.models.loading import load_causal_lm
from xtuner_lite.models.new_tokens import add_new_tokens

BATCH = image_batch(plain_images, [(1, 4), (2, 5), (1, 3)])


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a language model and a CLIP tower."""
    folder = tmp_path_factory.mktemp("parts")
    tiny_llama().save_pretrained(folder / "llm")
    tiny_tower().save_pretrained(folder / "clip")
    return folder


def make(parts, **options):
    options = {"freeze_llm": True, "freeze_visual_encoder": True, **options}
    return LLaVAModel(
        dict(type=load_causal_lm, path=str(parts / "llm")),
        dict(type=load_visual_encoder, path=str(parts / "clip")),
        image_token_id=IMAGE + 1,
        **options,
    )


def batch_of(parts=None):
    """BATCH with the image token that the tokenizer of these parts would have."""
    batch = dict(BATCH)
    batch["input_ids"] = torch.where(batch["input_ids"] == IMAGE, IMAGE + 1, batch["input_ids"])
    return batch


def train_a_little(method, *, steps=2):
    parameters = list(method.trainable_parameters().values())
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        method(batch_of()).loss_sum.div(10).backward()
        optimizer.step()
    return method


def logits(model):
    model.eval()
    ids = torch.tensor([[5, 6, *[IMAGE + 1] * 4, 7, 8, 9]])
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=BATCH["images"]["pixel_values"][:1]).logits


def names_of(method):
    return sorted(method.trainable_parameters())


# ------------------------------------------------------------------------------ what trains


def test_stage_one_trains_the_projector_alone(parts):
    method = make(parts)
    assert [name.rpartition("projector.")[2] for name in names_of(method)] == [
        "linear_1.bias", "linear_1.weight", "linear_2.bias", "linear_2.weight",
    ]  # fmt: skip
    method(batch_of()).loss_sum.backward()
    assert all(p.grad.abs().sum() > 0 for p in method.trainable_parameters().values())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(freeze_llm=False), {"llm", "projector"}),
        (dict(freeze_visual_encoder=False), {"tower", "projector"}),
        (dict(freeze_llm=False, freeze_visual_encoder=False), {"llm", "tower", "projector"}),
        (dict(llm_lora=LoraConfig(r=2)), {"llm lora", "projector"}),
        (dict(visual_encoder_lora=LoraConfig(r=2)), {"tower lora", "projector"}),
        (
            dict(llm_lora=LoraConfig(r=2), freeze_visual_encoder=False),
            {"llm lora", "tower", "projector"},
        ),
        (
            dict(llm_lora=LoraConfig(r=2), visual_encoder_lora=LoraConfig(r=3)),
            {"llm lora", "tower lora", "projector"},
        ),
    ],
)
def test_the_parts_train_as_they_are_asked_to(parts, options, expected):
    method = make(parts, **options)
    found = set()
    for name in names_of(method):
        part = "projector" if "projector" in name else "tower" if "tower" in name else "llm"
        found.add(part + (" lora" if "lora_" in name else ""))
    assert found == expected
    method(batch_of()).loss_sum.backward()
    # DDP waits for a gradient of everything that trains: nothing behind the chosen layer does.
    assert all(p.grad is not None for p in method.trainable_parameters().values())


def test_the_layer_behind_the_chosen_one_does_not_train(parts):
    names = names_of(make(parts, freeze_visual_encoder=False))
    assert any("encoder.layers.1." in name for name in names)
    assert not any("encoder.layers.2." in name or "post_layernorm" in name for name in names)
    names = names_of(make(parts, visual_encoder_lora=LoraConfig(r=2)))
    assert any("encoder.layers.1." in name for name in names)
    assert not any("encoder.layers.2." in name for name in names)


def test_one_adapter_holds_two_ranks(parts):
    method = make(
        parts,
        llm_lora=LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"]),
        visual_encoder_lora=LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj"]),
    )
    text = method.llava.model.language_model.layers[0]
    tower = method.visual_encoder.encoder.layers[0]
    assert (text.self_attn.q_proj.r["default"], text.mlp.up_proj.scaling["default"]) == (2, 2.0)
    assert tower.self_attn.q_proj.r["default"] == 3
    assert tower.self_attn.q_proj.scaling["default"] == 3.0
    assert not hasattr(text.self_attn.v_proj, "r")
    assert not hasattr(tower.self_attn.v_proj, "r")


@pytest.mark.parametrize("bits", ["4bit", pytest.param("8bit", marks=pytest.mark.slow)])
def test_a_quantised_language_model_takes_lora(parts, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    text = tiny_llama(hidden_size=64, tie_word_embeddings=False)
    folder = tmp_path / "llm64"
    text.save_pretrained(folder)

    def quantised(**options):
        llm = load_causal_lm(folder, dtype="bfloat16", quantization=bits)
        return LLaVAModel(llm, tiny_tower(), image_token_id=IMAGE + 1, **options)

    with pytest.raises(ValueError, match="quantised and lora is None"):
        quantised(freeze_visual_encoder=True)
    stage_one = quantised(freeze_llm=True, freeze_visual_encoder=True)
    with torch.autocast("cpu", torch.bfloat16):
        stage_one(batch_of()).loss_sum.backward()
    assert stage_one.projector.linear_1.weight.grad.abs().sum() > 0
    method = quantised(llm_lora=LoraConfig(r=2), freeze_visual_encoder=True)
    assert getattr(method.llava, f"is_loaded_in_{bits}")
    with torch.autocast("cpu", torch.bfloat16):
        method(batch_of()).loss_sum.backward()
    assert all(p.grad is not None for p in method.trainable_parameters().values())


# ------------------------------------------------------------------------------ saving


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ({}, {"llava.json", "projector"}),
        (dict(projector_depth=3), {"llava.json", "projector"}),
        (dict(freeze_visual_encoder=False), {"llava.json", "projector", "visual_encoder"}),
        (
            dict(llm_lora=LoraConfig(r=2), visual_encoder_lora=LoraConfig(r=3)),
            {"llava.json", "projector", "adapter_config.json", "adapter_model.safetensors"},
        ),
        (
            dict(llm_lora=LoraConfig(r=2, bias="lora_only"), freeze_visual_encoder=False),
            {"llava.json", "projector", "adapter_config.json", "adapter_model.safetensors",
             "visual_encoder"},
        ),
        (
            dict(freeze_llm=False, freeze_visual_encoder=False),
            {"config.json", "generation_config.json", "model.safetensors"},
        ),
        (
            dict(freeze_llm=False, projector_depth=1),
            {"config.json", "generation_config.json", "model.safetensors"},
        ),
    ],
)  # fmt: skip
def test_what_is_saved_opens_as_the_same_model(parts, tmp_path, options, files):
    method = train_a_little(make(parts, **options))
    # As the Runner saves: the tensors that saved_names tells, and no others.
    state = method.state_dict()
    method.save_pretrained(
        tmp_path / "run", {name: state[name] for name in method.saved_names() if name in state}
    )
    assert {path.name for path in (tmp_path / "run").iterdir()} == files
    expected = logits(method.llm)
    again = load_image_text_model(tmp_path / "run")
    assert torch.allclose(logits(again), expected, atol=1e-5)
    fresh = make(parts, **options)
    assert not torch.allclose(logits(fresh.llm), expected, atol=1e-3)
    fresh.load_pretrained(tmp_path / "run")
    assert torch.allclose(logits(fresh.llm), expected, atol=1e-5)
    for (name, ours), (_, theirs) in zip(
        method.trainable_parameters().items(), fresh.trainable_parameters().items(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_a_model_of_parts_is_the_same_whenever_it_is_built(parts):
    torch.manual_seed(3)
    first = make(parts)
    torch.manual_seed(3)
    torch.rand(100)  # numbers that something else draws
    second = make(parts)
    assert torch.equal(logits(first.llm), logits(second.llm))


def test_parts_that_moved_are_named_and_found(parts, tmp_path):
    method = make(parts)
    method.save_pretrained(tmp_path / "run")
    note = tmp_path / "run" / "llava.json"
    saved = json.loads(note.read_text())
    note.write_text(json.dumps(saved | {"llm": str(tmp_path / "gone")}))
    with pytest.raises(FileNotFoundError, match="llava.json says.*llm=..."):
        load_image_text_model(tmp_path / "run")
    again = load_image_text_model(tmp_path / "run", llm=parts / "llm")
    assert torch.equal(logits(again), logits(method.llm))
    note.write_text(json.dumps({"llm": "x"}))
    with pytest.raises(ValueError, match="not what a LLaVA run writes"):
        load_image_text_model(tmp_path / "run")


# ------------------------------------------------------------------------------ starting weights


def test_stage_two_starts_from_stage_one(parts, tmp_path):
    stage_one = train_a_little(make(parts))
    stage_one.save_pretrained(tmp_path / "one")
    stage_two = make(parts, pretrained_pth=tmp_path / "one", llm_lora=LoraConfig(r=2))
    assert torch.allclose(logits(stage_two.llm), logits(stage_one.llm), atol=1e-6)
    assert stage_two.projector.linear_1.weight.requires_grad


@pytest.mark.parametrize("form", ["run", "hf"])
def test_a_projector_gets_the_features_that_it_learnt_from(parts, tmp_path, form):
    """Other layers' have the same width; nothing else would tell."""
    stage_one = make(parts)
    (stage_one if form == "run" else stage_one.llm).save_pretrained(tmp_path / "one")
    two = dict(pretrained_pth=tmp_path / "one", llm_lora=LoraConfig(r=2))
    with pytest.raises(ValueError, match="visual_select_layer=-2.*'default'.*those of -1, 'def"):
        make(parts, visual_select_layer=-1, **two)
    same = make(parts, visual_select_layer=2, **two)  # of four hidden states
    assert same.llava.config.vision_feature_layer == 2


def test_other_parts_than_those_of_stage_one_are_told(parts, tmp_path, caplog):
    make(parts).save_pretrained(tmp_path / "one")
    make(parts, pretrained_pth=tmp_path / "one")
    assert not caplog.records
    tiny_llama().save_pretrained(tmp_path / "other")
    LLaVAModel(
        load_causal_lm(tmp_path / "other"), load_visual_encoder(parts / "clip"),
        image_token_id=IMAGE + 1, freeze_llm=True, freeze_visual_encoder=True,
        pretrained_pth=tmp_path / "one",
    )  # fmt: skip
    assert "was trained with the llm" in caplog.text
    assert caplog.text.count("was trained with") == 1


@pytest.mark.parametrize("kind", ["pth", "bin", "safetensors", "folder"])
def test_a_projector_of_xtuner_is_read(parts, tmp_path, kind):
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(5)
    weights = {
        "model.0.weight": torch.randn(32, 16, generator=random),
        "model.0.bias": torch.randn(32, generator=random),
        "model.2.weight": torch.randn(32, 32, generator=random),
        "model.2.bias": torch.randn(32, generator=random),
    }
    path = tmp_path / f"projector.{kind}"
    if kind in ("pth", "bin"):
        torch.save({"state_dict": {f"projector.{k}": v for k, v in weights.items()}}, path)
    elif kind == "safetensors":
        save_file({f"projector.{k}": v for k, v in weights.items()}, str(path))
    else:
        path = tmp_path / "xtuner" / "projector"
        path.mkdir(parents=True)
        save_file(weights, str(path / "model.safetensors"))
        (path / "config.json").write_text(json.dumps({"model_type": "projector", "depth": 2}))
    method = make(parts, pretrained_pth=path)
    assert torch.equal(method.projector.linear_1.weight, weights["model.0.weight"])
    assert torch.equal(method.projector.linear_2.bias, weights["model.2.bias"])
    if kind == "folder":
        method = make(parts, pretrained_pth=path.parent)
        assert torch.equal(method.projector.linear_2.weight, weights["model.2.weight"])
        (path.parent / "llm_adapter").mkdir()
        with pytest.raises(ValueError, match="llm_adapter beside the projector"):
            make(parts, pretrained_pth=path.parent)


def test_a_file_with_more_than_a_projector_is_refused(parts, tmp_path):
    torch.save(
        {"projector.model.0.weight": torch.zeros(32, 16), "llm.lora_A.weight": torch.zeros(2)},
        tmp_path / "all.pth",
    )
    with pytest.raises(ValueError, match="holds more than a projector .llm.lora_A.weight"):
        make(parts, pretrained_pth=tmp_path / "all.pth")
    torch.save({"weight": torch.zeros(32, 16)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no projector"):
        make(parts, pretrained_pth=tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match="is not there"):
        make(parts, pretrained_pth=tmp_path / "nothing")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="run is a work_dir.*give the checkpoint folder"):
        make(parts, pretrained_pth=tmp_path / "run")
    make(parts).save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "projector" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut/projector/model\.safetensors is damaged"):
        make(parts, pretrained_pth=tmp_path / "cut")


def test_a_tower_of_another_width_is_refused_with_both_named(parts, tmp_path):
    wide = LLaVAModel(
        tiny_llama(), tiny_tower(hidden_size=24), image_token_id=IMAGE,
        freeze_llm=True, freeze_visual_encoder=True,
    )  # fmt: skip
    wide.save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="features 24 wide.*vision tower is 16 wide"):
        make(parts, pretrained_pth=tmp_path / "one")
    make(parts, projector_depth=3).save_pretrained(tmp_path / "deep")
    with pytest.raises(ValueError, match="has 3 layer.*projector_depth is 2"):
        make(parts, pretrained_pth=tmp_path / "deep")


def test_a_hugging_face_llava_gives_its_projector_where_the_rest_is_the_same(parts, tmp_path):
    stage_one = train_a_little(make(parts))
    stage_one.llm.save_pretrained(tmp_path / "hf")
    stage_two = make(parts, pretrained_pth=tmp_path / "hf", llm_lora=LoraConfig(r=2))
    assert torch.allclose(logits(stage_two.llm), logits(stage_one.llm), atol=1e-6)
    trained = train_a_little(make(parts, freeze_llm=False))
    trained.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="another than this run's.*ImageTextFinetune"):
        make(parts, pretrained_pth=tmp_path / "whole")
    whole = make(parts, freeze_llm=False, pretrained_pth=tmp_path / "whole")
    assert torch.allclose(logits(whole.llm), logits(trained.llm), atol=1e-6)


def test_nothing_trained_is_left_out_without_a_word(parts, tmp_path):
    train_a_little(make(parts, llm_lora=LoraConfig(r=2))).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="holds an adapter, and this run has none"):
        make(parts, pretrained_pth=tmp_path / "lora")
    train_a_little(make(parts, freeze_visual_encoder=False)).save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match="vision tower that was trained.*load_visual_encoder"):
        make(parts, pretrained_pth=tmp_path / "tower")
    method = LLaVAModel(
        load_causal_lm(parts / "llm"), load_visual_encoder(tmp_path / "tower" / "visual_encoder"),
        image_token_id=IMAGE + 1, freeze_llm=True, freeze_visual_encoder=True,
        pretrained_pth=tmp_path / "tower",
    )  # fmt: skip
    assert torch.allclose(
        logits(method.llm), logits(load_image_text_model(tmp_path / "tower")), atol=1e-6
    )


# ------------------------------------------------------------------------------ the loss


def test_a_batch_without_images_gives_the_projector_a_zero_gradient():
    method = LLaVAModel(
        tiny_llama(), tiny_tower(), image_token_id=IMAGE, freeze_visual_encoder=True
    )
    # A filler segment (a blank image that teaches nothing) beside text that teaches.
    batch = image_batch(plain_images, [(0, 6), (0, 4), (1, 0)])
    out = method(batch)
    out.loss_sum.backward()
    assert out.num_units == 10
    for parameter in method.projector.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    text = SupervisedFinetune(tiny_llama())
    ids = {**batch, "images": None}
    alone = {key: value for key, value in ids.items() if key not in ("images", "num_images")}
    assert text(alone).loss_sum.item() == pytest.approx(out.loss_sum.item(), rel=1e-6)
    nothing = image_batch(plain_images, [(1, 0)])
    method.zero_grad()
    out = method(nothing)
    out.loss_sum.backward()
    assert out.loss_sum.item() == 0
    assert all(not p.grad.any() for p in method.trainable_parameters().values())


def test_images_and_their_places_must_agree():
    method = LLaVAModel(tiny_llama(), tiny_tower(), image_token_id=IMAGE, self_check=False)
    batch = dict(BATCH, images={"pixel_values": BATCH["images"]["pixel_values"][:2]})
    with pytest.raises(ValueError, match="do not match"):
        method(batch)


# ------------------------------------------------------------------------------ mistakes


def test_new_tokens_that_would_be_lost_are_refused():
    tokenizer = tiny_tokenizer()
    add_new_tokens(tokenizer, ["<box>"])
    options = dict(tokenizer=tokenizer, image_token_id=IMAGE, freeze_visual_encoder=True)
    with pytest.raises(ValueError, match="new tokens.*give llm_lora"):
        LLaVAModel(tiny_llama(), tiny_tower(), freeze_llm=True, **options)
    method = LLaVAModel(tiny_llama(), tiny_tower(), llm_lora=LoraConfig(r=2), **options)
    assert any("trainable_tokens" in name for name in method.trainable_parameters())


def test_mistakes_are_named(parts):
    with pytest.raises(ValueError, match="visual_encoder_lora with a language model that trains"):
        make(parts, freeze_llm=False, visual_encoder_lora=LoraConfig(r=2))
    with pytest.raises(ValueError, match="differ in lora_dropout=0.0 and 0.1"):
        make(
            parts,
            llm_lora=LoraConfig(r=2),
            visual_encoder_lora=LoraConfig(r=2, lora_dropout=0.1),
        )
    with pytest.raises(ValueError, match="bias='all' in llm_lora"):
        make(parts, llm_lora=LoraConfig(r=2, bias="all"))
    for name in ("multi_modal_projector", "linear_1"):  # else found at the first checkpoint
        with pytest.raises(ValueError, match=f"modules_to_save='{name}'.*is saved anyhow"):
            make(parts, llm_lora=LoraConfig(r=2, modules_to_save=[name]))
    with pytest.raises(ValueError, match="no image token.*load_llava_processor"):
        LLaVAModel(tiny_llama(), tiny_tower())
    with pytest.raises(TypeError, match="visual_encoder is 'clip'"):
        LLaVAModel(tiny_llama(), "clip", image_token_id=IMAGE)
    with pytest.raises(ValueError, match="visual_select_layer is -9.*allowed: -4 to 3"):
        make(parts, visual_select_layer=-9)
    with pytest.raises(ValueError, match="SiglipVisionModel has no CLS token.*'full'"):
        LLaVAModel(tiny_llama(), tiny_tower("siglip"), image_token_id=IMAGE)


def test_the_hugging_face_form_is_transformers_own(parts, tmp_path):
    method = train_a_little(make(parts, freeze_llm=False))
    method.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again).__name__ == "LlavaForConditionalGeneration"
    assert torch.allclose(logits(again), logits(method.llm), atol=1e-6)
    assert tiny_llava().config.image_seq_length == 4
