"""TRL's side of data_prep.py. Runs in TRL's own environment, knows nothing of xtuner_lite.

Timed is SFTTrainer's own preparation alone (convert, tokenise, truncate, pack with its default
"bfd"); reading the file is not. Two forms of the same rows: prompt-completion, which gives the same
loss mask as ours, and messages, which learns every token and so saves TRL a tokenisation.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from datasets import Dataset
from memory import peak_rss_mib
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer


class TimedTrainer(SFTTrainer):
    """SFTTrainer that notes how long it prepared its data."""

    seconds = 0.0

    def _prepare_dataset(self, *args, **kwargs):
        begin = time.perf_counter()
        prepared = super()._prepare_dataset(*args, **kwargs)
        self.seconds += time.perf_counter() - begin
        return prepared


def convert(row: dict, form: str) -> dict:
    """An Alpaca row in one of TRL's forms."""
    question = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
    prompt = [{"role": "user", "content": question}]
    answer = [{"role": "assistant", "content": row["output"]}]
    if form == "messages":
        return {"messages": prompt + answer}
    return {"prompt": prompt, "completion": answer}


def main() -> None:
    """Prepares, then writes the figures to ``--out``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--num-proc", type=int, required=True)
    parser.add_argument("--form", choices=["prompt_completion", "messages"], required=True)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    lines = Path(args.data).read_text(encoding="utf-8").splitlines()
    rows = [convert(json.loads(line), args.form) for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1,
        )
    )  # fmt: skip
    config = SFTConfig(
        output_dir=str(Path(args.out).parent / "trl"),
        max_length=args.max_length,
        packing=True,
        dataset_num_proc=args.num_proc,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = TimedTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    packed = trainer.train_dataset
    result = {
        "seconds": trainer.seconds,
        "tokens": sum(map(len, packed["input_ids"])),
        "samples": len(packed),
        "peak_rss_mib": peak_rss_mib(),
    }
    Path(args.out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
