"""The bare tokenizer's side of data_prep.py: every conversation in one batch call, nothing else."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from peers.memory import peak_rss_mib
from transformers import AutoTokenizer


def main() -> None:
    """Renders (not timed), tokenises (timed), writes the figures to ``--out``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = []
    for line in Path(args.data).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": row["output"]},
        ]
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
    begin = time.perf_counter()
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    seconds = time.perf_counter() - begin
    result = {"seconds": seconds, "tokens": sum(map(len, ids)), "peak_rss_mib": peak_rss_mib()}
    Path(args.out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
