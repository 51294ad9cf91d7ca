"""The settings of a page: the components, and what their values mean. Imports gradio."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from xtuner_lite.models.sampling import Sampling


def place_settings(
    word: Callable[[str], Any], system: str, start: Sampling
) -> list[gr.components.Component]:
    """Puts the settings on the page that is being built.

    Args:
        word: gives the text for a key of WORDS.
        system: what the system prompt starts with.
        start: what the others start with.

    Returns:
        the components: the system prompt, then the arguments of ``sampling_of`` in order.
    """
    longest = max(4096, start.max_new_tokens)
    with gr.Accordion(word("settings"), open=False, elem_id="settings"):
        prompt = gr.Textbox(
            system, label=word("system"), info=word("system_info"), lines=2,
            max_lines=6, elem_id="system",
        )  # fmt: skip
        with gr.Row():
            temperature = gr.Slider(
                0, 2, start.temperature, step=0.05, label=word("temperature"),
                info=word("temperature_info"),
            )  # fmt: skip
            top_p = gr.Slider(
                0.01, 1, start.top_p, step=0.01, label=word("top_p"), info=word("top_p_info")
            )
            top_k = gr.Slider(
                0, 200, start.top_k, step=1, label=word("top_k"), info=word("top_k_info")
            )
        with gr.Row():
            penalty = gr.Slider(
                1, 2, start.repetition_penalty, step=0.01, label=word("repetition_penalty"),
                info=word("repetition_penalty_info"),
            )  # fmt: skip
            tokens = gr.Slider(
                1, longest, start.max_new_tokens, step=1, label=word("max_new_tokens")
            )
            # No Number: an empty one shows 0, and 0 is a seed.
            seed = gr.Textbox(
                "" if start.seed is None else str(start.seed), label=word("seed"),
                info=word("seed_info"), max_lines=1, elem_id="seed",
            )  # fmt: skip
    return [prompt, temperature, top_p, top_k, penalty, tokens, seed]


def sampling_of(
    temperature: float,
    top_p: float,
    top_k: float,
    repetition_penalty: float,
    max_new_tokens: float,
    seed: str,
) -> Sampling:
    """What the values of the settings ask for.

    Raises:
        ValueError: one is no number, or out of its range.
    """
    return Sampling(
        max_new_tokens=int(max_new_tokens),
        temperature=float(temperature),
        top_p=float(top_p),
        top_k=int(top_k),
        repetition_penalty=float(repetition_penalty),
        seed=int(seed) if seed.strip() else None,
    )
