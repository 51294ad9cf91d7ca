"""Random conversations in every preset: learnt tokens are exactly the assistants' words and ends.

The reference does not share the proof by prefixes: every text carries a number of its own, so that
its place in the render can be searched, and what surrounds an answer is written down here by hand.
"""

import json
import random
from typing import NamedTuple

import numpy as np
import pytest

from tests.templates.test_presets import template_for
from xtuner_lite.templates.apply import preset_names

EOS = "<|im_end|>"  # of the tiny tokenizer


class Turn(NamedTuple):
    """What a model writes around its words in one turn, and what the format can hold."""

    lead: str
    end: str
    system: bool = True
    trim: bool = False
    thought: tuple[str, str] = ()  # in front of and behind reasoning_content, the lead included
    calls: str = ""  # form of tool calls


CHATML = Turn("", EOS, thought=("<think>\n", "\n</think>\n\n"), calls="hermes")
HARMONY = (
    "<|channel|>analysis<|message|>",
    "<|end|><|start|>assistant<|channel|>final<|message|>",
)
REFERENCE = {
    "default": Turn("", EOS), "zephyr": Turn("", EOS), "chatml": CHATML, "qwen_chat": CHATML,
    "qwen3": CHATML, "internlm2_chat": Turn("", EOS), "moss_sft": Turn(" ", "<eom>" + EOS),
    "internlm_chat": Turn("", "<eoa>"), "llama2_chat": Turn(" ", " " + EOS, trim=True),
    "code_llama_chat": Turn(" ", " " + EOS, trim=True), "mistral": Turn("", EOS),
    "mixtral": Turn("", EOS), "deepseek_v2": Turn(" ", EOS), "deepseek_moe": Turn(" ", EOS),
    "deepseek_coder": Turn("\n", "\n<|EOT|>"), "deepseekcoder": Turn("\n", "\n<|EOT|>"),
    "vicuna": Turn(" ", EOS), "wizardlm": Turn(" ", EOS), "wizardcoder": Turn("", EOS),
    "chatglm2": Turn("", EOS), "chatglm3": Turn("\n ", "<|user|>"),
    "glm4": Turn("\n", "<|user|>", calls="glm4"), "baichuan_chat": Turn("", EOS),
    "baichuan2_chat": Turn("", EOS), "minicpm": Turn("", EOS, trim=True),
    "llama3_chat": Turn("", "<|eot_id|>", trim=True), "phi3_chat": Turn("", "<|end|>"),
    "gemma": Turn("", "<end_of_turn>", system=False, trim=True),
    "gemma3": Turn("", "<end_of_turn>", trim=True),
    "cohere_chat": Turn("", "<|END_OF_TURN_TOKEN|>", trim=True),
    "gpt_oss": Turn("<|channel|>final<|message|>", "<|return|>", thought=HARMONY),
}  # fmt: skip

PIECES = [
    "Who", " are", " you", "\n", " ", "  ", "\n\n", "é", "你好", "🙂", "e\u0301", "\u200b", "\t",
    "\x00", "<|im_end|>", "<|im_start|>assistant\n", "<|im_start|>", "[INST]", " [/INST]", "</s>",
    "<|user|>", "### Response:", "ASSISTANT:", "<eom>", "<|MOSS|>: ", "<end_of_turn>", "<think>",
    "\n</think>\n\n", "<tool_call>", "答：", "Assistant:", "{{ x }}", "{% raw %}", "\\", "'", '"',
]  # fmt: skip


def words(rng: random.Random, number: int, trim: bool = False) -> str:
    """Random text with a number in it that no other text of the conversation has."""
    pieces = rng.choices(PIECES, k=rng.randint(0, 8))
    pieces.insert(rng.randint(0, len(pieces)), f"#{number}#")
    text = "".join(pieces)
    return text.strip() if trim else text


