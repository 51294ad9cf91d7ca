"""Parameters read from the syntax of a function or dataclass."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from xtuner_lite.config.names import Definition
from xtuner_lite.config.source import Module

POSITIONAL_ONLY = inspect.Parameter.POSITIONAL_ONLY
POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
VAR_POSITIONAL = inspect.Parameter.VAR_POSITIONAL
KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
VAR_KEYWORD = inspect.Parameter.VAR_KEYWORD

#: Stands for the default of a required parameter.
REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Source:
    """A default that is an expression, not a literal: shown as it is written."""

    text: str

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Param:
    """One parameter."""

    name: str
    kind: Any  # inspect's kinds
    default: Any = REQUIRED  # a literal, a Source, or REQUIRED
    annotation: ast.expr | None = None
    module: Module | None = None  # where the annotation's names are looked up

    @property
    def required(self) -> bool:
        return self.default is REQUIRED and self.kind not in (VAR_POSITIONAL, VAR_KEYWORD)


def params_of(args: ast.arguments, module: Module) -> tuple[Param, ...]:
    return tuple(_iterate(args, module))


def _iterate(args: ast.arguments, module: Module) -> Iterator[Param]:
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    for index, (arg, default) in enumerate(zip(positional, defaults, strict=True)):
        kind = POSITIONAL_ONLY if index < len(args.posonlyargs) else POSITIONAL
        yield Param(arg.arg, kind, literal_default(default), arg.annotation, module)
    if args.vararg is not None:
        yield Param(args.vararg.arg, VAR_POSITIONAL)
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        yield Param(arg.arg, KEYWORD_ONLY, literal_default(default), arg.annotation, module)
    if args.kwarg is not None:
        yield Param(args.kwarg.arg, VAR_KEYWORD)


def literal_default(node: ast.expr | None) -> Any:
    if node is None:
        return REQUIRED
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return Source(ast.unparse(node))


def dataclass_options(node: ast.ClassDef) -> dict[str, bool] | None:
    """Keywords of the ``@dataclass`` above a class, None when there is none."""
    for decorator in node.decorator_list:
        call = decorator.func if isinstance(decorator, ast.Call) else decorator
        if ast.unparse(call).split(".")[-1] == "dataclass":
            keywords = decorator.keywords if isinstance(decorator, ast.Call) else []
            return {
                keyword.arg: bool(literal_default(keyword.value))
                for keyword in keywords
                if keyword.arg
            }
    return None


def dataclass_params(chain: tuple[Definition, ...], every: bool = False) -> tuple[Param, ...]:
    """Parameters of the ``__init__`` that ``@dataclass`` writes: base fields first.

    ``every``: fields of classes without the decorator count too (a base class adds it).
    """
    fields: dict[str, Param] = {}
    hidden: set[str] = set()
    for owner in reversed(chain):
        assert isinstance(owner.node, ast.ClassDef)
        options = dataclass_options(owner.node)
        if options is None and not every:
            continue
        options = options or {}
        keyword_only = options.get("kw_only", False)
        for item in owner.node.body:
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            annotation = ast.unparse(item.annotation)
            if annotation.split("[")[0].split(".")[-1] == "ClassVar":
                continue
            if annotation.split(".")[-1] == "KW_ONLY":
                keyword_only = True
                continue
            name = item.target.id
            default, in_init, only = _field(item.value)
            hidden.discard(name) if in_init else hidden.add(name)
            kind = KEYWORD_ONLY if (keyword_only if only is None else only) else POSITIONAL
            fields[name] = Param(name, kind, default, item.annotation, owner.module)
    shown = [param for name, param in fields.items() if name not in hidden]
    return tuple(sorted(shown, key=lambda param: param.kind is KEYWORD_ONLY))


def _field(node: ast.expr | None) -> tuple[Any, bool, bool | None]:
    """(default, whether it is a parameter, kw_only or None) of a dataclass field."""
    if not isinstance(node, ast.Call) or ast.unparse(node.func).split(".")[-1] != "field":
        return literal_default(node), True, None
    options = {keyword.arg: keyword.value for keyword in node.keywords}
    in_init = literal_default(options["init"]) is not False if "init" in options else True
    only = bool(literal_default(options["kw_only"])) if "kw_only" in options else None
    if "default" in options:
        return literal_default(options["default"]), in_init, only
    if "default_factory" in options:
        return Source(f"{ast.unparse(options['default_factory'])}()"), in_init, only
    return REQUIRED, in_init, only


def super_call(node: ast.FunctionDef | ast.AsyncFunctionDef, kwargs: str) -> ast.Call | None:
    """The ``super().__init__(..., **kwargs)`` in a constructor's body."""
    for call in ast.walk(node):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        owner = call.func.value
        is_super = isinstance(owner, ast.Call) and ast.unparse(owner.func) == "super"
        if is_super and call.func.attr == node.name and kwargs in _starred(call):
            return call
    return None


def _starred(call: ast.Call) -> list[str]:
    return [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None]


def uses_of_kwargs(
    node: ast.FunctionDef | ast.AsyncFunctionDef, kwargs: str
) -> tuple[tuple[Param, ...], bool]:
    """(names popped from ``**kwargs``, whether it is used in a way that accepts any name)."""
    popped: dict[str, Param] = {}
    known_uses = 0
    for item in ast.walk(node):
        if not isinstance(item, ast.Call):
            continue
        if item is super_call(node, kwargs):
            known_uses += 1
        elif _is_pop(item, kwargs):
            assert isinstance(item.args[0], ast.Constant)
            name = item.args[0].value
            default = literal_default(item.args[1]) if len(item.args) > 1 else REQUIRED
            assert isinstance(item.func, ast.Attribute)
            popped[name] = Param(name, KEYWORD_ONLY, None if item.func.attr == "get" else default)
            known_uses += 1
    uses = sum(isinstance(item, ast.Name) and item.id == kwargs for item in ast.walk(node))
    return tuple(popped.values()), uses > known_uses


def _is_pop(call: ast.Call, kwargs: str) -> bool:
    return (
        isinstance(call.func, ast.Attribute)
        and call.func.attr in ("pop", "get", "setdefault")
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == kwargs
        and bool(call.args)
        and isinstance(call.args[0], ast.Constant)
    )
