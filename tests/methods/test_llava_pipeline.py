"""From pictures and questions to an exported model: the whole way on tiny parts."""

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from transformers import AutoModelForImageTextToText, CLIPImageProcessor

from tests.tiny import tiny_llama, tiny_tokenizer
from tests.tiny_images import tiny_tower
from xtuner_lite.data.dataset import ChatDataset
from xtuner_lite.engine.checkpoint import CheckpointError, list_checkpoints
from xtuner_lite.export.llava import export_llava
from xtuner_lite.images.vision_inputs import vision_of
from xtuner_lite.methods.image_text import ImageTextFinetune
from xtuner_lite.methods.llava import LLaVAModel
from xtuner_lite.models.image_text import load_image_text_model
from xtuner_lite.models.llava import load_visual_encoder
from xtuner_lite.models.loading import load_causal_lm
from xtuner_lite.models.processors import load_llava_processor, load_processor
from xtuner_lite.runner.runner import Runner


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """llm/, clip/ and pictures/ with three rows: one picture, two pictures, none."""
    folder = tmp_path_factory.mktemp("parts")
    tiny_llama().save_pretrained(folder / "llm")
    tiny_tokenizer().save_pretrained(folder / "llm")
    tiny_tower().save_pretrained(folder / "clip")
    size = dict(height=16, width=16)
    CLIPImageProcessor(size=dict(shortest_edge=16), crop_size=size).save_pretrained(folder / "clip")
    (folder / "pictures").mkdir()
    for name, colour in (("red", (200, 10, 10)), ("blue", (10, 10, 200))):
        Image.new("RGB", (30, 20), colour).save(folder / "pictures" / f"{name}.png")
    return folder


ROWS = [
    dict(image="red.png", conversations=[
        {"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "red"},
    ]),
    dict(image=["red.png", "blue.png"], conversations=[
        {"from": "human", "value": "<image><image>\nWhich two?"},
        {"from": "gpt", "value": "red and blue"},
    ]),
    dict(conversations=[
        {"from": "human", "value": "Two plus two?"}, {"from": "gpt", "value": "four"},
    ]),
]  # fmt: skip


def run(work_dir, parts, model, tokenizer, **changes):
    data = ChatDataset(
        ROWS, tokenizer=tokenizer, map_fn="llava", image_folder=parts / "pictures",
        **{"max_length": 96, "cache": False},
    )  # fmt: skip
    config = dict(
        model=model, tokenizer=tokenizer, work_dir=str(work_dir),
        train_dataloader=dict(dataset=data, batch_size=1),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=1e-2), dtype="fp32"),
        train_cfg=dict(max_iters=3), randomness=dict(seed=3),
        default_hooks=dict(dataset_preview=None, loss_curve=None), log_level="ERROR",
    )  # fmt: skip
    runner = Runner.from_cfg({**config, **changes})
    runner.train()
    return runner


def test_two_stages_export_and_further_training(parts, tmp_path):
    tokenizer = load_llava_processor(parts / "llm", parts / "clip")

    def llava(**options):
        return LLaVAModel(
            load_causal_lm(parts / "llm"), load_visual_encoder(parts / "clip"),
            tokenizer=tokenizer, freeze_visual_encoder=True, **options,
        )  # fmt: skip

    run(tmp_path / "one", parts, llava(freeze_llm=True), tokenizer)
    stage_one = list_checkpoints(tmp_path / "one")[-1]
    assert (stage_one / "processor_config.json").is_file()
    two = llava(llm_lora=LoraConfig(r=2), pretrained_pth=stage_one)
    assert two.llava.config.image_seq_length == 4
    run(tmp_path / "two", parts, two, tokenizer)
    receipt = export_llava(tmp_path / "two", tmp_path / "hf")
    assert receipt.notes == []  # the picture of the check went through the processor
    assert receipt.verification["tokens_equal"]
    # Whoever opens the folder needs nothing of ours, and we train on from it.
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    processor = load_processor(tmp_path / "hf")
    inputs = vision_of(processor).model_inputs([Image.new("RGB", (30, 20), (200, 10, 10))])
    ids = torch.tensor([[5, *vision_of(processor).expansion((30, 20)), 7]])
    ours = load_image_text_model(list_checkpoints(tmp_path / "two")[-1])
    with torch.no_grad():
        logits = [m.eval()(input_ids=ids, **inputs).logits for m in (plain, ours)]
    assert torch.allclose(*logits, atol=1e-4)
    method = ImageTextFinetune(
        load_image_text_model(tmp_path / "hf"), tokenizer=processor, freeze_visual_encoder=False
    )
    # Found with the processor's blank image: the last layer of the tower is not used.
    names = method.trainable_parameters()
    assert not any("encoder.layers.2." in name for name in names)
    assert any("encoder.layers.1." in name for name in names)
    runner = run(tmp_path / "three", parts, method, processor)
    assert runner.iter == 3
    whole = list_checkpoints(tmp_path / "three")[-1]
    assert load_image_text_model(whole).config.model_type == "llava"
    assert load_processor(whole).vision.image_token == "<image>"


def test_a_tokenizer_of_another_tower_is_refused(parts, tmp_path):
    tokenizer = load_llava_processor(parts / "llm", parts / "clip")
    options = dict(tokenizer=tokenizer, freeze_llm=True)
    with pytest.raises(ValueError, match="'full' in the model and 'default' in the tokenizer"):
        LLaVAModel(tiny_llama(), tiny_tower(), visual_select_strategy="full", **options)
    with pytest.raises(ValueError, match="image_token_id is 7, and the tokenizer's"):
        LLaVAModel(tiny_llama(), tiny_tower(), image_token_id=7, **options)
    tower = tiny_tower()
    tower.config.patch_size = 4
    with pytest.raises(ValueError, match="patches are 4 pixels wide, the tokenizer's 8"):
        LLaVAModel(tiny_llama(), tower, **options)


@pytest.mark.parametrize("change", [dict(visual_select_layer=-1), dict(pad_to_square=False)])
def test_a_resume_sees_images_as_before(parts, tmp_path, change):
    """Neither changes a token, a name or a trained weight."""

    def start(visual_select_layer=-2, pad_to_square=True, **options):
        tokenizer = load_llava_processor(parts / "llm", parts / "clip", pad_to_square=pad_to_square)
        model = LLaVAModel(
            load_causal_lm(parts / "llm"), load_visual_encoder(parts / "clip"),
            tokenizer=tokenizer, freeze_visual_encoder=True, freeze_llm=True,
            visual_select_layer=visual_select_layer,
        )  # fmt: skip
        return run(tmp_path / "run", parts, model, tokenizer, **options)

    start()
    longer = dict(resume=True, train_cfg=dict(max_iters=4))
    with pytest.raises(CheckpointError, match="cannot be resumed exactly; .*how images are seen"):
        start(**change, **longer)
    assert start(**longer).iter == 4
