"""``xtuner-lite convert``: merge adapters, split, quantise and export models."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xtuner_lite.export.publish import Receipt

HELP = "merge an adapter, split, quantise or export a model (merge, split, llava, ...)"

_MODEL = "model folder, hub id, known wheel, or the work_dir of a full fine-tuning"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``xtuner-lite convert``."""
    parser.description = (
        "Every action writes a new folder, compares it with its source and leaves what it found in "
        "export_receipt.json; a folder that does not answer like its source is not published."
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    merge = _action(actions, "merge", "an adapter into its base model, layer by layer on disk")
    merge.add_argument(
        "base",
        metavar="BASE",
        help="full-precision base model (" + _MODEL + "), or auto: the one the adapter names",
    )
    merge.add_argument("adapter", metavar="ADAPTER", help="adapter, checkpoint or work_dir")
    _add_out(merge)
    _add_shard_size(merge, "5GB")
    merge.add_argument(
        "--dtype",
        choices=("keep", "bf16", "fp16", "fp32"),
        default="keep",
        help="of the result (default: that of the base)",
    )
    merge.add_argument(
        "--device", default="cpu", metavar="DEVICE", help="where layers are merged (default: cpu)"
    )
    _add_verify(merge)

    split = _action(actions, "split", "a model into smaller files, tensors unchanged")
    split.add_argument("model", metavar="MODEL", help=_MODEL)
    _add_out(split)
    _add_shard_size(split, "2GB")
    _add_verify(split)

    pth = _action(
        actions,
        "pth_to_hf",
        "a checkpoint of ours (copied: it needs no conversion) or a .pth of XTuner or MMEngine",
    )
    pth.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="CHECKPOINT OUT for a checkpoint or work_dir of ours; CONFIG PTH OUT for a .pth file, "
        "with a config of ours that names its model and lora",
    )
    pth.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="changes of CONFIG"
    )

    quantise = _action(actions, "quantise", "a model saved on 4 or 8 bits (bitsandbytes)")
    quantise.add_argument("model", metavar="MODEL", help=_MODEL)
    _add_out(quantise)
    quantise.add_argument("--bits", type=int, choices=(4, 8), default=4, help="default: 4")
    _add_shard_size(quantise, "5GB")

    llava = _action(
        actions, "llava", "a trained LLaVA, adapters merged, for transformers or XTuner"
    )
    llava.add_argument("model", metavar="FOLDER", help="checkpoint of a LLaVA run, or its work_dir")
    _add_out(llava)
    llava.add_argument(
        "--format",
        choices=("hf", "xtuner"),
        default="hf",
        help="hf (default): one LlavaForConditionalGeneration with its processor; xtuner: "
        "projector/, llm_adapter/, visual_encoder_adapter/",
    )
    llava.add_argument(
        "--dtype",
        choices=("keep", "bf16", "fp16", "fp32"),
        default="keep",
        help="of an hf folder (default: that of the language model)",
    )
    llava.add_argument("--llm", metavar="PATH", help="where the language model lies now")
    llava.add_argument("--visual-encoder", metavar="PATH", help="where the vision tower lies now")
    _add_shard_size(llava, "5GB")

    gguf = _action(actions, "gguf", "a model as a GGUF file for llama.cpp and Ollama")
    gguf.add_argument("model", metavar="MODEL", help=_MODEL)
    gguf.add_argument(
        "out", metavar="OUT", help="folder to make; with .gguf at its end the file's name too"
    )
    gguf.add_argument(
        "--outtype", default="f16", metavar="TYPE", help="f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, "
        "q4_0 (default: f16)",
    )  # fmt: skip
    gguf.add_argument("--no-modelfile", action="store_true", help="write no Modelfile for Ollama")
    gguf.add_argument("--verify", choices=("auto", "none"), default="auto", help="default: auto")
    for name in ("merge", "split", "quantise", "gguf"):
        actions.choices[name].add_argument(
            "--hub", choices=("huggingface", "modelscope"), default="huggingface", help="of an id"
        )


def run(args: argparse.Namespace) -> int:
    """Run one action; returns the exit code."""
    receipt, out = _ACTIONS[args.action](args)
    _say(receipt, out)
    return 0


def _merge(args: argparse.Namespace) -> tuple[Receipt, str]:
    from xtuner_lite.export.merge import merge_adapter

    receipt = merge_adapter(
        args.base,
        args.adapter,
        args.out,
        max_shard_size=args.max_shard_size,
        device=args.device,
        dtype=args.dtype,
        verify=args.verify,
        overwrite=args.overwrite,
        hub=args.hub,
    )
    return receipt, args.out


