"""What every registered part keeps: importable where the index says, described, bound right."""

from __future__ import annotations

import inspect

import pytest

from xtuner_lite.config.signatures import signature_of
from xtuner_lite.registry import REGISTRIES

#: (registry, name) of every part this package registers.
OWN = [
    pytest.param(registry, entry, id=f"{plural}-{entry.name}")
    for plural, registry in REGISTRIES.items()
    for entry in registry.own_entries().values()
    if entry.module.startswith("xtuner_lite.")
]


def test_there_are_parts():
    assert len(OWN) > 25
    filled = {plural for plural, registry in REGISTRIES.items() if registry.entries()}
    assert filled == set(REGISTRIES), "an empty registry is a promise nobody keeps"


@pytest.mark.parametrize(("registry", "entry"), OWN)
def test_part_resolves_to_what_the_index_says(registry, entry):
    part = registry.get(entry.name)
    assert part.__module__ == entry.module
    assert part.__qualname__ == entry.qualname
    assert inspect.getsourcefile(part) == entry.file
    assert registry.find(entry.name) == entry


@pytest.mark.parametrize(("registry", "entry"), OWN)
def test_part_is_described_in_one_line(registry, entry):
    assert entry.description, f"{entry.place} has no docstring"
    assert len(entry.description) <= 120, f"{entry.place}: the first sentence is long for a list"


@pytest.mark.parametrize(("registry", "entry"), OWN)
def test_static_signature_is_the_real_one(registry, entry):
    static = signature_of(entry.module, (entry.qualname,))
    real = inspect.signature(registry.get(entry.name)).parameters
    assert [param.name for param in static.params] == list(real)


@pytest.mark.parametrize("plural", sorted(REGISTRIES))
def test_every_stock_name_resolves_or_says_what_is_missing(plural):
    """mmengine's and the libraries' parts; some need packages that are not installed."""
    registry = REGISTRIES[plural]
    for name in registry.stock_entries():
        assert callable(registry.get(name)), name
