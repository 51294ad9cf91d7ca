"""Signatures read from source: what may stand beside a ``type`` in a config, without importing it."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any

from xtuner_lite.config.source import (
    Definition,
    Module,
    NotFound,
    Unknown,
    find,
    linearize,
    resolve_expression,
)
from xtuner_lite.discovery import first_line

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


@dataclass(frozen=True)
class Signature:
    """What a class or function takes.

    ``params`` is what ``inspect.signature`` shows. ``accepted`` also has the names that ``**kwargs``
    passes on to ``super().__init__``; ``open`` says that other names are accepted as well.
    """

    name: str
    place: str  # 'file:line'
    params: tuple[Param, ...]
    accepted: tuple[Param, ...]
    open: bool
    description: str = ""

    @property
    def names(self) -> list[str]:
        """Names that can be given as keywords."""
        return [param.name for param in self.accepted if param.kind is not POSITIONAL_ONLY]

    def get(self, name: str) -> Param | None:
        """The parameter of that name, None when there is none."""
        return next((param for param in self.accepted if param.name == name), None)


def signature_of(module: str, path: tuple[str, ...]) -> Signature:
    """Signature of ``module.path...``; read from source, or imported when the source cannot tell.

    Raises:
        NotFound: there is no such thing.
        TypeError: it exists and cannot be called.
    """
    try:
        return signature_of_definition(find(module, path))
    except Unknown:
        return imported_signature(module, path)


@cache
def signature_of_definition(found: Definition) -> Signature:
    """Signature of a class or function found in source.

    Raises:
        Unknown: the source does not tell.
        TypeError: it is neither a class nor a function.
    """
    if found.is_class:
        params, accepted, is_open = _of_class(found)
    elif found.is_function:
        params, accepted, is_open = _of_function(found)
    elif found.is_module:
        raise TypeError(f"{found.name} is a module, not a class or function")
    else:
        raise Unknown(f"{found.name} is computed where it is defined")
    documented = found.node
    assert isinstance(documented, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    description = first_line(ast.get_docstring(documented))
    return Signature(found.name, found.place, params, accepted, is_open, description)


def imported_signature(module: str, path: tuple[str, ...]) -> Signature:
    """The same by a real import, for what is written in C or made at run time."""
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        raise NotFound(module, error.name or module, []) from error
    for name in path:
        if not hasattr(found, name):
            raise NotFound(module, name, dir(found))
        found = getattr(found, name)
    return signature_of_object(found)


def signature_of_object(found: Any) -> Signature:
    """Signature of an imported class or function; one that tells nothing accepts everything."""
    name = getattr(found, "__qualname__", repr(found))
    if not callable(found):
        raise TypeError(f"{name} is {type(found).__name__}, not a class or function")
    place = getattr(found, "__module__", None) or "built in"
    description = first_line(inspect.getdoc(found))
    try:
        shown = inspect.signature(found).parameters.values()
    except (ValueError, TypeError):  # C code without a text signature
        return Signature(name, place, (), (), True, description)
    params = tuple(Param(p.name, p.kind, p.default, _annotation(p.annotation)) for p in shown)
    accepted = tuple(p for p in params if p.kind not in (VAR_POSITIONAL, VAR_KEYWORD))
    is_open = any(p.kind is VAR_KEYWORD for p in params)
    return Signature(name, place, params, accepted, is_open, description)


def _annotation(value: Any) -> ast.expr | None:
    """An imported annotation as an expression, for the simple types that are checked."""
    if value is inspect.Parameter.empty:
        return None
    text = value.__name__ if isinstance(value, type) else str(value)
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError:  # e.g. "<function f at 0x...>": says nothing about literals
        return None


_Found = tuple[tuple[Param, ...], tuple[Param, ...], bool]


def _of_function(found: Definition) -> _Found:
    node = found.node
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    params = _params_of(node.args, found.module)
    decorators = {ast.unparse(item).split("(")[0].split(".")[-1] for item in node.decorator_list}
    if "property" in decorators:
        raise TypeError(f"{found.name} is a property, not a class or function")
    if found.owner is not None and "classmethod" in decorators:
        params = params[1:]
    kwargs = node.args.kwarg
    popped, is_open = _uses_of_kwargs(node, kwargs.arg) if kwargs is not None else ((), False)
    named = tuple(p for p in params if p.kind not in (VAR_POSITIONAL, VAR_KEYWORD))
    forwards = kwargs is not None and _super_call(node, kwargs.arg) is not None
    return params, named + popped, is_open or forwards


def _of_class(found: Definition) -> _Found:
    chain = linearize(found)
    params = _own_init(chain, 0)[0]
    accepted, is_open = _accepted(chain, 0)
    return params, accepted, is_open


def _own_init(
    chain: tuple[Definition, ...], start: int
) -> tuple[tuple[Param, ...], ast.FunctionDef | None, int]:
    """(parameters, __init__ or None for a generated one, position in the chain) from ``start``."""
    for position in range(start, len(chain)):
        owner = chain[position]
        node = owner.node
        assert isinstance(node, ast.ClassDef)
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                return _params_of(item.args, owner.module)[1:], item, position
        if _dataclass_options(node) is not None:
            return _dataclass_params(chain[position:]), None, position
        if any(_is_dataclass_transform(base) for base in chain[position + 1 :]):
            return _transformed_params(chain[position:]), None, position
        bases = {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases}
        if bases & {"NamedTuple", "TypedDict", "Enum", "BaseModel", "dict", "list", "str"}:
            raise Unknown(f"{owner.name} gets its signature at run time")
    return (), None, len(chain)


def _is_dataclass_transform(found: Definition) -> bool:
    """Whether a class makes dataclasses of its subclasses (transformers' PreTrainedConfig does)."""
    assert isinstance(found.node, ast.ClassDef)
    return any("dataclass_transform" in ast.unparse(item) for item in found.node.decorator_list)


def _transformed_params(chain: tuple[Definition, ...]) -> tuple[Param, ...]:
    """Fields of such a subclass: keywords, and anything else besides."""
    fields = _dataclass_params(chain, every=True)
    return (*(replace(param, kind=KEYWORD_ONLY) for param in fields), Param("kwargs", VAR_KEYWORD))


def _accepted(chain: tuple[Definition, ...], start: int) -> tuple[tuple[Param, ...], bool]:
    """(every named parameter, whether others are accepted), ``super().__init__`` followed."""
    params, init, position = _own_init(chain, start)
    named = tuple(p for p in params if p.kind not in (VAR_POSITIONAL, VAR_KEYWORD))
    if init is None or init.args.kwarg is None:
        return named, any(p.kind is VAR_KEYWORD for p in params)
    name = init.args.kwarg.arg
    popped, is_open = _uses_of_kwargs(init, name)
    call = _super_call(init, name)
    if call is None:
        return named + popped, is_open
    inherited, base_open = _accepted(chain, position + 1)
    given = sum(not isinstance(item, ast.Starred) for item in call.args)
    taken = {keyword.arg for keyword in call.keywords} | {p.name for p in named + popped}
    if inherited and any(isinstance(item, ast.Starred) for item in call.args):
        pass  # *args fill from the left what the call itself did not give
    rest = tuple(replace(p, kind=KEYWORD_ONLY) for p in inherited[given:] if p.name not in taken)
    return named + popped + rest, is_open or base_open


def _super_call(node: ast.FunctionDef | ast.AsyncFunctionDef, kwargs: str) -> ast.Call | None:
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


def _uses_of_kwargs(
    node: ast.FunctionDef | ast.AsyncFunctionDef, kwargs: str
) -> tuple[tuple[Param, ...], bool]:
    """(names popped from ``**kwargs``, whether it is used in a way that accepts any name)."""
    popped: dict[str, Param] = {}
    known_uses = 0
    for item in ast.walk(node):
        if not isinstance(item, ast.Call):
            continue
        if item is _super_call(node, kwargs):
            known_uses += 1
        elif _is_pop(item, kwargs):
            assert isinstance(item.args[0], ast.Constant)
            name = item.args[0].value
            default = _default(item.args[1]) if len(item.args) > 1 else REQUIRED
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


def _params_of(args: ast.arguments, module: Module) -> tuple[Param, ...]:
    return tuple(_iterate_params(args, module))


def _iterate_params(args: ast.arguments, module: Module) -> Iterator[Param]:
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    for index, (arg, default) in enumerate(zip(positional, defaults, strict=True)):
        kind = POSITIONAL_ONLY if index < len(args.posonlyargs) else POSITIONAL
        yield Param(arg.arg, kind, _default(default), arg.annotation, module)
    if args.vararg is not None:
        yield Param(args.vararg.arg, VAR_POSITIONAL)
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        yield Param(arg.arg, KEYWORD_ONLY, _default(default), arg.annotation, module)
    if args.kwarg is not None:
        yield Param(args.kwarg.arg, VAR_KEYWORD)


def _default(node: ast.expr | None) -> Any:
    if node is None:
        return REQUIRED
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return Source(ast.unparse(node))


def _dataclass_options(node: ast.ClassDef) -> dict[str, bool] | None:
    """Keywords of the ``@dataclass`` above a class, None when there is none."""
    for decorator in node.decorator_list:
        call = decorator.func if isinstance(decorator, ast.Call) else decorator
        if ast.unparse(call).split(".")[-1] == "dataclass":
            keywords = decorator.keywords if isinstance(decorator, ast.Call) else []
            return {
                keyword.arg: bool(_default(keyword.value)) for keyword in keywords if keyword.arg
            }
    return None


def _dataclass_params(chain: tuple[Definition, ...], every: bool = False) -> tuple[Param, ...]:
    """Parameters of the ``__init__`` that ``@dataclass`` writes: base fields first.

    ``every``: fields of classes without the decorator count too (a base class adds it).
    """
    fields: dict[str, Param] = {}
    hidden: set[str] = set()
    for owner in reversed(chain):
        assert isinstance(owner.node, ast.ClassDef)
        options = _dataclass_options(owner.node)
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
        return _default(node), True, None
    options = {keyword.arg: keyword.value for keyword in node.keywords}
    in_init = _default(options["init"]) is not False if "init" in options else True
    only = bool(_default(options["kw_only"])) if "kw_only" in options else None
    if "default" in options:
        return _default(options["default"]), in_init, only
    if "default_factory" in options:
        return Source(f"{ast.unparse(options['default_factory'])}()"), in_init, only
    return REQUIRED, in_init, only


def follow(module: Module, node: ast.AST) -> Definition | None:
    """What a name in a signature stands for, None when the source does not tell."""
    try:
        return resolve_expression(module, node)
    except (NotFound, Unknown):
        return None
