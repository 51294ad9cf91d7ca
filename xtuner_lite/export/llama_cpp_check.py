"""A GGUF file in llama.cpp itself: the same token ids, and the same greedy answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xtuner_lite.export.publish import ExportError
from xtuner_lite.export.verify import PROMPTS, Answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = (*PROMPTS, "  two  spaces\n\n\ttab 12345 naïve 日本語 🙂 don't I'LL x=y+1;\r\n end")
#: llama.cpp multiplies with inputs rounded to the weights' type; measured 0.01 with f16.
_TOLERANCE = 0.1


def check_with_llama_cpp(
    file: Path, tokenizer: PreTrainedTokenizerBase, reference: Answers
) -> dict[str, Any]:
    """What llama.cpp makes of the file.

    A greedy token may differ only where the reference itself had two nearly as likely (nearer than
    a tenth of the standard deviation of its logits).

    Raises:
        ExportError: other token ids, or another greedy answer.
    """
    from contextlib import closing

    import llama_cpp

    longest = max(len(p) + len(t) for p, t in zip(reference.prompts, reference.tokens))
    llama = llama_cpp.Llama(
        str(file), n_ctx=longest + 8, n_threads=2, logits_all=True, verbose=False
    )
    with closing(llama):
        _check_ids(llama, tokenizer)
        equal, difference, std = _check_answers(llama, reference)
    return {
        "version": llama_cpp.__version__,
        "texts": len(TEXTS),
        "tokens_equal": equal,
        "max_logit_difference": difference,
        "logit_std": std,
    }


def _check_ids(llama: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    for text in TEXTS:
        mine = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        theirs = llama.tokenize(text.encode(), add_bos=False, special=True)
        if mine != theirs:
            raise ExportError(f"llama.cpp reads {text!r} as tokens {theirs}, not {mine}")


def _check_answers(llama: Any, reference: Answers) -> tuple[bool, float, float]:
    """(greedy tokens equal, largest difference of a logit, their standard deviation)."""
    equal, difference = True, 0.0
    std = float(np.concatenate([x.numpy().ravel() for x in reference.logits]).std())
    for prompt, tokens, logits in zip(reference.prompts, reference.tokens, reference.logits):
        llama.reset()
        llama.eval([*prompt, *tokens][:-1])
        found = np.array(llama.scores[: len(prompt) + len(tokens) - 1])
        expected = logits.numpy()
        difference = max(difference, float(np.abs(found[:, : expected.shape[1]] - expected).max()))
        for index, token in enumerate(tokens):
            at = len(prompt) - 1 + index
            other = int(found[at].argmax())
            if other == token:
                continue
            equal = False
            margin = float(expected[at, token] - expected[at, other])
            if margin > _TOLERANCE * std:
                raise ExportError(
                    f"llama.cpp's greedy answer differs at token {index + 1}: {other} instead of "
                    f"{token}, which is ahead by {margin:.3g}"
                )
    return equal, difference, std
