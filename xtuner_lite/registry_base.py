"""The Registry class: mmengine's, with lookup by reading source and errors that help.

The registries themselves stand in :mod:`xtuner_lite.registry`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from importlib import import_module
from itertools import chain
from typing import Any

from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.registry import Registry as MMRegistry
from mmengine.utils import ManagerMixin

from xtuner_lite.discovery import Entry, first_line, index_package, index_plugins, public_names
from xtuner_lite.plugins import import_declared
from xtuner_lite.suggestions import did_you_mean

PACKAGE = "xtuner_lite"


class Registry(MMRegistry):
    """A registry whose parts are found by reading source, looked up the same in every scope.

    Unlike mmengine's, a lookup never depends on ``DefaultScope``, never imports more than the one
    module that holds the name, and never lets two parts share a name.

    Args:
        plural: name on the command line ('hooks') and, in capitals, the variable that holds it.
        parent: mmengine's registry of the same concept, or None.
        stock: (module or package of mmengine, variable of mmengine's registry) to index as well.
        namespaces: modules whose classes resolve by their bare name ('torch.optim').
        name: singular, as errors say it.
    """

    def __init__(
        self,
        name: str,
        plural: str,
        *,
        parent: MMRegistry | None = None,
        stock: tuple[tuple[str, str], ...] = (),
        namespaces: tuple[str, ...] = (),
    ) -> None:
        super().__init__(name, parent=parent, scope=PACKAGE)
        self.plural = plural
        self._stock = stock
        self._namespaces = namespaces

    # ---------------------------------------------------------------- what is known, unimported

    def own_entries(self) -> dict[str, Entry]:
        """name -> entry of the parts in this package and in the declared plug-ins.

        Raises:
            KeyError: two parts share a name.
        """
        registrations = chain(index_package(PACKAGE), index_plugins())
        return self._unique(
            entry for variable, entry in registrations if variable == self.plural.upper()
        )

    def stock_entries(self) -> dict[str, Entry]:
        """name -> entry of mmengine's parts and of the namespaces, without names of our own."""
        found = {}
        for root, variable in self._stock:
            for owner, entry in index_package(root):
                if owner == variable:
                    found.setdefault(entry.name, entry)
        for namespace in self._namespaces:
            for name, module in public_names(namespace).items():
                entry = Entry(name, namespace, name, module, 0, f"{namespace}.{name}")
                found.setdefault(name, entry)
        return found

    def entries(self) -> dict[str, Entry]:
        """name -> entry of everything: this package, plug-ins, mmengine's parts, namespaces."""
        found = {**self.stock_entries(), **self.own_entries()}
        for name, part in self._module_dict.items():
            if name not in found or found[name].module != getattr(part, "__module__", None):
                found[name] = _entry_of(name, part)
        return dict(sorted(found.items()))

    def find(self, name: str) -> Entry | None:
        """The entry of a name, found without importing its module; None when it is unknown."""
        if name in self._module_dict:
            own = self.own_entries().get(name)
            part = self._module_dict[name]
            return own if own is not None else _entry_of(name, part)
        return self.own_entries().get(name) or self.stock_entries().get(name)

    def _unique(self, entries: Iterable[Entry]) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for entry in entries:
            if entry.name in found:
                raise KeyError(self._duplicate(entry.name, found[entry.name].place, entry.place))
            found[entry.name] = entry
        return found

    def _duplicate(self, name: str, first: str, second: str) -> str:
        return (
            f"{self.name} {name!r} is registered twice: at {first} and at {second}; a name is "
            f"used once in a registry. Rename one of them: "
            f'@{self.plural.upper()}.register_module(name="...")'
        )

    # ---------------------------------------------------------------- lookup

    def get(self, key: str) -> Any:
        """The part called ``key``: a registered name, 'scope.Name', or a dotted import path.

        Raises:
            KeyError: no such name, with the nearest ones.
            TypeError: ``key`` is not a string.
        """
        if not isinstance(key, str):
            raise TypeError(f"a {self.name} is looked up by its name (str), got {key!r}")
        scope, _, bare = key.partition(".")
        if bare and scope in (PACKAGE, "mmengine") and "." not in bare:
            key = bare
        if "." in key:
            return self._import_path(key)
        if key not in self._module_dict and key in self.own_entries():
            import_declared(self.own_entries()[key].module)
        if key in self._module_dict:
            return self._module_dict[key]
        entry = self.stock_entries().get(key)
        if entry is not None:
            return getattr(import_module(entry.module), entry.qualname)
        if self.parent is not None and key in self.parent.module_dict:
            return self.parent.module_dict[key]
        raise KeyError(self.unknown(key))

    def __contains__(self, key: object) -> bool:
        in_parent = self.parent is not None and key in self.parent.module_dict
        return isinstance(key, str) and (in_parent or self.find(key) is not None)

    def unknown(self, key: str) -> str:
        """The message for a name this registry does not know."""
        hint = did_you_mean(key, self.entries()) or "."
        return f"unknown {self.name} {key!r}{hint} See: xtuner-lite list {self.plural}"

    def _import_path(self, path: str) -> Any:
        parts = path.split(".")
        for depth in range(len(parts) - 1, 0, -1):
            module_name = ".".join(parts[:depth])
            try:
                found: Any = import_module(module_name)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                    raise
                continue
            for part in parts[depth:]:
                if not hasattr(found, part):
                    known = did_you_mean(part, dir(found))
                    raise KeyError(f"{path!r}: {module_name} has no {part!r}{known}")
                found = getattr(found, part)
            return found
        raise KeyError(
            f"unknown {self.name} {path!r}: there is no module {parts[0]!r}; give a name "
            f"(see: xtuner-lite list {self.plural}) or the path of something that can be imported"
        )

    # ---------------------------------------------------------------- registration

    def _register_module(
        self, module: Any, module_name: str | list[str] | None = None, force: bool = False
    ) -> None:
        if not callable(module):
            raise TypeError(f"a {self.name} must be a class or a function, got {module!r}")
        names = [module_name] if isinstance(module_name, str) else module_name
        for name in names or [module.__name__]:
            if not force:
                self._refuse_duplicate(name, module)
            self._module_dict[name] = module

    def _refuse_duplicate(self, name: str, part: Any) -> None:
        """Refuse a name that something else holds; re-running the same source replaces it."""
        new = _entry_of(name, part)
        held = _entry_of(name, self._module_dict[name]) if name in self._module_dict else None
        if held is None:
            held = self.own_entries().get(name)
        if held is None and new.module.partition(".")[0] != PACKAGE:
            held = self.stock_entries().get(name)
        if held is not None and (held.file, held.qualname) != (new.file, new.qualname):
            raise KeyError(self._duplicate(name, held.place, new.place))

    # ---------------------------------------------------------------- building

    def build(self, cfg: Any, *args: Any, config_key: str = "", **injected: Any) -> Any:
        """Build the part that ``cfg`` describes.

        Args:
            cfg: dict with ``type`` (a name, class, function or lazy object) and its keywords; or an
                already built object, which is returned as it is.
            args: positional arguments passed first.
            config_key: where ``cfg`` stands in the config ('custom_hooks.0'), for the errors.
            injected: runtime arguments, passed only when the signature names them and ``cfg`` does
                not set them.

        Raises:
            KeyError: the type's name is unknown.
            TypeError: ``cfg`` has no type, or its keywords do not fit the type's signature.
        """
        where = config_key or self.name
        if not isinstance(cfg, dict):
            return self._built(cfg, where)
        keywords = dict(cfg.items())
        if "type" not in keywords:
            raise TypeError(
                f"{where}: a dict without 'type' cannot be built, got keys {sorted(keywords)}; "
                f"add type=..., see: xtuner-lite list {self.plural}"
            )
        target = self.resolve(keywords.pop("type"))
        names = _parameter_names(target)
        if keywords.pop("convert_to_iter_based", False):  # mmengine's schedules, given in epochs
            target = target.build_iter_from_epoch
            names |= _parameter_names(target)
        call = target
        if inspect.isclass(target) and issubclass(target, ManagerMixin):
            call = target.get_instance  # mmengine's global instances, found again by their name
        extra = {name: value for name, value in injected.items() if name in names}
        keywords = {**extra, **keywords}
        _check_binding(target, args, keywords, where)
        return call(*args, **keywords)

    def resolve(self, kind: Any) -> Callable[..., Any]:
        """The class or function that a config's ``type`` stands for."""
        if isinstance(kind, str):
            return self.get(kind)
        if isinstance(kind, (LazyObject, LazyAttr)):
            kind = kind.build()
        if not callable(kind):
            raise TypeError(
                f"type of a {self.name} must be a name, class or function, got {kind!r}"
            )
        return kind

    def _built(self, value: Any, where: str) -> Any:
        if isinstance(value, (LazyObject, LazyAttr)):
            value = value.build()
        if value is None or isinstance(value, (str, int, float, list, tuple)):
            raise TypeError(
                f"{where}: expected dict(type=...) or a built {self.name}, got {value!r}"
            )
        if inspect.isclass(value):
            raise TypeError(
                f"{where}: got the class {value.__name__}, not a built {self.name}; "
                f"write dict(type={value.__name__}, ...)"
            )
        return value


def _parameter_names(target: Callable[..., Any]) -> set[str]:
    """Names of the parameters, those reached through ``super().__init__(**kwargs)`` included."""
    names: set[str] = set()
    owners = target.__mro__ if inspect.isclass(target) else (target,)
    for owner in owners:
        try:
            signature = inspect.signature(owner)
        except (ValueError, TypeError):  # C code without a text signature
            return names
        names.update(signature.parameters)
        kinds = [parameter.kind for parameter in signature.parameters.values()]
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return names
    return names


def _check_binding(
    target: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any], where: str
) -> None:
    try:
        signature = inspect.signature(target)
    except (ValueError, TypeError):  # C code without a text signature: the call itself will tell
        return
    try:
        signature.bind(*args, **keywords)
    except TypeError as error:
        unknown = [name for name in keywords if name not in signature.parameters]
        hint = did_you_mean(unknown[0], signature.parameters) if unknown else ""
        name = getattr(target, "__qualname__", repr(target))
        raise TypeError(
            f"{where}: {name} cannot be built: {error}{hint} It takes {name}{signature}"
        ) from None


def _entry_of(name: str, part: Any) -> Entry:
    """Entry of a part that is already imported."""
    file, line = "<unknown>", 0
    try:
        file = inspect.getsourcefile(part) or file
        line = inspect.getsourcelines(part)[1]
    except (TypeError, OSError):  # built in C or typed at a prompt: there is no source to point at
        pass
    qualname = getattr(part, "__qualname__", name)
    return Entry(name, part.__module__, qualname, file, line, first_line(inspect.getdoc(part)))
