"""Words of --cfg-options: literals, and setting by path."""

from __future__ import annotations

import math

import pytest

from xtuner_lite.config import ConfigError
from xtuner_lite.config.options import parse_option, parse_value, set_path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("1e-4", 1e-4),
        ("-3.5", -3.5),
        ("true", True),
        ("False", False),
        ("none", None),
        ("null", None),
        ("bf16", "bf16"),
        ("'1'", "1"),
        ("[1, 'a', None]", [1, "a", None]),
        ("(0.9, 0.95)", (0.9, 0.95)),
        ("{'max_iters': 3}", {"max_iters": 3}),
        ("a/b c=d", "a/b c=d"),
        ("", ""),
        ("inf", math.inf),
        ("0123", "0123"),
        ("__import__('os').getcwd()", "__import__('os').getcwd()"),  # text, never run
    ],
)
def test_value(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_option_splits_at_the_first_equals_sign():
    assert parse_option("a.0.b=x=y") == (("a", 0, "b"), "x=y")


@pytest.mark.parametrize("text", ["a", "=1", "a..b=1", ".a=1"])
def test_option_that_is_none(text):
    with pytest.raises(ConfigError, match="is not KEY=VALUE"):
        parse_option(text)


def test_set_path():
    root = {"a": [{"b": 1}], "betas": (0.9, 0.999), "keys": {"0": "x"}}
    set_path(root, ("a", 0, "c"), 2)
    set_path(root, ("betas", 1), 0.95)
    set_path(root, ("keys", 0), "y")
    assert root == {"a": [{"b": 1, "c": 2}], "betas": (0.9, 0.95), "keys": {"0": "y"}}


def test_set_path_refuses_an_index_outside():
    with pytest.raises(ConfigError, match="no item 2: a is a list; it has 1 items, so 0 to 0"):
        set_path({"a": [1]}, ("a", 2), 0)
