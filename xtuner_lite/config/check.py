"""Checks a whole config before anything heavy is loaded, and tells every mistake at once."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.config.lazy import LazyAttr, LazyObject

from xtuner_lite.config.annotations import mismatch
from xtuner_lite.config.errors import Problem
from xtuner_lite.config.names import find
from xtuner_lite.config.origins import KeyPath, Provenance, dotted, provenance_of
from xtuner_lite.config.page import PAGE_MODULE
from xtuner_lite.config.schema import (
    Target,
    default_hooks,
    forwarded_names,
    keys_of,
    lazy_path,
    registry_of,
    target_of,
)
from xtuner_lite.config.source import NotFound, Unknown
from xtuner_lite.plugins import PluginError, declare_plugins
from xtuner_lite.registry import MAP_FNS
from xtuner_lite.suggestions import did_you_mean, is_slip_of

_SPECIAL_NAMES = ("auto",)
_FREE_FORM = {"default_hooks", "data", "template"}  # may hold dicts that nothing is built from


def check_config(cfg: Config | dict[str, Any]) -> list[Problem]:
    """Every mistake that can be told from the config and the source of what it names.

    Each ``type`` is resolved and its keywords are bound to its signature (also missing ones, other
    than those the Runner fills in); literals are compared with simple annotations; unknown keys at
    any depth, names that nothing reads and imports that do not exist are told. Signatures are read
    from source, so a config of lazy types imports no torch.

    Returns:
        The problems in the order of files and lines, [] for a config that can be used.
    """
    provenance = provenance_of(cfg)
    try:
        declare_plugins(cfg)
    except PluginError as error:
        return [*provenance.problems, Problem("plugins", str(error))]
    root = cfg._cfg_dict if isinstance(cfg, Config) else ConfigDict(cfg)
    checker = _Checker(provenance)
    problems = [*provenance.problems, *checker.imports(), *checker.section((), root)]
    return sorted(dict.fromkeys(problems), key=_reading_order)


def _reading_order(problem: Problem) -> tuple[str, int]:
    file, _, line = problem.place.rpartition(":")
    return (file, int(line)) if line.isdigit() else (problem.place, 0)


class _Checker:
    def __init__(self, provenance: Provenance) -> None:
        self.provenance = provenance
        self.missing: set[tuple[str, str | None]] = set()  # imports already told

    def _problem(self, path: KeyPath, message: str, *, of_value: bool = False) -> Problem:
        origin = self.provenance.origin(path)
        return Problem(dotted(path), message, origin.value_place if of_value else origin.place)

    # ------------------------------------------------------------------ imports

    def imports(self) -> Iterator[Problem]:
        """``from module import name`` in the pages, where there is no such module or name."""
        for item in self.provenance.imports:
            try:
                find(item.module, (item.name,) if item.name else ())
            except Unknown:
                yield from self._import_for_real(item.module, item.name, item.place)
            except NotFound as error:
                self.missing.add((item.module, item.name))
                yield Problem("", _missing_import(item.module, item.name, error), item.place)

    def _import_for_real(self, module: str, name: str | None, place: str) -> Iterator[Problem]:
        """For a name whose source does not tell: only importing the module does."""
        from importlib import import_module

        try:
            found = import_module(module)
        except ImportError as error:
            self.missing.add((module, name))
            yield Problem("", f"importing {module} fails: {error}", place)
            return
        if name is not None and not hasattr(found, name):
            try:
                import_module(f"{module}.{name}")
            except ImportError:
                self.missing.add((module, name))
                error = NotFound(module, name, dir(found))
                yield Problem("", _missing_import(module, name, error), place)

    # ------------------------------------------------------------------ values

    def section(self, path: KeyPath, value: dict[Any, Any]) -> Iterator[Problem]:
        """A dict: its type and keywords, then what it holds."""
        try:
            target = target_of(path, value)
        except (KeyError, TypeError, ImportError) as error:
            if not self._told_already(dict.get(value, "type")):
                yield self._problem((*path, "type"), _text_of(error, dict.get(value, "type")))
            target = None
        except NotFound as error:
            if not self._told_already(dict.get(value, "type")):
                known = did_you_mean(error.name, error.known) if error.name else ""
                given = dict.get(value, "type")
                yield self._problem((*path, "type"), f"{str(given)!r}: {error}{known}")
            target = None
        else:
            yield from self._keys(path, value, target)
        for key, item in dict.items(value):
            param = target.signature.get(key) if target is not None else None
            if param is not None and key != "type":
                allowed = mismatch(param, item)
                if allowed is not None:
                    text = f"got {item!r} ({type(item).__name__}); allowed: {allowed}"
                    yield self._problem((*path, key), text, of_value=True)
            yield from self._value((*path, key), item)

    def _told_already(self, kind: Any) -> bool:
        """Whether a lazy type's import has been told as a problem of its own."""
        if not isinstance(kind, (LazyObject, LazyAttr)):
            return False
        module, names = lazy_path(kind)
        return (module, names[0] if names else None) in self.missing or (
            module,
            None,
        ) in self.missing

    def _value(self, path: KeyPath, value: Any) -> Iterator[Problem]:
        if isinstance(value, dict):
            yield from self.section(path, value)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                yield from self._value((*path, index), item)
        elif isinstance(value, LazyAttr):
            yield from self._lazy_value(path, value)
        elif isinstance(value, (type, FunctionType)) and value.__module__ == PAGE_MODULE:
            yield self._problem(path, _local_message(value))
        elif isinstance(value, (set, frozenset)):
            text = "a set has no order and cannot be written back; use a list or a tuple"
            yield self._problem(path, text)
        elif isinstance(value, str) and path[-1] in ("map_fn", "dataset_map_fn"):
            yield from self._name(path, value)

    def _name(self, path: KeyPath, value: str) -> Iterator[Problem]:
        if value not in _SPECIAL_NAMES and MAP_FNS.find(value) is None and "." not in value:
            known = [*MAP_FNS.entries(), *_SPECIAL_NAMES]
            text = f"unknown map function {value!r}{did_you_mean(value, known)}"
            yield self._problem(path, f"{text} See: xtuner-lite list map_fns", of_value=True)

    def _lazy_value(self, path: KeyPath, value: LazyAttr) -> Iterator[Problem]:
        """``torch.bfloat61``: no such attribute. Types are resolved with their dict."""
        if path[-1] == "type" or self._told_already(value):
            return
        module, names = lazy_path(value)
        try:
            find(module, names)
        except NotFound as error:
            known = did_you_mean(error.name, error.known)
            yield self._problem(path, f"{error}{known}", of_value=True)
        except Unknown:
            try:
                value.build()
            except (ImportError, AttributeError) as error:
                yield self._problem(path, str(error), of_value=True)

    # ------------------------------------------------------------------ keywords

    def _keys(
        self, path: KeyPath, value: dict[Any, Any], target: Target | None
    ) -> Iterator[Problem]:
        if target is None:
            yield from self._free_keys(path, value)
            return
        signature = target.signature
        allowed = [*signature.names, *target.extra]
        for key in dict.keys(value):
            if key == "type" and path or key in allowed:
                continue
            if not path and key == "cfg":
                yield self._problem((*path, key), "this name is the Runner's own; choose another")
                continue
            known = allowed if not signature.open else [*allowed, *forwarded_names(signature)]
            if not signature.open or (key not in known and is_slip_of(str(key), known)):
                yield self._problem((*path, key), _unknown_key(str(key), path, target, known))
        for param in signature.accepted:
            if param.required and param.name not in value and param.name not in target.injected:
                if param.name == "self":
                    continue
                name = signature.name if path else "a config"
                text = f"{name} needs {param.name!r}, which is not given; add {param.name}=..."
                yield self._problem(path, text)

    def _free_keys(self, path: KeyPath, value: dict[Any, Any]) -> Iterator[Problem]:
        """A dict that is bound to no callable: only a few have a fixed set of keys."""
        allowed = keys_of(path)
        if path == ("default_hooks",):
            yield from self._default_hooks(path, value)
        elif allowed is not None:
            for key in dict.keys(value):
                if key not in allowed:
                    text = (
                        f"unknown key {key!r}{did_you_mean(str(key), allowed)} "
                        f"Allowed: {', '.join(allowed)}"
                    )
                    yield self._problem((*path, key), text)
        else:
            yield from self._needs_type(path, value)

    def _default_hooks(self, path: KeyPath, value: dict[Any, Any]) -> Iterator[Problem]:
        """A name that no default hook has stands for a hook of its own, which needs a type."""
        known = default_hooks()
        for name, hook in dict.items(value):
            of_its_own = isinstance(hook, dict) and "type" in hook
            if name not in known and (hook is None or isinstance(hook, dict)) and not of_its_own:
                text = (
                    f"no default hook is called {name!r}{did_you_mean(name, known)} Known: "
                    f"{', '.join(known)}; a hook of another name needs a type"
                )
                yield self._problem((*path, name), text)

    def _needs_type(self, path: KeyPath, value: dict[Any, Any]) -> Iterator[Problem]:
        """A dict without type where one is built, or whose 'type' is misspelled."""
        registry = registry_of(path)
        near = [key for key in dict.keys(value) if is_slip_of(str(key), ["type"])]
        if near:
            text = f"unknown key {near[0]!r}; did you mean 'type'?"
            yield self._problem((*path, near[0]), text)
        elif registry is not None and value and not set(path) & _FREE_FORM:
            text = (
                f"this dict has no type, so it cannot be built; add type=..., "
                f"see: xtuner-lite list {registry.plural}"
            )
            yield self._problem(path, text)


