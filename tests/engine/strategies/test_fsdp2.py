"""FSDP2 on gloo processes: the numbers of one process, and checkpoints that others resume."""

import errno
import json
import math
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook

from tests.engine.strategies.same_run import (
    Figures,
    assert_same,
    assert_same_weights,
    run_config,
    saved_weights,
    train,
)
from tests.ranks import run_ranks
from tests.tiny import tiny_batch, tiny_llama, tiny_segments, tiny_tokenizer
from xtuner_lite.engine.checkpoint import CheckpointError
from xtuner_lite.engine.distributed import PeerError, init_distributed
from xtuner_lite.engine.hooks.evaluate_chat_hook import EvaluateChatHook
from xtuner_lite.engine.optim import OptimWrapper
from xtuner_lite.engine.strategies.fsdp2 import FSDP2, refuse_optimizer
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models import streamed_save
from xtuner_lite.runner.runner import Runner

SHARDED = dict(type="FSDP2")
CHECKPOINTED = dict(activation_checkpointing=True)
COMPILED = dict(compile=dict(backend="aot_eager"), train_cfg=dict(max_iters=2))


def several(world_size: int, *runs: tuple) -> list[dict]:
    """Figures of (work_dir, strategy, options) one after the other on the same ranks."""
    results = run_ranks(_several, runs, world_size, world_size=world_size, timeout_s=300)
    assert all(result == results[0] for result in results)
    return results[0]


def _several(runs, world_size):
    return [train(path, strategy, world_size=world_size, **o) for path, strategy, o in runs]


def assert_equal_bits(one: Path, other: Path) -> None:
    first, second = saved_weights(one), saved_weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def joined(*parts: dict) -> dict:
    return {key: [value for part in parts for value in part[key]] for key in parts[0]}


def test_two_ranks_equal_one_process(tmp_path):
    full = dict(model=CHECKPOINTED)
    lora = dict(lora=True)
    both = several(
        2, (tmp_path / "full2", SHARDED, full), (tmp_path / "lora2", SHARDED, lora)
    )  # fmt: skip
    for name, options, figures in zip(("full", "lora"), (full, lora), both):
        assert_same(train(tmp_path / f"{name}1", None, **options), figures)
        assert_same_weights(tmp_path / f"{name}1", tmp_path / f"{name}2")


class Dropout(Hook):
    """Dropout in attention, so that a resume must put each rank's generator back."""

    def before_train(self, runner):
        for module in runner.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.1


def test_a_stopped_run_on_two_ranks_goes_on_bit_for_bit(tmp_path):
    def options(**more):
        return dict(custom_hooks=[Dropout()], **more)

    whole, first, rest = several(
        2,
        (tmp_path / "whole", SHARDED, options()),
        (tmp_path / "cut", SHARDED, options(stop_after=3)),
        (tmp_path / "cut", SHARDED, options(resume=True)),
    )
    assert joined(first, rest) == whole
    assert_equal_bits(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
def test_resume_under_other_strategies_and_numbers_of_ranks(tmp_path):
    """2 ranks of FSDP2, DDP, one process, one process of FSDP2, 2 ranks of FSDP2 again."""
    whole, first = several(
        2, (tmp_path / "whole", SHARDED, {}), (tmp_path / "moved", SHARDED, dict(stop_after=2))
    )
    second = several(2, (tmp_path / "moved", dict(type="DDP"), dict(resume=True, stop_after=3)))[0]
    third = train(tmp_path / "moved", None, resume=True, stop_after=4)
    fourth = several(1, (tmp_path / "moved", SHARDED, dict(resume=True, stop_after=5)))[0]
    last = several(2, (tmp_path / "moved", SHARDED, dict(resume=True)))[0]
    assert_same(joined(first, second, third, fourth, last), whole)
    assert_same_weights(tmp_path / "moved", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (dict(cpu_offload=True), dict(model=CHECKPOINTED)),
        (dict(reshard_after_forward=False), {}),
        (dict(reduce_each_micro_batch=False), {}),
        (dict(reduce_each_micro_batch=True), dict(lora=True, model=CHECKPOINTED)),
        ({}, dict(model=dict(head="model"))),
        ({}, dict(model=dict(self_check=True, head_chunk_tokens=3))),
        ({}, COMPILED),
        ({}, dict(COMPILED, lora=True, model=CHECKPOINTED)),
    ],
    ids=str,
)
def test_options_change_no_number(tmp_path, strategy, options):
    both = several(2, (tmp_path / "two", {**SHARDED, **strategy}, options))[0]
    assert_same(train(tmp_path / "one", None, **options), both)
    assert_same_weights(tmp_path / "one", tmp_path / "two")


