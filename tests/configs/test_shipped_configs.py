"""configs/: every shipped page loads, is checked, is short and has its five parts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from xtuner_lite.config import check_config, dump_config, load_config
from xtuner_lite.data.identity import build_identity_rows

ROOT = Path(__file__).parents[2]
LEAVES = sorted(p for p in (ROOT / "configs").rglob("*.py") if "_base_" not in p.parts)
FAMILIES = {
    "custom", "deepseek", "gemma3", "glm4", "internlm2", "internlm2_5", "internlm3", "llama3",
    "llava", "minicpm3", "mistral", "phi3", "phi4", "qwen2_5", "qwen3", "smollm2", "smollm3",
}  # fmt: skip
PARTS = ["# 1 Settings", "# 2 Model", "# 3 Data", "# 4 Schedule", "# 5 Runtime"]


def skeleton(leaf: Path) -> str:
    """A page without its docstring, the values of its settings and its comments."""
    code = re.sub(r"  # .*$|^# .*\n", "", leaf.read_text(encoding="utf-8"), flags=re.M)
    code = code.split('"""', 2)[2]
    return re.sub(r"^(\w+) = (?:[\d.e-]+|\".*\")$", r"\1 = ...", code, flags=re.M)


#: One page of each kind: pages that differ in their settings alone take the same way.
KINDS = list({skeleton(leaf): leaf for leaf in reversed(LEAVES)}.values())


def test_the_configs_are_there():
    assert len(LEAVES) >= 95
    assert {p.parent.name for p in LEAVES} == FAMILIES
    assert len({p.stem for p in LEAVES}) == len(LEAVES)  # a name finds one page


def test_every_family_has_its_ways():
    """LoRA and QLoRA for each family; all weights and self-introduction for one model of it."""
    for family in FAMILIES - {"custom", "llava"}:
        names = [p.stem for p in LEAVES if p.parent.name == family]
        for way in ("sft_full", "sft_lora", "sft_qlora", "lora_identity"):
            assert any(way in name for name in names), f"{family} has no {way}"


def test_every_llava_has_both_its_stages():
    """Named alike up to the stage; the second takes over from the first with the same parts."""
    names = sorted(p.stem for p in LEAVES if p.parent.name == "llava")
    firsts = [name for name in names if "_pretrain_" in name]
    assert len(firsts) >= 5
    for first in firsts:
        model, _, data = first.partition("_pretrain_")
        seconds = [n for n in names if n.startswith(f"{model}_finetune_") and n.endswith(data)]
        assert len(seconds) == 1, f"{first} has the second stages {seconds}"
        one, two = load_config(first), load_config(seconds[0])
        assert one.tokenizer.to_dict() == two.tokenizer.to_dict()
        assert one.model.freeze_llm
        assert two.model.llm_lora.r > 0
        assert two.model.pretrained_pth == "stage_one"
        assert one.model.visual_encoder.path == two.model.visual_encoder.path


def test_pages_of_one_kind_differ_in_their_settings_alone():
    """So that what is corrected in one page is not forgotten in its likes."""
    assert 15 <= len(KINDS) <= 40


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda p: p.stem)
def test_a_leaf_is_a_short_page_in_five_parts(leaf):
    text = leaf.read_text(encoding="utf-8")
    is_llava = leaf.parent.name == "llava"  # two models in a page
    assert len(text.splitlines()) <= (46 if is_llava else 40)
    assert re.findall(r"^# \d \w+$", text, re.M) == PARTS
    assert not re.findall(r"^\s*from \.", text, re.M)  # a copied page works from any folder
    way = r"(sft|pretrain)_(full|lora|qlora)"
    if is_llava:
        way = r"(pretrain|finetune|finetune_qlora)"
    assert re.match(rf"[a-z0-9_]+_{way}_[a-z0-9]+$", leaf.stem)


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda p: p.stem)
def test_a_leaf_checks_and_its_dump_reloads_equal(leaf, tmp_path):
    cfg = load_config(leaf)
    assert check_config(cfg) == []
    written = dump_config(cfg, tmp_path / "dump.py")
    again = load_config(written or tmp_path / "dump.py")
    assert check_config(again) == []
    assert again.to_dict() == cfg.to_dict()


@pytest.mark.parametrize("leaf", KINDS, ids=lambda p: p.stem)
def test_a_setting_reaches_where_it_is_used(leaf):
    options = ["model_path='here'", "data_path='there.json'", "max_length=77", "lr=0.5"]
    cfg = load_config(leaf, overrides=options)
    places = cfg.tokenizer  # load_llava_processor calls the language model llm
    assert places.get("llm", places.get("path")) == cfg.model.llm.path == "here"
    assert first_set(cfg).data == "there.json"
    assert first_set(cfg).max_length == 77
    assert cfg.optim_wrapper.optimizer.lr == 0.5
    assert cfg.param_scheduler.warmup > 0


def first_set(cfg):
    """The data set, or the first of a mixture."""
    dataset = cfg.train_dataloader.dataset
    return dataset.datasets[0].dataset if "datasets" in dataset else dataset


