"""Takes secrets out of what is about to be written."""

from __future__ import annotations

import copy
import re
from typing import Any

from mmengine.config import Config, ConfigDict

from xtuner_lite.config.origins import Provenance, attach, provenance_of

REDACTED = "***"

#: Keys whose text is a secret. Not pad_token, eos_token, max_new_tokens: those name tokens of text.
_KEY = re.compile(
    r"^(token|.*(auth|access|api|hf|hub|bearer|refresh|session|wandb|swanlab|modelscope|github|gitlab)"
    r"[_-]?token|.*secret([_-]?(key|access[_-]?key|token))?|.*passw(or)?d|.*passphrase|passwd|pwd"
    r"|.*(api|access|private|secret|account|subscription)[_-]?key([_-]?id)?|.*credentials?"
    r"|authorization)$",
    re.IGNORECASE,
)

#: Texts that are keys by their form, wherever they stand.
_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"
)
_URL_USER = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_QUERY = re.compile(
    r"(?i)([?&;](?:[\w-]*(?:token|secret|password|passwd|api[_-]?key|access[_-]?key|signature|sig))=)"
    r"[^&#\s'\"]+"
)
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{12,}")


def is_secret_key(key: Any) -> bool:
    """Whether a key's text is to be hidden."""
    return isinstance(key, str) and _KEY.match(key) is not None


def redact_text(text: str) -> str:
    """A text with keys, credentials in URLs and bearer tokens replaced by '***'."""
    text = _VALUE.sub(REDACTED, text)
    text = _URL_USER.sub(REDACTED, text)
    text = _QUERY.sub(rf"\g<1>{REDACTED}", text)
    return _BEARER.sub(rf"\g<1> {REDACTED}", text)


def redact(value: Any, key: Any = None) -> Any:
    """A copy of a config's value without secrets; lazy objects and other parts are kept."""
    if isinstance(value, str):
        return REDACTED if value and is_secret_key(key) else redact_text(value)
    if isinstance(value, bytes) and is_secret_key(key):
        return REDACTED
    if isinstance(value, ConfigDict):
        result = ConfigDict()
        for name, item in dict.items(value):
            dict.__setitem__(result, name, redact(item, name))
        return result
    if isinstance(value, dict):
        return {name: redact(item, name) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(redact(item, key) for item in value)
    return value


def redact_config(cfg: Config) -> Config:
    """A copy of a config without secrets; origins are kept, settings are redacted too."""
    clean = Config(redact(cfg._cfg_dict), filename=None)
    object.__setattr__(clean, "_filename", cfg.filename)
    known = provenance_of(cfg)
    provenance = copy.copy(known)
    provenance.settings = redact(known.settings)
    attach(clean, provenance if isinstance(provenance, Provenance) else Provenance())
    return clean
