"""TRL's side of sft_throughput.py. Runs in TRL's own environment, knows nothing of xtuner_lite.

What is set, and why it is the best reasonable setting for TRL on a CPU:
  packing="bfd" (its default; implies padding-free, so packed samples are isolated as in ours),
  gradient checkpointing off, bf16 autocast (its default), the frozen base loaded in bf16 with LoRA
  in fp32 (peft's default), prompt-completion rows, so that TRL runs its LM head on the completion
  only, as it does since its fused loss; no evaluation, saving or reporting.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from memory import peak_rss_mib
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


class CountingTrainer(SFTTrainer):
    """SFTTrainer that notes when each step ended and how many tokens it saw."""

    def __init__(self, *args, **kwargs) -> None:
        self.steps: list[dict] = []
        super().__init__(*args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        """Counts before the step: batches are flattened, without padding."""
        tokens = inputs["input_ids"].numel()
        supervised = int((inputs["labels"][:, 1:] != -100).sum())
        loss = super().training_step(model, inputs, *args, **kwargs)
        # The optimizer's update of this step falls into the next interval; over many steps the
        # sum is right.
        self.steps.append(
            dict(end_s=time.perf_counter(), tokens=tokens, supervised=supervised, loss=float(loss))
        )
        return loss


def to_prompt_completion(row: dict) -> dict:
    """An Alpaca row in TRL's conversational prompt-completion form."""
    prompt = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


def main() -> None:
    """Trains, then writes the steps and the peak memory to ``--out``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--work-dir", required=True)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = json.loads(Path(args.data).read_text(encoding="utf-8"))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    config = SFTConfig(
        output_dir=args.work_dir,
        model_init_kwargs={"dtype": dtype},
        max_length=args.max_length,
        packing=True,
        gradient_checkpointing=False,
        bf16=args.dtype == "bf16",
        use_cpu=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=args.steps,
        learning_rate=1e-3,
        weight_decay=0.0,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    trainer = CountingTrainer(
        model=args.model,
        args=config,
        train_dataset=Dataset.from_list([to_prompt_completion(row) for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    trainer.train()
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    result = {
        "steps": trainer.steps,
        "samples": len(trainer.train_dataset),
        "peak_rss_mib": peak_rss_mib(),
        "trainable": sum(p.numel() for p in trainable),
        "dtypes": {
            "trained": str(trainable[0].dtype),
            "frozen": str(next(p.dtype for p in trainer.model.parameters() if not p.requires_grad)),
        },
        "optimizer": type(trainer.optimizer).__name__,
    }
    Path(args.out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
