"""A model saved on 4 or 8 bits (bitsandbytes), for transformers and what is built on it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from xtuner_lite.export.publish import ExportError, Receipt, describe_folder, publishing
from xtuner_lite.export.sources import model_folder, open_tokenizer, refuse_quantised
from xtuner_lite.export.tensor_files import parse_size
from xtuner_lite.export.verify import (
    CachedForward,
    check_tokenizer,
    compare,
    greedy_answers,
    prompt_ids,
)
from xtuner_lite.export.write_model import (
    NUM_NEW_TOKENS,
    Tokenizer,
    write_settings,
)
from xtuner_lite.models.hub import Hub

#: Of the saved folder against the quantised model it was saved from: the same numbers.
_TOLERANCE = 1e-3


def quantise_model(
    model: str | Path,
    out: str | Path,
    *,
    bits: Literal[4, 8] = 4,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    hub: Hub = "huggingface",
) -> Receipt:
    """Writes a model with its linear layers on 4 bits (NF4, double quantisation) or 8 bits.

    The model is loaded whole. The receipt says how far the quantised model is from the original;
    what decides is that the folder, opened again, answers like the quantised model in memory.

    Raises:
        ExportError: bitsandbytes is missing, the model cannot be used, or the folder differs.
    """
    from xtuner_lite.models.loading import load_causal_lm
    from xtuner_lite.models.modes import without_progress_bars

    if bits not in (4, 8):
        raise ExportError(f"bits is {bits!r}; allowed: 4, 8")
    try:
        import bitsandbytes as _  # noqa: F401
    except ImportError as error:
        raise ExportError(
            "saving on 4 or 8 bits needs bitsandbytes: pip install 'xtuner_lite[qlora]'"
        ) from error
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each layer of each pass
    max_bytes = parse_size(max_shard_size)
    source = model_folder(model, hub=hub)
    refuse_quantised(source, "quantising")
    tokenizer = Tokenizer.found_in(source)
    receipt = Receipt("quantise", {"model": describe_folder(model, source)})
    receipt.options = {"bits": bits, "max_shard_size": max_bytes}
    with publishing(out, overwrite=overwrite, sources=(source,)) as folder:
        full = load_causal_lm(source).eval()
        prompts = prompt_ids(tokenizer.own, full.config.get_text_config().vocab_size)
        original = greedy_answers(CachedForward(full), prompts, NUM_NEW_TOKENS["loaded"])
        del full
        small = load_causal_lm(source, quantization=f"{bits}bit").eval()
        loss = compare(original, CachedForward(small), float("inf"))
        reference = greedy_answers(CachedForward(small), prompts, NUM_NEW_TOKENS["loaded"])
        with without_progress_bars():
            small.save_pretrained(str(folder), max_shard_size=max_bytes)
        del small
        write_settings(folder, folder, tokenizer, {}, source)
        found = compare(reference, CachedForward(load_causal_lm(folder).eval()), _TOLERANCE)
        found.check()
        receipt.verification = {"how": "loaded", **found.to_dict()}
        if tokenizer.own is not None:
            exported = open_tokenizer(folder)
            receipt.verification["tokenizer"] = check_tokenizer(tokenizer.own, exported)
        receipt.verification["quantisation"] = {
            "max_logit_difference": loss.max_logit_difference,
            "logit_std": loss.logit_std,
            "tokens_equal": loss.tokens_equal,
        }
        receipt.notes.append(
            f"on {bits} bits logits move by up to {loss.max_logit_difference:.3g} (standard "
            f"deviation {loss.logit_std:.3g})"
        )
        receipt.write(folder)
    return receipt
