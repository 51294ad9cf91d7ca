"""Plans of memory, and the page that shows them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import LlamaConfig

from benchmarks.scaling_tables import MODELS, PAGE, full_table, planner, tables, tables_of_page
from xtuner_lite.runner.memory_plan import MemoryPlanner, Plan, best_changes

WRITE = "run python -m benchmarks.scaling_tables"
CONFIG = LlamaConfig(
    vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
PLAN = Plan(
    method=dict(type="SupervisedFinetune"), optimizer=dict(type="AdamW", lr=1e-3), batch_size=4,
    length=1024, devices=2, placement="ddp",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _torchs_own_autocast():
    """An estimate is made in a process of its own; here an earlier test may have run bf16."""
    from xtuner_lite.engine import cpu_bf16

    cpu_bf16.disable()


def test_a_table_of_the_page_is_the_codes():
    shown = tables_of_page(PAGE.read_text(encoding="utf-8"))
    assert len(shown) == 9
    assert shown["1.8B full"] == full_table(planner("1.8B")), WRITE


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_all_tables_of_the_page_are_the_codes(model):
    shown = tables_of_page(PAGE.read_text(encoding="utf-8"))
    written = tables(model)
    assert len(written) == 3
    for name, table in written.items():
        assert shown[name] == table, f"{name}: {WRITE}"


def test_the_changes_that_help_most():
    worker = MemoryPlanner(CONFIG)
    before = worker.memory(PLAN).total
    changes = best_changes(worker, PLAN)
    assert changes
    assert len(changes) <= 6
    for change in changes:
        assert change.saved == before - change.memory.total > 0
        assert change.memory == worker.memory(change.plan)
    assert [c.saved for c in changes] == sorted((c.saved for c in changes), reverse=True)
    texts = " ".join(c.text for c in changes)
    assert "activation_checkpointing=True" in texts
    assert "train_dataloader.batch_size=1, 4 times the optim_wrapper" in texts
    assert sum(c.text.startswith("strategy ") for c in changes) <= 2


def test_half_the_tokens_keep_half_the_activations():
    worker = MemoryPlanner(CONFIG)
    whole, half = (worker.size(replace(PLAN, batch_size=n)).activations.saved for n in (4, 2))
    assert half == pytest.approx(whole / 2, rel=0.01)