def _uneven(work_dir, strategy, options, world_size):
    """Rows that the ranks cannot share evenly, an untied head and an embedding adapter."""
    from peft import LoraConfig

    from xtuner_lite.models.adapters import add_adapter

    config = run_config(work_dir, strategy, world_size=world_size, **options)
    llm = tiny_llama(vocab_size=385, hidden_size=20, num_layers=3, num_heads=2, num_kv_heads=1,
                     tie_word_embeddings=False)  # fmt: skip
    if options.get("lora"):  # r=1: lora_A is one row, which one rank alone holds
        torch.manual_seed(2)
        llm = add_adapter(llm, LoraConfig(r=1, target_modules=["q_proj", "up_proj"],
                                          modules_to_save=["lm_head"]))  # fmt: skip
    config["model"] = SupervisedFinetune(llm, self_check=False)
    figures = Figures()
    runner = Runner(**config | {"custom_hooks": [figures]})
    runner.tokenizer = tiny_tokenizer()
    runner.train()
    return {"losses": figures.losses, "grad_norms": figures.grad_norms, "rates": figures.rates}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_rows_that_do_not_divide(tmp_path, lora):
    """3 ranks: 385 rows are 129, 129, 127; one row of lora_A leaves two ranks without any."""
    alone = _uneven(tmp_path / "one", None, dict(lora=lora), 1)
    ranks = run_ranks(_uneven, tmp_path / "three", SHARDED, dict(lora=lora), 3, world_size=3)
    assert_same(alone, ranks[0])
    assert_same_weights(tmp_path / "one", tmp_path / "three")
    more = dict(lora=lora, resume=True, train_cfg=dict(max_iters=9))
    alone = _uneven(tmp_path / "one", None, more, 1)
    ranks = run_ranks(_uneven, tmp_path / "three", SHARDED, more, 2, world_size=2)
    assert len(ranks[0]["losses"]) == 2
    assert_same(alone, ranks[0])
    assert_same_weights(tmp_path / "one", tmp_path / "three")


def prepared(dtype: str, world_size: int, **options) -> tuple[FSDP2, dict]:
    """A strategy around the tiny model, and a batch, on a rank of a test."""
    ranks = init_distributed("pytorch" if world_size > 1 else "none")
    strategy = FSDP2(ranks=ranks, **options)
    wrapper = OptimWrapper(
        dict(type="AdamW", lr=1e-2), dtype=dtype, clip_grad=dict(max_norm=1.0)
    )  # fmt: skip
    strategy.prepare(SupervisedFinetune(tiny_llama(), self_check=False), wrapper, train=True)
    return strategy, tiny_batch([tiny_segments(9, seed=ranks.rank)])


def _overflow_on_the_last_rank():
    strategy, batch = prepared("fp16", 2)
    scaler, norms, updates, scales = strategy.precision.scaler, [], [], []
    scaler._init_scale = 1024.0  # small enough for the first step
    before = {}
    for step in range(3):
        strategy.backward(strategy.forward(batch).loss_sum, 14.0)
        if step == 1 and strategy.rank == 1:
            strategy.parameters[-1].grad.to_local()[0] = math.inf
        norms.append(strategy.clip_gradients())
        before = {n: p.to_local().clone() for n, p in strategy.model.named_parameters()}
        updates.append(strategy.step())
        moved = any(
            not torch.equal(before[n], p.to_local()) for n, p in strategy.model.named_parameters()
        )
        assert moved is updates[-1]
        scales.append(scaler.get_scale())
    return norms, updates, scales


@pytest.mark.slow
def test_an_overflow_on_one_rank_skips_the_update_on_all():
    one, other = run_ranks(_overflow_on_the_last_rank)
    assert one == other
    norms, updates, scales = one
    assert [math.isfinite(norm) for norm in norms] == [True, False, True]
    assert updates == [True, False, True]
    assert scales == [1024.0, 512.0, 512.0]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_bf16_follows_one_process(tmp_path, lora):
    config = run_config(tmp_path, None, lora=lora)["optim_wrapper"] | dict(dtype="bf16")
    for strategy in (SHARDED, dict(SHARDED, cpu_offload=True)):
        options = dict(lora=lora, optim_wrapper=config | dict(accumulative_counts=2))
        both = several(2, (tmp_path / "two", strategy, options))[0]
        options = dict(lora=lora, optim_wrapper=config | dict(accumulative_counts=4))
        alone = train(tmp_path / "one", None, **options)
        # bfloat16 has 8 bits: products and gradients of matrices are rounded to 1 in 256.
        assert both["losses"] == pytest.approx(alone["losses"], rel=1e-2)
        assert both["grad_norms"] == pytest.approx(alone["grad_norms"], rel=5e-2)
        assert {t.dtype for t in saved_weights(tmp_path / "two").values()} == {torch.float32}


