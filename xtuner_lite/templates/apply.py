"""Puts a chat template into a tokenizer, so that what is exported is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from xtuner_lite.registry import TEMPLATES
from xtuner_lite.templates.compile import to_jinja
from xtuner_lite.templates.layout import TemplateError, compile_template
from xtuner_lite.templates.parts import JinjaTemplate, TemplateParts, parts_from_dict


def apply_template(
    tokenizer: PreTrainedTokenizerBase, template: str | dict[str, Any] | TemplateParts | None
) -> PreTrainedTokenizerBase:
    """Sets ``tokenizer.chat_template`` and returns the tokenizer.

    Args:
        tokenizer: changed in place.
        template: None keeps the tokenizer's own; else a preset's name ('qwen_chat'), the path of a
            ``.jinja`` file, or a dict of parts (``user``, ``assistant``, ``suffix``, ... as in
            :class:`TemplateParts`; XTuner's SYSTEM, INSTRUCTION, SUFFIX, SEP work too).

    Raises:
        TemplateError: the tokenizer has no template of its own; the file is not valid jinja; the
            parts are wrong; a token the template needs is not in the vocabulary.
        KeyError: no preset of that name.
        FileNotFoundError: no such .jinja file.
    """
    if template is None:
        if not getattr(tokenizer, "chat_template", None):
            raise TemplateError(
                f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has no chat "
                f"template of its own, and none was named. Set template= to one of "
                f"{', '.join(preset_names())}, a dict of parts or a .jinja file."
            )
        return tokenizer
    if isinstance(template, str) and template.endswith((".jinja", ".jinja2", ".j2")):
        tokenizer.chat_template = _read_jinja(Path(template))
        return tokenizer
    parts: TemplateParts | JinjaTemplate
    if isinstance(template, TemplateParts):
        parts, name = template, "of parts"
    elif isinstance(template, dict):
        parts, name = parts_from_dict(template), "of parts"
    elif isinstance(template, str):
        parts, name = preset(template), repr(template)
    else:
        raise TypeError(
            f"template={template!r} is a {type(template).__name__}; allowed: a preset's name, the "
            "path of a .jinja file, a dict of parts, or None for the tokenizer's own"
        )
    _check_tokens(tokenizer, parts, name)
    is_raw = isinstance(parts, JinjaTemplate)
    tokenizer.chat_template = parts.source if is_raw else to_jinja(parts)
    return tokenizer


def preset(name: str) -> TemplateParts | JinjaTemplate:
    """A named preset: its parts, or its jinja file.

    Raises:
        KeyError: no preset of that name; the nearest is named.
    """
    return TEMPLATES.get(name)()


def preset_names() -> list[str]:
    """Names of all registered presets."""
    return sorted(TEMPLATES.entries())


def _read_jinja(path: Path) -> str:
    if not path.is_file():
        near = (
            [p.name for p in sorted(path.parent.glob("*.j*"))][:5] if path.parent.is_dir() else []
        )
        raise FileNotFoundError(
            f"template file {str(path)!r} does not exist; .jinja files in that folder: "
            f"{', '.join(near) or 'none'}. Correct the path."
        )
    source = path.read_text(encoding="utf-8")
    compile_template(source)
    return source


def _check_tokens(
    tokenizer: PreTrainedTokenizerBase, parts: TemplateParts | JinjaTemplate, name: str
) -> None:
    """Special tokens that a template writes must be one pre-trained token each."""
    missing = [
        token
        for token in parts.tokens
        if len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1
        or tokenizer.convert_tokens_to_ids(token) in (None, _unknown_id(tokenizer, token))
    ]
    if missing:
        raise TemplateError(
            f"template {name} needs the tokens {', '.join(missing)}, which the tokenizer "
            f"{tokenizer.name_or_path or type(tokenizer).__name__!r} does not have; the model "
            "never saw them. Use a template made for this model, the tokenizer's own "
            "(template=None), or 'default', which needs none."
        )
    needs_eos = (
        "eos_token" in parts.source if isinstance(parts, JinjaTemplate) else "{eos}" in parts.suffix
    )
    if needs_eos and not tokenizer.eos_token:
        raise TemplateError(
            f"template {name} ends answers with EOS, but the tokenizer has no eos_token. "
            "Set tokenizer.eos_token, or name a template with an end token of its own."
        )


def _unknown_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    return None if token == tokenizer.unk_token else tokenizer.unk_token_id
