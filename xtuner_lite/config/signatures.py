"""Signatures read from source: what may stand beside a ``type`` in a config, nothing imported."""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any

from xtuner_lite.config.names import Definition, find, linearize
from xtuner_lite.config.parameters import (
    KEYWORD_ONLY,
    POSITIONAL,
    POSITIONAL_ONLY,
    VAR_KEYWORD,
    VAR_POSITIONAL,
    Param,
    dataclass_options,
    dataclass_params,
    params_of,
    super_call,
    uses_of_kwargs,
)
from xtuner_lite.config.source import NotFound, Unknown
from xtuner_lite.discovery import first_line


@dataclass(frozen=True)
class Signature:
    """What a class or function takes.

    ``params`` is what ``inspect.signature`` shows. ``accepted`` also has the names that
    ``**kwargs`` passes on to ``super().__init__``; ``open``: other names are accepted as well.
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
    params = params_of(node.args, found.module)
    decorators = {ast.unparse(item).split("(")[0].split(".")[-1] for item in node.decorator_list}
    if "property" in decorators:
        raise TypeError(f"{found.name} is a property, not a class or function")
    if found.owner is not None and "classmethod" in decorators:
        params = params[1:]
    kwargs = node.args.kwarg
    popped, is_open = uses_of_kwargs(node, kwargs.arg) if kwargs is not None else ((), False)
    named = tuple(p for p in params if p.kind not in (VAR_POSITIONAL, VAR_KEYWORD))
    forwards = kwargs is not None and super_call(node, kwargs.arg) is not None
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
                return params_of(item.args, owner.module)[1:], item, position
        if dataclass_options(node) is not None:
            return dataclass_params(chain[position:]), None, position
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
    fields = dataclass_params(chain, every=True)
    return (*(replace(param, kind=KEYWORD_ONLY) for param in fields), Param("kwargs", VAR_KEYWORD))


def _accepted(
    chain: tuple[Definition, ...], start: int, given: int = 0
) -> tuple[tuple[Param, ...], bool]:
    """(every named parameter, whether others are accepted), ``super().__init__`` followed.

    ``given`` is the number of positional arguments that the calling ``__init__`` fills in.
    """
    params, init, position = _own_init(chain, start)
    positional = [p for p in params if p.kind in (POSITIONAL_ONLY, POSITIONAL)]
    filled = {p.name for p in positional[:given]}
    named = tuple(
        p for p in params if p.kind not in (VAR_POSITIONAL, VAR_KEYWORD) and p.name not in filled
    )
    if init is None or init.args.kwarg is None:
        return named, any(p.kind is VAR_KEYWORD for p in params)
    name = init.args.kwarg.arg
    popped, is_open = uses_of_kwargs(init, name)
    call = super_call(init, name)
    if call is None:
        return named + popped, is_open
    passed_on = sum(not isinstance(item, ast.Starred) for item in call.args)
    if any(isinstance(item, ast.Starred) for item in call.args):
        passed_on += max(given - len(positional), 0)  # what landed in *args
    inherited, base_open = _accepted(chain, position + 1, passed_on)
    taken = {keyword.arg for keyword in call.keywords} | {p.name for p in named + popped} | filled
    rest = tuple(replace(p, kind=KEYWORD_ONLY) for p in inherited if p.name not in taken)
    return named + popped + rest, is_open or base_open