def _gathered_state():
    """What stays gathered between forward and backward, and after an evaluation."""
    strategy, batch = prepared("bf16", 2)
    model, kinds = strategy.model, []

    def kind():
        layers = model.llm.model.layers
        found = (model.llm.lm_head.weight, layers[0].mlp.up_proj.weight)
        kinds.append([(type(w).__name__, str(w.dtype)) for w in found])

    kind()
    loss = strategy.forward(batch).loss_sum
    kind()
    strategy.backward(loss, 7.0)
    kind()
    with torch.no_grad():
        strategy.forward(batch)
    kind()
    with torch.no_grad(), strategy.generation_context():
        model.llm(batch["input_ids"])
        kind()
    kind()
    return kinds, sorted(model.state_dict()), type(model.llm).__name__


@pytest.mark.slow
def test_what_is_gathered_when():
    kinds, names, class_name = run_ranks(_gathered_state)[0]
    cut = ("DTensor", "torch.float32")
    whole = ("Parameter", "torch.bfloat16")
    assert kinds == [[cut, cut], [whole, cut], [cut, cut], [cut, cut], [whole, cut], [cut, cut]]
    assert names == sorted(SupervisedFinetune(tiny_llama()).state_dict())
    assert class_name == "LlamaForCausalLM"


def _chat(work_dir, strategy, world_size):
    config = run_config(work_dir, strategy, world_size=world_size)
    config["custom_hooks"] = [
        EvaluateChatHook(["Who are you?", "x " * 2000], interval=3, max_new_tokens=5)
    ]
    config["val_dataloader"] = config["train_dataloader"]
    config["train_cfg"] = dict(max_iters=4, val_interval=2)
    runner = Runner(**config)
    runner.tokenizer = tiny_tokenizer()
    runner.train()
    return len(runner.hooks)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [SHARDED, dict(type="DDP")], ids=str)
def test_chat_samples_and_validation_on_the_way(tmp_path, strategy):
    _chat(tmp_path / "one", None, 1)
    run_ranks(_chat, tmp_path / "two", strategy, 2)
    one, two = [(tmp_path / n / "chat_samples.jsonl").read_text() for n in ("one", "two")]
    assert one == two
    assert [json.loads(line)["step"] for line in one.splitlines()] == [0, 3, 4]


def _full_disk(work_dir):
    """A save that fails on the main rank in the middle of the weights; the next one works."""
    config = run_config(work_dir, SHARDED, world_size=2)
    config["default_hooks"]["checkpoint"] = None
    config["train_cfg"] = dict(max_iters=1)
    runner = Runner(**config)
    runner.tokenizer = tiny_tokenizer()
    runner.train()

    def fail(path, planned, tensors):
        next(tensors), next(tensors)
        raise OSError(errno.ENOSPC, "No space left on device")

    whole, streamed_save._write_file = streamed_save._write_file, fail
    try:
        runner.save_checkpoint()
        error = None
    except Exception as caught:
        error = (type(caught), str(caught))
    finally:
        streamed_save._write_file = whole
    left = sorted(path.name for path in (work_dir / "checkpoints").iterdir())
    runner.save_checkpoint()
    return error, left


def test_a_full_disk_while_weights_stream_ends_the_save_on_all_ranks(tmp_path):
    main, other = run_ranks(_full_disk, tmp_path)
    (kind, text), left = main
    assert kind is CheckpointError
    assert "no space left on the disk" in text
    kind, text = other[0]
    assert kind is PeerError
    assert "rank 0 failed: CheckpointError" in text
    assert left == []
    assert len(saved_weights(tmp_path)) == 20


@pytest.mark.slow
def test_one_process_alone(tmp_path):
    alone = train(tmp_path / "one", None)
    assert_same(alone, run_ranks(train, tmp_path / "cut", SHARDED, world_size=1)[0])
    assert_same_weights(tmp_path / "one", tmp_path / "cut")


def test_a_quantised_base_is_refused():
    method = SupervisedFinetune(tiny_llama(), self_check=False)
    packed = torch.zeros(64, 1, dtype=torch.uint8)
    method.llm.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match=r"quantised base model \(llm.*up_proj.*Use strategy DDP"):
        FSDP2().prepare(method, None, train=False)


def test_an_8_bit_optimizer_is_refused():
    wrapper = OptimWrapper(dict(type="AdamW", lr=1e-2))
    wrapper.optimizer = type("AdamW8bit", (), {"__module__": "bitsandbytes.optim.adamw"})()
    with pytest.raises(ValueError, match="AdamW8bit of bitsandbytes .* cannot update the shards"):
        refuse_optimizer(wrapper)