def _unknown_key(key: str, path: KeyPath, target: Target, allowed: list[str]) -> str:
    signature = target.signature
    what = f"{signature.name} has no option {key!r}" if path else f"unknown key {key!r}"
    hidden = {"_", *target.injected}  # what the Runner fills in need not be offered
    shown = [name for name in allowed if name[0] not in hidden and name not in hidden]
    near = did_you_mean(key, shown)
    listed = ", ".join(shown) if len(shown) <= 30 or not near else f"see {signature.place}"
    return f"{what}{near or ';'} Allowed: {listed or 'none'}"


def _missing_import(module: str, name: str | None, error: NotFound) -> str:
    if not error.name or (error.module, error.name) != (module, name):
        text = str(error)
        if not error.name:
            return f"{text}; install its package, or correct the import"
        return f"{text}{did_you_mean(error.name, error.known)}"
    return f"cannot import {name!r} from {module}{did_you_mean(name or '', error.known)}"


def _text_of(error: Exception, kind: Any) -> str:
    """KeyError without the quotes that str() puts around its text."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def _local_message(value: type | FunctionType) -> str:
    code = getattr(value, "__code__", None)
    place = f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else ""
    return (
        f"the {'class' if code is None else 'function'} {value.__name__!r}{place} is defined in "
        f"the config, so it cannot be written back; put it into a file of yours, register it "
        f"there and load it with --plugin FILE, or import it from a module"
    )