def random_case(rng: random.Random, turn: Turn, last_only: bool):
    """(messages, tools, train_on, learnt pieces as (text in the render, lead, end))."""
    train_on = "last" if last_only else rng.choice(["assistant", "assistant", "last"])
    chat, answers = [], []
    number = 0

    def text() -> str:
        nonlocal number
        number += 1
        return words(rng, number, turn.trim)

    tools = [{"type": "function", "function": {"name": "f"}}] if turn.calls else None
    if turn.system and rng.random() < 0.5:
        chat.append({"role": "system", "content": text()})
    for _ in range(rng.randint(1, 4)):
        for _ in range(rng.choice([1, 1, 1, 2])):
            chat.append({"role": "user", "content": text()})
        if turn.calls and rng.random() < 0.4:
            call = {"name": "f", "arguments": {"q": text()}}
            message = {"role": "assistant", "content": "", "tool_calls": [{"function": call}]}
            chat += [message, {"role": "tool", "content": text()}]
            answers.append(message)
        message = {"role": "assistant", "content": text()}
        if rng.random() < 0.3:
            message["reasoning_content"] = text().strip("\n")
        if rng.random() < 0.2 and not last_only:
            message["loss"] = rng.choice([False, True, 0.5])
        chat.append(message)
        answers.append(message)
    if rng.random() < 0.2 and not last_only:
        chat.append({"role": "user", "content": text()})
    chosen = answers[-1:] if train_on == "last" else answers
    learnt = [m for m in answers if m.get("loss", any(m is c for c in chosen))]
    return chat, tools, train_on, learnt


def expected_pieces(name: str, turn: Turn, text: str, learnt: list[dict]) -> list[tuple[int, int]]:
    """Characters [start, end) that must be learnt, in order."""
    pieces = []
    for message in learnt:
        lead, end, body = turn.lead, turn.end, message["content"]
        if message.get("tool_calls"):
            call = message["tool_calls"][0]["function"]
            arguments = json.dumps(call["arguments"], ensure_ascii=False)
            body = '<tool_call>\n{"name": "f", "arguments": ' + arguments + "}\n</tool_call>"
            if turn.calls == "glm4":
                lead, body, end = "", "f\n" + arguments, "<|observation|>"
        thought = message.get("reasoning_content") if turn.thought else None
        if thought:
            assert text.count(thought) == 1
            at = text.index(thought)
            opening, lead = turn.thought
            assert text[at - len(opening) : at] == opening
            pieces.append((at - len(opening), at))
        elif name == "qwen3":
            lead = "<think>\n\n</think>\n\n"
        assert text.count(body) == 1
        at = text.index(body)
        assert text[at - len(lead) : at] == lead
        assert text[at + len(body) :].startswith(end)
        pieces.append((at - len(lead), at + len(body) + len(end)))
    return pieces


def learnt_runs(tokenizer, encoded) -> list[str]:
    """The text of each run of learnt tokens."""
    borders = np.flatnonzero(np.diff(encoded.learnt)) + 1
    runs = zip(np.split(encoded.input_ids, borders), np.split(encoded.learnt, borders))
    return [tokenizer.decode(ids) for ids, kind in runs if kind[0]]


def check(name: str, number: int, seed: int) -> int:
    """Checks so many conversations; the number of learnt pieces compared."""
    rng = random.Random(f"{name}-{seed}")
    turn, template = REFERENCE[name], template_for(name)
    total = 0
    for start in range(0, number, 250):
        cases = [random_case(rng, turn, name == "gpt_oss") for _ in range(min(250, number - start))]
        layouts = [template.layout(chat, tools, train_on) for chat, tools, train_on, _ in cases]
        encodings = template.encode_layouts(layouts)
        for (chat, tools, _, learnt), layout, encoded in zip(cases, layouts, encodings):
            text = template.render(chat, tools)
            expected = expected_pieces(name, turn, text, learnt)
            assert [(s.start, s.end) for s in layout.spans] == expected
            assert template.tokenizer.decode(encoded.input_ids) == text
            assert learnt_runs(template.tokenizer, encoded) == [text[a:b] for a, b in expected]
            assert encoded.eos_learnt == bool(learnt)
            total += len(expected)
    return total


def test_the_reference_knows_every_preset():
    assert sorted(REFERENCE) == preset_names()


@pytest.mark.parametrize("name", REFERENCE)
def test_a_sample_of_random_conversations(name):
    assert check(name, 40, seed=0) > 40


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCE)
def test_5000_random_conversations(name):
    assert check(name, 5000, seed=1) > 5000
