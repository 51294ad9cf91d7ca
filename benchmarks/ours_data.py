"""xtuner_lite's side of data_prep.py: one ChatDataset, as a config makes it."""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

from peers.memory import peak_rss_mib
from transformers import AutoTokenizer

from xtuner_lite.data.dataset import ChatDataset


def main() -> None:
    """Prepares the file (reading, hashing and writing the cache are timed too), reads a sample."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--num-proc", type=int, required=True)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    before = peak_rss_mib()
    begin = time.perf_counter()
    dataset = ChatDataset(
        args.data,
        tokenizer=tokenizer,
        max_length=args.max_length,
        num_proc=args.num_proc,
        cache=args.cache,
    )
    seconds = time.perf_counter() - begin
    dataset[len(dataset) - 1]
    result = {
        "seconds": seconds,
        "tokens": dataset.ledger.tokens,
        "samples": len(dataset),
        "fill": dataset.ledger.fill,
        "rss_before_mib": before,
        "peak_rss_mib": peak_rss_mib(),
        "peak_child_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
        "fingerprint": dataset.fingerprint,
    }
    Path(args.out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
