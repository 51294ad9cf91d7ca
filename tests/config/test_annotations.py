"""Literals against annotations: certain misfits only."""

from __future__ import annotations

import ast

import pytest

from xtuner_lite.config.annotations import describe, mismatch
from xtuner_lite.config.parameters import POSITIONAL, REQUIRED, Param
from xtuner_lite.config.source import load_module


def param(text, default=REQUIRED):
    annotation = ast.parse(text, mode="eval").body if text else None
    return Param("x", POSITIONAL, default, annotation, load_module("xtuner_lite.structures"))


@pytest.mark.parametrize(
    ("annotation", "fits", "misfits"),
    [
        ("int", [1, -3], [1.5, "1", True, None, [1], {}]),
        ("float", [1, 1.5], ["1e-4", True, None]),
        ("bool", [True, False], [1, "true", None]),
        ("str", ["a", ""], [1, None, ["a"]]),
        ("int | None", [1, None], ["1", 1.0]),
        ("Optional[int]", [1, None], ["1"]),
        ("Union[int, str]", [1, "a"], [1.5, None]),
        ("typing.Union[float, Tensor]", [1.0], ["1e-3"]),  # torch's lr
        ("Literal['a', 'b']", ["a"], ["c", 1, None]),
        ("bool | Literal['x']", [True, "x"], ["y", 3]),
        ("str | Path", ["a"], [3, None]),
        ("list[str]", [["a"], []], ["a", [1], {}]),
        ("Sequence[int]", [[1], (1, 2)], [3, ["a"]]),
        ("tuple[float, float]", [(0.9, 0.99), [1, 2]], [0.9, ("a", 1)]),
        ("tuple[int, ...]", [(1, 2, 3)], [("a",)]),
        ("dict[str, Any]", [{}, {"a": 1}], ["a", [1]]),
        ("Any", [1, "a", None, {}], []),
        ("object", [1, None], []),
        ("'int | None'", [1, None], ["1"]),
        ("Role", ["user"], ["usr"]),  # an alias in the module: Literal of roles
        ("LossOutput", [{"type": "X"}, "name"], []),  # a class: nothing certain
        ("Unheard", [1, "a", {}], []),
        ("Callable[[int], str]", ["registered_name", {"type": "f"}], [3]),
    ],
)
def test_mismatch(annotation, fits, misfits):
    for value in fits:
        assert mismatch(param(annotation), value) is None, value
    for value in misfits:
        assert mismatch(param(annotation), value) is not None, value


def test_default_always_fits():
    assert mismatch(param("int", default=None), None) is None
    assert mismatch(param("int", default=1), True) == "int"  # True equals 1 and is no number here


def test_number_in_quotes_without_annotation():
    assert mismatch(param("", default=1e-3), "1e-4") == "a number, without quotes"
    assert mismatch(param("", default=1e-3), "auto") is None


def test_description():
    node = ast.parse("Optional[Literal['a', 'b']]", mode="eval").body
    assert describe(node) == "one of 'a', 'b' or None"
