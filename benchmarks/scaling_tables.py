"""The tables of docs/concepts/scaling.md, from the code that ``xtuner-lite estimate`` runs.

python -m benchmarks.scaling_tables          writes them into the page
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from xtuner_lite.engine.memory import PLACEMENTS, DeviceMemory
from xtuner_lite.runner.memory_plan import MemoryPlanner, Plan

PAGE = Path(__file__).parents[1] / "docs/concepts/scaling.md"
DEVICES, LENGTH = 8, 4096
GIB = 2**30

#: Sizes as the models' published config.json have them.
MODELS: dict[str, dict[str, Any]] = {
    "1.8B": dict(  # InternLM2-1.8B; its weights have the form of Llama's
        model_type="llama", vocab_size=92544, hidden_size=2048, intermediate_size=8192,
        num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=8,
    ),
    "7B": dict(  # Qwen2.5-7B
        model_type="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944,
        num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
    ),
    "70B": dict(  # Llama-3.1-70B
        model_type="llama", vocab_size=128256, hidden_size=8192, intermediate_size=28672,
        num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
    ),
}  # fmt: skip
LORA = dict(type="LoraConfig", r=16, lora_alpha=32, target_modules="all-linear")
_COLUMNS = tuple(f.name for f in fields(DeviceMemory) if f.name not in ("host", "update"))


def planner(model: str) -> MemoryPlanner:
    """The planner of one of MODELS."""
    from transformers import AutoConfig

    settings = dict(tie_word_embeddings=False, max_position_embeddings=LENGTH, **MODELS[model])
    return MemoryPlanner(AutoConfig.for_model(**settings))


def plan(*, lora: bool, checkpointing: bool = True, **changes: Any) -> Plan:
    """Full or LoRA fine-tuning, one sample of LENGTH tokens, on DEVICES devices."""
    method = dict(
        type="SupervisedFinetune",
        lora=LORA if lora else None,
        activation_checkpointing=checkpointing,
    )
    defaults = dict(length=LENGTH, devices=DEVICES)
    return Plan(method=method, optimizer=dict(type="AdamW", lr=1e-5), **{**defaults, **changes})


def tables(model: str) -> dict[str, str]:
    """Name of a table -> its Markdown."""
    worker = planner(model)
    return {
        f"{model} full": full_table(worker),
        f"{model} adapters": adapter_table(worker),
        f"{model} activations": activation_table(worker),
    }


def full_table(worker: MemoryPlanner) -> str:
    """Every weight trains, under each strategy."""
    rows = [_row(p, worker.memory(plan(lora=False, placement=p))) for p in PLACEMENTS]
    return _table(f"{worker.size(plan(lora=False)).trainable / 1e9:.2f}e9 parameters", rows)


def adapter_table(worker: MemoryPlanner) -> str:
    """LoRA under the strategies that suit it, and QLoRA."""
    rows = [
        _row(f"LoRA, {p}", worker.memory(plan(lora=True, placement=p)))
        for p in PLACEMENTS
        if p not in ("zero1", "zero2_offload")
    ]
    quantized = plan(lora=True, placement="single", quantization="4bit")
    rows.insert(1, _row("QLoRA, single", worker.memory(quantized)))
    return _table("", rows)


def activation_table(worker: MemoryPlanner) -> str:
    """With and without activation checkpointing."""
    rows = ["| FSDP2 | activations | head |", "|---|---:|---:|"]
    for lora in (False, True):
        for checkpointing in (False, True):
            memory = worker.memory(plan(lora=lora, checkpointing=checkpointing, placement="fsdp2"))
            name = f"{'LoRA' if lora else 'full'}, checkpointing {'on' if checkpointing else 'off'}"
            rows.append(f"| {name} | {_gib(memory.activations)} | {_gib(memory.head)} |")
    return "\n".join(rows)


def _table(corner: str, rows: list[str]) -> str:
    names = (*_COLUMNS, "total", "host")
    head = f"| {corner} | " + " | ".join(names) + " |"
    return "\n".join([head, "|---|" + "---:|" * len(names), *rows])


def _row(name: str, memory: DeviceMemory) -> str:
    values = [getattr(memory, column) for column in _COLUMNS]
    return f"| {name} | " + " | ".join(map(_gib, [*values, memory.total, memory.host])) + " |"


def _gib(number: int) -> str:
    value = number / GIB
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def tables_of_page(text: str) -> dict[str, str]:
    """Name -> Markdown of the marked tables of the page."""
    found = re.findall(r"<!-- table: (.+?) -->\n(.*?)\n<!-- end -->", text, re.S)
    return {name: body.strip() for name, body in found}


def main() -> None:
    """Write the tables into the page."""
    text = PAGE.read_text(encoding="utf-8")
    for model in MODELS:
        for name, body in tables(model).items():
            start, end = f"<!-- table: {name} -->", "<!-- end -->"
            if start not in text:
                raise SystemExit(f"{PAGE} has no place for the table {name!r}: {start}")
            before, _, rest = text.partition(start)
            text = f"{before}{start}\n{body}\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
