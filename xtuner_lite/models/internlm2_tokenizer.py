"""InternLM2's sentencepiece tokenizer as an ordinary fast tokenizer, without its remote code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

SPM_FILE = "tokenizer.model"
#: What the pieces that were left free became; first revisions of the checkpoints do not say so.
_NAMED_LATER = {
    "[UNUSED_TOKEN_141]": "<|plugin|>",
    "[UNUSED_TOKEN_142]": "<|interpreter|>",
    "[UNUSED_TOKEN_143]": "<|action_end|>",
    "[UNUSED_TOKEN_144]": "<|action_start|>",
    "[UNUSED_TOKEN_145]": "<|im_end|>",
    "[UNUSED_TOKEN_146]": "<|im_start|>",
}
_SPACE = "▁"  # how sentencepiece writes a space
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # piece types
_BPE = 2  # model type


def internlm2_tokenizer(folder: Path, **settings: Any) -> PreTrainedTokenizerFast:
    """The fast tokenizer of an InternLM2 folder: tokenizer.model and tokenizer_config.json.

    Text without special tokens gives the ids that sentencepiece gives, BOS in front where the
    tokenizer's settings say so (they do, as published). Named tokens ('<|im_start|>') replace the
    pieces with their ids.
    Without a chat template of its own it gets the preset internlm2_chat.

    Args:
        folder: holds tokenizer.model; tokenizer_config.json is read when it is there.
        settings: put over those of tokenizer_config.json ('pad_token', 'add_bos_token', ...).

    Raises:
        FileNotFoundError: no tokenizer.model.
        ImportError: the protobuf package is missing.
        ValueError: the sentencepiece model is no BPE model.
    """
    from transformers import PreTrainedTokenizerFast

    from xtuner_lite.templates import apply_template

    if not (folder / SPM_FILE).is_file():
        raise FileNotFoundError(f"{folder} has no {SPM_FILE}; fetch the tokenizer's files too")
    settings = _read_settings(folder) | settings
    proto = _read_proto(folder / SPM_FILE)
    added = _added_tokens(proto, settings)
    names = {
        key: _content(settings.get(key, default))
        for key, default in (("unk_token", proto.trainer_spec.unk_piece), ("bos_token", "<s>"),
                             ("eos_token", "</s>"), ("pad_token", "</s>"))
    }  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(
            proto,
            added,
            bos=names["bos_token"] if settings.get("add_bos_token", True) else None,
            eos=names["eos_token"] if settings.get("add_eos_token", False) else None,
        ),
        additional_special_tokens=[
            token.content
            for token in added.values()
            if token.special and token.content not in names.values()
        ],
        clean_up_tokenization_spaces=False,
        model_max_length=_max_length(settings),
        name_or_path=str(folder),
        **names,
    )
    tokenizer.chat_template = settings.get("chat_template")
    if tokenizer.chat_template is None and "<|im_start|>" in tokenizer.get_vocab():
        apply_template(tokenizer, "internlm2_chat")
    return tokenizer


def build_tokenizer(
    proto: Any, added: dict[int, AddedToken], *, bos: str | None, eos: str | None
) -> Tokenizer:
    """A tokenizers.Tokenizer that does what sentencepiece does with a BPE model.

    Args:
        proto: sentencepiece's ModelProto.
        added: id -> token that is found in text before anything else; it takes over its id's piece.
        bos, eos: token put in front of, behind every text; None for none.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors

    pieces = [added[i].content if i in added else p.piece for i, p in enumerate(proto.pieces)]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            _merges(proto, vocab, set(added)),
            unk_token=pieces[proto.trainer_spec.unk_id],
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    spec = proto.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex("^ +| +$"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    back: list[decoders.Decoder] = [
        decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
    ]  # fmt: skip
    if spec.add_dummy_prefix:
        back.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(back)
    in_order = [added[index] for index in sorted(added)]
    tokenizer.add_special_tokens([token for token in in_order if token.special])
    tokenizer.add_tokens([token for token in in_order if not token.special])
    if bos or eos:
        single = " ".join(filter(None, [bos, "$A", eos]))
        second = " ".join(filter(None, [bos and f"{bos}:1", "$B:1", eos and f"{eos}:1"]))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=f"{single} {second}",
            special_tokens=[(t, vocab[t]) for t in dict.fromkeys([bos, eos]) if t],
        )
    return tokenizer


def _merges(proto: Any, vocab: dict[str, int], added: set[int]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, those of the highest score first."""
    made = {
        piece.piece: piece.score
        for index, piece in enumerate(proto.pieces)
        if piece.type in (_NORMAL, _UNUSED) and index not in added
    }
    merges: list[tuple[str, str]] = []
    for piece in sorted(made, key=lambda piece: (-made[piece], vocab[piece])):
        pairs = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        pairs = [(left, right) for left, right in pairs if left in made and right in made]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges


def _added_tokens(proto: Any, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """id -> token: as tokenizer_config.json lists them, else by the pieces' types and names."""
    from tokenizers import AddedToken

    added: dict[int, AddedToken] = {}
    for index, piece in enumerate(proto.pieces):
        name = _NAMED_LATER.get(piece.piece)
        special = name is not None or piece.type in (_UNKNOWN, _CONTROL)
        if special or piece.type == _USER_DEFINED:
            added[index] = AddedToken(name or piece.piece, normalized=False, special=special)
    for index, token in settings.get("added_tokens_decoder", {}).items():
        known = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
        added[int(index)] = AddedToken(**{key: token[key] for key in known if key in token})
    return added


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _read_proto(file: Path) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:  # sentencepiece is there; its file format needs protobuf
        raise ImportError(f"reading {file} needs protobuf: pip install protobuf") from error
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(file.read_bytes())
    if proto.trainer_spec.model_type != _BPE:
        raise ValueError(
            f"{file} is no BPE model, so it does not belong to an InternLM2 model; fetch the "
            "folder again"
        )
    return proto


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


def _max_length(settings: dict[str, Any]) -> int:
    """Tokens; the published settings hold a number far beyond any context for 'not said'."""
    return int(min(settings.get("model_max_length", 10**30), 10**30))
