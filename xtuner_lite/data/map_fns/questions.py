"""Data sets of one question and one answer a row, each with its own column names.

A keyword ``system`` sets the system prompt: ``map_fn=dict(type="sql", system="...")``, or None.
"""

from __future__ import annotations

from typing import Any

from xtuner_lite.data.map_fns.columns import exchange, optional_text, text
from xtuner_lite.registry import MAP_FNS
from xtuner_lite.templates.system_prompts import system_prompt


@MAP_FNS.register_module(name="default")
def default_map_fn(row: dict[str, Any], *, system: str | None = None) -> dict[str, Any]:
    """Input and output.

    Example row::

        {"input": "The capital of France?", "output": "Paris."}
    """
    return exchange(text(row, "input"), text(row, "output"), system)


@MAP_FNS.register_module(name="question_answer")
def question_answer_map_fn(row: dict[str, Any], *, system: str | None = None) -> dict[str, Any]:
    """Question (or prompt) and answer (or response).

    Example row::

        {"question": "The capital of France?", "answer": "Paris."}
    """
    asked = "prompt" if "prompt" in row and "question" not in row else "question"
    answered = "response" if "response" in row and "answer" not in row else "answer"
    return exchange(text(row, asked), text(row, answered), system)


@MAP_FNS.register_module(name="arxiv")
def arxiv_map_fn(
    row: dict[str, Any], *, system: str | None = system_prompt("arxiv_gentile")
) -> dict[str, Any]:
    """Papers: the title is learnt from the abstract.

    Example row::

        {"abstract": "We show that small models can be taught well.", "title": "Small models"}
    """
    return exchange(text(row, "abstract"), text(row, "title"), system)


@MAP_FNS.register_module(name="code_alpaca")
def code_alpaca_map_fn(
    row: dict[str, Any], *, system: str | None = system_prompt("coder")
) -> dict[str, Any]:
    """Code Alpaca (HuggingFaceH4/CodeAlpaca_20K): prompt and completion; a programmer's prompt.

    Example row::

        {"prompt": "Add two numbers in Python.", "completion": "a + b"}
    """
    return exchange(text(row, "prompt"), text(row, "completion"), system)


@MAP_FNS.register_module(name="colors")
def colors_map_fn(
    row: dict[str, Any], *, system: str | None = system_prompt("colorist")
) -> dict[str, Any]:
    """Colours (burkelibbey/colors): the code is learnt from the description.

    Example row::

        {"description": "A deep red, like ripe cherries.", "color": "#8b0a1a"}
    """
    return exchange(text(row, "description"), text(row, "color"), system)


@MAP_FNS.register_module(name="crime_kg_assitant")
def crime_kg_assitant_map_fn(
    row: dict[str, Any], *, system: str | None = system_prompt("lawyer")
) -> dict[str, Any]:
    """CrimeKgAssitant's law questions: input and output; a lawyer's prompt.

    Example row::

        {"input": "借钱不还怎么办？", "output": "可以向法院起诉。"}
    """
    return exchange(text(row, "input"), text(row, "output"), system)


@MAP_FNS.register_module(name="law_reference")
def law_reference_map_fn(
    row: dict[str, Any], *, system: str | None = system_prompt("lawyer")
) -> dict[str, Any]:
    """Law questions with references: question and answer; a lawyer's prompt.

    Example row::

        {"question": "试用期最长多久？", "answer": "不超过六个月。", "reference": ["劳动合同法"]}
    """
    return exchange(text(row, "question"), text(row, "answer"), system)


@MAP_FNS.register_module(name="openorca")
def openorca_map_fn(row: dict[str, Any]) -> dict[str, Any]:
    """OpenOrca: question and response, each with its own system_prompt.

    Example row::

        {"system_prompt": "You are a teacher.", "question": "2 + 2?", "response": "4."}
    """
    return exchange(
        text(row, "question"), text(row, "response"), optional_text(row, "system_prompt")
    )


@MAP_FNS.register_module(name="sql")
def sql_map_fn(row: dict[str, Any], *, system: str | None = system_prompt("sql")) -> dict[str, Any]:
    """SQL (b-mc2/sql-create-context): the tables (context) and the question, then the query.

    Example row::

        {"context": "CREATE TABLE head (age INTEGER)", "question": "How many heads are over 56?",
         "answer": "SELECT COUNT(*) FROM head WHERE age > 56"}
    """
    question = f"{text(row, 'context')}\n{text(row, 'question')}"
    return exchange(question, text(row, "answer"), system)


@MAP_FNS.register_module(name="stack_exchange")
def stack_exchange_map_fn(row: dict[str, Any]) -> dict[str, Any]:
    """Stack Exchange (ArmelR/stack-exchange-instruction): question and response.

    Example row::

        {"qid": 1, "question": "How do I sort a list?", "response": "Use sorted(list)."}
    """
    return exchange(text(row, "question"), text(row, "response"))


@MAP_FNS.register_module(name="tiny_codes")
def tiny_codes_map_fn(
    row: dict[str, Any], *, system: str | None = system_prompt("coder")
) -> dict[str, Any]:
    """Tiny Codes (nampdn-ai/tiny-codes): prompt and response; a programmer's prompt.

    Example row::

        {"prompt": "Print hello in Rust.", "response": "println!(\\"hello\\");"}
    """
    return exchange(text(row, "prompt"), text(row, "response"), system)