def _split(args: argparse.Namespace) -> tuple[Receipt, str]:
    from xtuner_lite.export.copies import split_model

    receipt = split_model(
        args.model,
        args.out,
        max_shard_size=args.max_shard_size,
        verify=args.verify,
        overwrite=args.overwrite,
        hub=args.hub,
    )
    return receipt, args.out


def _pth_to_hf(args: argparse.Namespace) -> tuple[Receipt, str]:
    from xtuner_lite.export.copies import PTH_SUFFIXES, convert_pth, copy_checkpoint
    from xtuner_lite.export.publish import ExportError

    *sources, out = args.paths
    is_pth = bool(sources) and sources[-1].endswith(PTH_SUFFIXES)
    if len(sources) == 2 and is_pth:
        return convert_pth(
            *sources, out, cfg_options=args.cfg_options, overwrite=args.overwrite
        ), out
    if is_pth:
        raise ExportError(
            f"{sources[-1]} holds tensors only; name the config that says which model they belong "
            "to: convert pth_to_hf CONFIG PTH OUT"
        )
    if len(sources) not in (1, 2):
        raise ExportError("give CHECKPOINT OUT, or CONFIG PTH OUT for a .pth file")
    print("checkpoints of xtuner_lite are Hugging Face folders: nothing to convert, files copied")
    return copy_checkpoint(sources[-1], out, overwrite=args.overwrite), out


def _quantise(args: argparse.Namespace) -> tuple[Receipt, str]:
    from xtuner_lite.export.quantised import quantise_model

    receipt = quantise_model(
        args.model,
        args.out,
        bits=args.bits,
        max_shard_size=args.max_shard_size,
        overwrite=args.overwrite,
        hub=args.hub,
    )
    return receipt, args.out


def _llava(args: argparse.Namespace) -> tuple[Receipt, str]:
    from xtuner_lite.export.llava import export_llava

    receipt = export_llava(
        args.model,
        args.out,
        form=args.format,
        dtype=args.dtype,
        llm=args.llm,
        visual_encoder=args.visual_encoder,
        max_shard_size=args.max_shard_size,
        overwrite=args.overwrite,
    )
    return receipt, args.out


def _gguf(args: argparse.Namespace) -> tuple[Receipt, str]:
    from xtuner_lite.export.gguf_file import export_gguf

    receipt = export_gguf(
        args.model,
        args.out,
        outtype=args.outtype,
        with_modelfile=not args.no_modelfile,
        verify=args.verify,
        overwrite=args.overwrite,
        hub=args.hub,
    )
    return receipt, args.out.removesuffix(".gguf")


_ACTIONS = {
    "merge": _merge, "split": _split, "pth_to_hf": _pth_to_hf, "quantise": _quantise,
    "gguf": _gguf, "llava": _llava,
}  # fmt: skip


def _say(receipt: Receipt, out: str) -> None:
    found = receipt.verification
    print(f"{out} is written")
    for note in receipt.notes:
        print(f"  note: {note}")
    if "max_logit_difference" in found:
        relative = found["max_logit_difference"] / max(found["logit_std"], 1e-12)
        same = "the same" if found["tokens_equal"] else "the same but for near ties"
        print(
            f"  checked ({found['how']}): {found['num_prompts']} prompts, greedy tokens {same}, "
            f"logits within {found['max_logit_difference']:.3g} ({relative:.2g} of their standard "
            f"deviation, {found['tolerance']:g} allowed)"
        )
    for place in found.get("near_ties", []):
        print(f"  near tie: {place}")
    if isinstance(found.get("tokenizer"), dict) and "stop_token_ids" in found["tokenizer"]:
        print(
            f"  tokenizer and template as trained; stops at {found['tokenizer']['stop_token_ids']}"
        )
    print("  what it was made of: export_receipt.json")


def _action(actions: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=text, description=f"Write {text}.")
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder at OUT")
    return parser


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder to make")


def _add_shard_size(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--max-shard-size",
        default=default,
        metavar="SIZE",
        help=f"of a weight file, like 500MB or 2GiB (default: {default})",
    )


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verify",
        choices=("auto", "loaded", "streamed", "none"),
        default="auto",
        help="loaded: both sides opened by transformers; streamed: layer by layer from disk, for "
        "models larger than memory; auto (default): loaded below 1 GiB; none: tokenizer only",
    )
