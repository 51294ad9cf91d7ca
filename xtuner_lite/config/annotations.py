"""Whether a value from a config fits a parameter's annotation, where the annotation is simple.

Only what a config can hold is judged: numbers, strings, booleans, None, lists, tuples, dicts. A
class in an annotation is satisfied by a dict (which describes it) or a lazy object; what cannot be
told is accepted.
"""

from __future__ import annotations

import ast
from typing import Any

from mmengine.config.lazy import LazyAttr, LazyObject

from xtuner_lite.config.names import resolve_expression
from xtuner_lite.config.parameters import Param
from xtuner_lite.config.source import Module, NotFound, Unknown

_SEQUENCES = {"list", "List", "Sequence", "Iterable", "Collection", "MutableSequence"}
_MAPPINGS = {"dict", "Dict", "Mapping", "MutableMapping", "OrderedDict", "ConfigDict", "Config"}
_ANYTHING = {"Any", "object", "TypeVar", "T"}


def mismatch(param: Param, value: Any) -> str | None:
    """What the parameter allows, where ``value`` certainly does not fit; None where it may fit.

    Returns:
        str such as "int or None", or "one of 'a', 'b'".
    """
    is_default = type(value) is type(param.default) and value == param.default
    if is_default or isinstance(value, (LazyObject, LazyAttr)) or callable(value):
        return None
    if param.annotation is None or param.module is None and _is_opaque(param.annotation):
        return _by_default(param, value)
    verdict = _fits(value, param.annotation, param.module)
    if verdict is False:
        return describe(param.annotation)
    return None


def describe(node: ast.expr) -> str:
    """An annotation in words a person would use: 'int or None', "one of 'a', 'b'"."""
    node = _unquote(node)
    parts = _union_parts(node)
    if len(parts) > 1:
        return " or ".join(dict.fromkeys(describe(part) for part in parts))
    if isinstance(node, ast.Constant) and node.value is None:
        return "None"
    if isinstance(node, ast.Subscript) and _last(node.value) == "Literal":
        return "one of " + ", ".join(repr(value) for value in _literal_values(node))
    return ast.unparse(node)


def _fits(value: Any, node: ast.expr, module: Module | None) -> bool | None:
    """True, False, or None when the annotation does not tell."""
    node = _unquote(node)
    parts = _union_parts(node)
    if len(parts) > 1:
        verdicts = [_fits(value, part, module) for part in parts]
        if True in verdicts:
            return True
        if isinstance(value, str) and any(_last(part) in ("int", "float") for part in parts):
            return None if any(_takes_text(part, module) for part in parts) else False
        return None if None in verdicts else False
    if isinstance(node, ast.Constant):
        return value is None if node.value is None else None
    name = _last(node.value if isinstance(node, ast.Subscript) else node)
    if name == "Literal" and isinstance(node, ast.Subscript):
        return any(value == item and type(value) is type(item) for item in _literal_values(node))
    if name in ("Annotated", "Final") and isinstance(node, ast.Subscript):
        inner = node.slice.elts[0] if isinstance(node.slice, ast.Tuple) else node.slice
        return _fits(value, inner, module)
    simple = _fits_simple(value, name, node, module)
    return _fits_alias(value, node, module) if simple == "unknown" else simple  # type: ignore[return-value]


def _fits_simple(value: Any, name: str, node: ast.expr, module: Module | None) -> bool | None | str:
    """Verdict for builtin names, 'unknown' for any other."""
    if name in _ANYTHING:
        return True
    if name == "bool":
        return isinstance(value, bool)
    if name == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if name == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "str":
        return isinstance(value, str)
    if name in ("Path", "PathLike", "PurePath"):
        return isinstance(value, str) or hasattr(value, "__fspath__")
    if name == "None":
        return value is None
    if name in _SEQUENCES or name in ("tuple", "Tuple", "set", "Set", "frozenset"):
        return _fits_sequence(value, name, node, module)
    if name in _MAPPINGS:
        return isinstance(value, dict)
    if name == "Callable":  # a registered name or dict(type=...) may stand for it
        return None if isinstance(value, (str, dict)) or callable(value) else False
    return "unknown"


def _fits_sequence(value: Any, name: str, node: ast.expr, module: Module | None) -> bool | None:
    if isinstance(value, str):
        return None if name in ("Sequence", "Iterable", "Collection") else False
    if not isinstance(value, (list, tuple)):
        return None if isinstance(value, dict) and name in ("Iterable", "Collection") else False
    if isinstance(node, ast.Subscript):
        slots = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        slots = [slot for slot in slots if not _is_ellipsis(slot)]
        if name in ("tuple", "Tuple") and len(slots) == len(value):
            pairs = list(zip(value, slots, strict=True))
        else:
            pairs = [(item, slots[0]) for item in value] if len(slots) == 1 else []
        if any(_fits(item, slot, module) is False for item, slot in pairs):
            return False
    return True


def _fits_alias(value: Any, node: ast.expr, module: Module | None) -> bool | None:
    """A name that is neither builtin nor typing's: follow it when it is an alias."""
    if module is None:
        return None
    try:
        found = resolve_expression(module, node)
    except (NotFound, Unknown):
        return None
    if found.is_class or found.is_function or found.is_module:
        return None
    if isinstance(found.node, (ast.Subscript, ast.BinOp)):
        return _fits(value, found.node, found.module)
    return None


def _takes_text(node: ast.expr, module: Module | None) -> bool:
    """Whether a string may be meant: str, a Literal of strings, or a name that cannot be judged."""
    node = _unquote(node)
    name = _last(node.value if isinstance(node, ast.Subscript) else node)
    if name in ("int", "float", "bool", "None", "Tensor", "ndarray", *_SEQUENCES, *_MAPPINGS):
        return False
    return not (isinstance(node, ast.Constant) and node.value is None) and name not in (
        "tuple",
        "Tuple",
    )


def _by_default(param: Param, value: Any) -> str | None:
    """Without an annotation, a number as default asks for a number when text is given."""
    is_number = isinstance(param.default, (int, float)) and not isinstance(param.default, bool)
    if is_number and isinstance(value, str) and _looks_like_number(value):
        return "a number, without quotes"
    return None


def _looks_like_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_opaque(node: ast.expr) -> bool:
    return _last(node) not in ("int", "float", "bool", "str")


def _unquote(node: ast.expr) -> ast.expr:
    """The expression inside a quoted annotation."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        try:
            return ast.parse(node.value, mode="eval").body
        except SyntaxError:
            return node
    return node


def _union_parts(node: ast.expr) -> list[ast.expr]:
    """The members of ``A | B``, ``Union[A, B]`` and ``Optional[A]``; [node] for anything else."""
    node = _unquote(node)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union_parts(node.left) + _union_parts(node.right)
    if isinstance(node, ast.Subscript) and _last(node.value) == "Union":
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return [part for item in items for part in _union_parts(item)]
    if isinstance(node, ast.Subscript) and _last(node.value) == "Optional":
        return [*_union_parts(node.slice), ast.Constant(None)]
    return [node]


def _last(node: ast.AST) -> str:
    """'Union' for ``typing.Union``."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Constant):
        return str(node.value)
    return node.id if isinstance(node, ast.Name) else ""


def _literal_values(node: ast.Subscript) -> list[Any]:
    items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    return [item.value for item in items if isinstance(item, ast.Constant)]


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is Ellipsis