def misspelled(node: dict, path: tuple = ()):
    """(path of a key, a function that misspells it) for every key in a config."""
    for key, value in list(node.items()):
        if isinstance(value, dict):
            yield from misspelled(value, (*path, key))
        if key != "type":
            yield (*path, key)


@pytest.mark.parametrize(
    "leaf",
    [pytest.param(p, marks=[] if i % 8 == 0 else pytest.mark.slow) for i, p in enumerate(KINDS)],
    ids=lambda p: p.stem,
)
def test_a_misspelled_key_anywhere_is_refused_with_the_right_name(leaf):
    paths = list(misspelled(load_config(leaf)._to_lazy_dict()))
    assert len(paths) > 30
    for path in paths:
        cfg = load_config(leaf)
        node = cfg
        for key in path[:-1]:
            node = node[key]
        key = path[-1]
        wrong = key + "x" if len(key) == 1 or key[-1] == key[-2] else key[:-2] + key[:-3:-1]
        node[wrong] = node.pop(key)
        problems = check_config(cfg)
        assert any(key in str(problem) for problem in problems), f"{path} as {wrong}: {problems}"


def test_loading_and_checking_a_config_of_every_kind_imports_no_torch():
    code = (
        "import sys; from xtuner_lite.config import check_config, load_config\n"
        f"leaves = {[str(leaf) for leaf in KINDS]!r}\n"
        "for leaf in leaves: assert not check_config(load_config(leaf))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "leaf",
    [pytest.param(p, marks=[] if i % 4 == 0 else pytest.mark.slow) for i, p in enumerate(KINDS)],
    ids=lambda p: p.stem,
)
def test_a_leaf_trains_a_tiny_model(leaf, tmp_path, tiny_model, tiny_tower):
    import json

    from xtuner_lite.runner.runner import Runner

    data = tmp_path / "rows.json"
    data.write_text(json.dumps(_rows_for(load_config(leaf))))
    options = [("model_path", str(tiny_model)), ("data_path", str(data)), ("max_length", 96)]
    if "general_path" in leaf.read_text(encoding="utf-8"):
        other = tmp_path / "general.json"
        other.write_text(data.read_text())
        options.append(("general_path", str(other)))
    is_llava = leaf.parent.name == "llava"
    if is_llava:
        options += [("visual_encoder_path", str(tiny_tower)), ("max_length", 400)]
        settings = {"image_folder": str(tmp_path), "test_path": str(data), "pretrained_pth": None}
        options += [pair for pair in settings.items() if pair[0] in leaf.read_text()]
        _draw_images(tmp_path)
    cfg = load_config(leaf, overrides=[*options, ("work_dir", str(tmp_path / "run"))])
    cfg.train_cfg = dict(max_iters=2, val_interval=0)
    cfg.train_dataloader.num_workers = 0
    cfg.optim_wrapper.accumulative_counts = 2
    Runner.from_cfg(cfg).train()
    saved = {p.name for p in (tmp_path / "run/checkpoints/iter_2").iterdir()}
    if is_llava:
        assert "projector" in saved
        assert ("adapter_model.safetensors" in saved) == ("_finetune_" in leaf.stem)
        return
    expected = "adapter_model.safetensors" if "lora" in leaf.stem else "model.safetensors"
    assert expected in saved


def _rows_for(cfg) -> list[dict]:
    """Rows in the format a config's map_fn reads."""
    rows = build_identity_rows("Nova", "Ada", 12, languages=["en"])
    pairs = [[message["content"] for message in row["messages"]] for row in rows]
    is_text = first_set(cfg).type.__name__ == "TextDataset"
    map_fn = first_set(cfg).get("map_fn", "pretrain" if is_text else "auto")
    if map_fn == "alpaca":
        return [{"instruction": question, "output": answer} for question, answer in pairs]
    if map_fn == "pretrain":
        return [{"text": f"{question} {answer}"} for question, answer in pairs]
    if map_fn.startswith("llava"):
        return [
            {
                "image": f"{number % 2}.png",
                "conversations": [
                    {"from": "human", "value": f"<image>\n{question}"},
                    {"from": "gpt", "value": answer},
                ],
            }
            for number, (question, answer) in enumerate(pairs)
        ]
    assert map_fn in ("openai", "auto")
    return rows


def _draw_images(folder: Path) -> None:
    from PIL import Image

    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (20, 30), colour).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def tiny_tower(tmp_path_factory) -> Path:
    from tests.tiny_parts import write_tiny_tower

    return write_tiny_tower(tmp_path_factory.mktemp("tiny_tower"))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    from tests.tiny import tiny_llama, tiny_tokenizer

    folder = tmp_path_factory.mktemp("tiny_model")
    tokenizer = tiny_tokenizer()
    roles = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    tokenizer.add_tokens(["[gMASK]", "<sop>", *roles], special_tokens=True)  # GLM-4's
    tiny_llama(vocab_size=len(tokenizer), hidden_size=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
