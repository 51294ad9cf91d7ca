"""ZeRO on two gloo processes: the numbers of one process, skipped steps, checkpoints that move."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.engine.strategies.deepspeed_runs import evaluate, train, train_on_ranks, zero
from tests.engine.strategies.same_run import assert_same, assert_same_weights, saved_weights
from tests.ranks import run_ranks
from tests.tiny import tiny_llama
from xtuner_lite.engine.strategies.deepspeed import DeepSpeed
from xtuner_lite.engine.strategies.deepspeed_start import check_optimizer
from xtuner_lite.engine.strategies.deepspeed_zero import FlatGroups

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
    check_exact_resume(tmp_path / "full", config, dropout=0.2, **UNTIED)
    check_exact_resume(tmp_path / "lora", config, lora=True, dropout=0.2)


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


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_a_full_bf16_run_keeps_float32_copies_and_goes_on_bit_for_bit(tmp_path, config):
    check_exact_resume(tmp_path, config, dtype="bf16", dropout=0.2)
    weights = saved_weights(tmp_path / f"{config}_whole")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    # The copies were updated, not the bf16 weights: they hold more digits.
    assert any(not torch.equal(w, w.bfloat16().float()) for w in weights.values())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_an_adapter_keeps_the_precision_rule(tmp_path, dtype):
    # Stage 3 computes linear layers by a function of DeepSpeed's that rounds elsewhere: the two
    # runs may be no further apart than half precision itself is from float32.
    options = dict(lora=True, dtype=dtype)
    (both,) = train_on_ranks([(tmp_path / "both", zero("zero3"), options)])
    alone = train(tmp_path / "alone", None, **options)
    exact = train(tmp_path / "exact", None, lora=True)
    assert alone["rates"] == both["rates"]
    for key in ("losses", "grad_norms"):
        half, whole, sharded = (
            torch.tensor(run[key], dtype=torch.float64) for run in (alone, exact, both)
        )
        rounding = (half - whole).abs().max()
        assert 0 < rounding < 0.05
        assert (half - sharded).abs().max() <= rounding, key


@pytest.mark.slow
def test_fp16_skips_an_infinite_step_and_lowers_the_scale(tmp_path):
    options = dict(lora=True, dtype="fp16", poison=4, optim=dict(loss_scale=8.0))
    (result,) = train_on_ranks([(tmp_path / "run", zero("zero2"), options)])
    assert [n == float("inf") for n in result["grad_norms"]] == [i == 3 for i in range(7)]
    assert all(loss < 10 for i, loss in enumerate(result["losses"]) if i != 3)


@pytest.mark.slow
def test_the_optimizer_on_the_cpu_gives_the_same_numbers(tmp_path):
    jobs = [
        (tmp_path / "adam2", zero("zero2_offload"), {}),
        (tmp_path / "adam3", zero("zero3_offload"), {}),
        (tmp_path / "torch", zero("zero2_offload", cpu_adam=False), {}),
    ]
    alone = train(tmp_path / "alone", None)
    for (folder, _, _), result in zip(jobs, train_on_ranks(jobs), strict=True):
        assert_same(alone, result, rtol=1e-5)
        assert_same_weights(tmp_path / "alone", folder, rtol=1e-5)


@pytest.mark.slow
def test_a_4_bit_base_trains_under_stage_2_and_is_refused_under_stage_3(tmp_path):
    pytest.importorskip("bitsandbytes")
    base = tmp_path / "base"
    tiny_llama(hidden_size=64).save_pretrained(base)
    options = dict(lora=True, four_bit_path=base)
    (both,) = train_on_ranks([(tmp_path / "both", zero("zero2"), options)])
    alone = train(tmp_path / "alone", None, **options)
    assert both["losses"][0] == pytest.approx(alone["losses"][0], rel=1e-6)
    # From the first update on the weights differ in their last digit, by the order of a sum; the
    # 4-bit products are rounded to bf16, where that may change a number by a whole step (2**-8).
    assert_same(alone, both, rtol=2**-8)
    with pytest.raises(AssertionError, match="ZeRO stage 3 cuts every weight, and .* quantised"):
        train_on_ranks([(tmp_path / "three", zero("zero3"), options)])


@pytest.mark.slow
def test_evaluation_without_training(tmp_path):
    alone = evaluate(tmp_path / "alone", None)
    for config in ("zero2", "zero3"):
        results = run_ranks(_evaluate, tmp_path / config, zero(config))
        assert results[0]["val"] == pytest.approx(alone["val"], rel=1e-6)
        assert results[0]["sum"] == pytest.approx(alone["sum"], rel=1e-9)


def _evaluate(work_dir, strategy):
    return evaluate(work_dir, strategy, world_size=2)


def test_flat_shares_follow_order_and_padding():
    # 5 + 3 padding + 2 + 2 = 12 elements, in three shares of 4; b lies behind the padding.
    a, b, c = (nn.Parameter(torch.zeros(shape)) for shape in [(5,), (1, 2), (2,)])
    names = {id(a): "a", id(b): "b", id(c): "c"}
    held = []
    for rank in range(3):
        insides = SimpleNamespace(
            round_robin_bit16_groups=[[a, b, c]],
            round_robin_bit16_padding=[[3, 0, 0]],
            single_partition_of_fp32_groups=[torch.arange(4.0) + 4 * rank],
        )
        (share,) = FlatGroups(insides, names, rank).shares()
        held.append([(s.name, s.start, s.stop, s.of(share.flat).tolist()) for s in share.slices])
        assert all(s.shape == (1, 2) for s in share.slices if s.name == "b")
    assert held == [
        [("a", 0, 4, [0.0, 1.0, 2.0, 3.0])],
        [("a", 4, 5, [4.0])],
        [("b", 0, 2, [8.0, 9.0]), ("c", 0, 2, [10.0, 11.0])],
    ]


def test_an_optimizer_that_looks_at_matrices_is_refused():
    class Muon(torch.optim.SGD):
        pass

    optimizer = Muon([nn.Parameter(torch.zeros(2, 2))], lr=0.1)
    with pytest.raises(ValueError, match="Muon is not known to work under ZeRO.*z.json"):
        check_optimizer(optimizer, allow_untested=False, source="z.json")
    check_optimizer(optimizer, allow_untested=True, source="z.json")


def test_an_update_of_the_loss_scale_is_that_of_grad_scaler():
    strategy = DeepSpeed("zero2")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    strategy.precision = SimpleNamespace(scaler=scaler)
    scales = []
    for found_inf in (False, False, True, False, True):
        strategy._update_scale(found_inf=found_inf)
        scales.append(scaler.get_scale())
    assert scales == [
        8.0,
        16.0,
        8.0,
        8.0,
        4.0,
    ]  # grows after two good steps, halves after a bad one
