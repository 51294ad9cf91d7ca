"""ZeRO on two gloo processes: the numbers of one process, skipped steps, checkpoints that move."""

import pytest
import torch

from tests.engine.strategies.deepspeed_runs import train, train_on_ranks, zero
from tests.engine.strategies.same_run import assert_same, assert_same_weights, saved_weights

DDP = dict(type="DDP")
#: A head of its own, run three tokens at a time: ranks have different numbers of chunks.
UNTIED = dict(llm=dict(tie_word_embeddings=False), model=dict(head_chunk_tokens=3))
#: Options of train by what they try.
VARIANTS = {
    "full": dict(),
    "lora": dict(lora=True),
    "untied": dict(UNTIED),
    "checkpointed": dict(model=dict(activation_checkpointing=True)),
    "head_model": dict(model=dict(head="model")),
    "self_check": dict(model=dict(self_check=True)),
    "val": dict(val=True),
    "lora_skip": dict(lora=True, skip=4),
    "skip": dict(skip=4),
}


def check_against_one_process(tmp_path, pairs):
    """Train each (ZeRO config, variant) on two ranks and compare with a single device."""
    jobs = [
        (tmp_path / f"{config}_{variant}", zero(config), VARIANTS[variant])
        for config, variant in pairs
    ]
    results = train_on_ranks(jobs)
    alone = {}
    for (config, variant), result in zip(pairs, results, strict=True):
        folder = tmp_path / variant
        if variant not in alone:
            alone[variant] = train(folder, None, **VARIANTS[variant])
        assert_same(alone[variant], result)
        assert_same_weights(folder, tmp_path / f"{config}_{variant}")
        assert result["is_unchanged"] is ("skip" in variant)
        if "val" in result:
            assert result["val"] == pytest.approx(alone[variant]["val"], rel=1e-6)


def test_two_ranks_equal_one_process(tmp_path):
    check_against_one_process(
        tmp_path, [("zero1", "lora"), ("zero2", "full"), ("zero2", "skip"), ("zero3", "untied")]
    )


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero1", "zero2", "zero3"])
def test_every_variant_equals_one_process(tmp_path, config):
    check_against_one_process(tmp_path, [(config, variant) for variant in VARIANTS])


def check_exact_resume(tmp_path, config, **options):
    whole, cut = tmp_path / f"{config}_whole", tmp_path / f"{config}_cut"
    strategy = zero(config)
    results = train_on_ranks(
        [
            (whole, strategy, options),
            (cut, strategy, dict(options, stop_after=3)),
            (cut, strategy, dict(options, resume=True)),
        ]
    )
    assert results[1]["losses"] + results[2]["losses"] == results[0]["losses"]
    assert len(results[2]["losses"]) == 4
    mine, theirs = saved_weights(cut), saved_weights(whole)
    assert mine
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    check_exact_resume(tmp_path, "zero3", lora=True, dropout=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero1", "zero2", "zero3", "zero2_offload"])
def test_every_stage_goes_on_bit_for_bit(tmp_path, config):
    check_exact_resume(tmp_path / "full", config, dropout=0.2, **UNTIED_LLM)
    check_exact_resume(tmp_path / "lora", config, lora=True, dropout=0.2)


UNTIED_LLM = dict(llm=dict(tie_word_embeddings=False))


@pytest.mark.slow
def test_a_resume_may_change_the_number_of_ranks_and_the_strategy(tmp_path):
    whole = train(tmp_path / "whole", None)
    folder = tmp_path / "moved"
    first = train_on_ranks(
        [
            (folder, DDP, dict(stop_after=1)),
            (folder, zero("zero2"), dict(stop_after=2, resume=True)),
            (folder, zero("zero3"), dict(stop_after=3, resume=True)),
        ]
    )
    alone = train(folder, None, resume=True, stop_after=4)
    one = train_on_ranks([(folder, zero("zero3"), dict(resume=True, stop_after=5))], world_size=1)
    last = train_on_ranks(
        [
            (folder, zero("zero1"), dict(resume=True, stop_after=6)),
            (folder, dict(type="FSDP2"), dict(resume=True)),
        ]
    )
    parts = [*first, alone, *one, *last]
    joined = {
        key: sum((part[key] for part in parts), []) for key in ("losses", "grad_norms", "rates")
    }
    assert [len(part["losses"]) for part in parts] == [1] * 7
    assert_same(joined, whole)
    assert_same_weights(folder, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero1", "zero2", "zero3"])
def test_nan_on_one_rank_is_seen_before_the_update(tmp_path, config):
    clean, poisoned, skipped = train_on_ranks(
        [
            (tmp_path / "clean", zero(config), dict()),
            (tmp_path / "poisoned", zero(config), dict(poison=4)),
            (tmp_path / "skipped", zero(config), dict(skip=4)),
        ]
    )
    assert poisoned["grad_norms"][3] == float("inf")
    assert clean["losses"][:4] == poisoned["losses"][:4]
    # What follows is exactly what follows a step that was skipped.
    assert poisoned["losses"][4:] == skipped["losses"][4:]
    assert poisoned["losses"][4:] != clean["losses"][4:]
