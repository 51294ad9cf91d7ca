"""Training state survives JSON + safetensors with its types, and nothing else gets in."""

import math
import random

import numpy as np
import pytest
import torch

from xtuner_lite.engine.distributed import load_random_state, random_state
from xtuner_lite.engine.state_io import load_state, save_state


def test_round_trip_keeps_values_and_types(tmp_path):
    state = {
        "none": None,
        "flag": True,
        "int": 3,
        "float": 0.1,
        "text": "甲",
        "bytes": b"\x00\xff",
        "tuple": (1, (2.5, "a")),
        "list": [1, {"x": torch.arange(3)}],
        "keys": {1: "a", (2, 3): torch.ones(2)},
        "array": np.array([1.5, 2.5]),
        "uint": np.array([7], dtype=np.uint32),
        "bf16": torch.tensor([1.5], dtype=torch.bfloat16),
        "scalar": torch.tensor(2.0),
        "inf": math.inf,
    }
    save_state(state, tmp_path, "s")
    loaded = load_state(tmp_path, "s")
    assert list(loaded) == list(state)
    for key in ("none", "flag", "int", "float", "text", "bytes", "tuple", "inf"):
        assert loaded[key] == state[key]
        assert type(loaded[key]) is type(state[key])
    assert torch.equal(loaded["list"][1]["x"], torch.arange(3))
    assert torch.equal(loaded["keys"][(2, 3)], torch.ones(2))
    assert loaded["array"].dtype == np.float64
    assert loaded["uint"].dtype == np.uint32
    assert loaded["bf16"].dtype == torch.bfloat16
    assert loaded["scalar"].shape == ()


def test_nan_comes_back(tmp_path):
    save_state({"x": math.nan}, tmp_path, "s")
    assert math.isnan(load_state(tmp_path, "s")["x"])


def test_an_object_is_refused_by_its_path(tmp_path):
    with pytest.raises(TypeError, match="holds a object at 's.hooks.Mine'"):
        save_state({"hooks": {"Mine": object()}}, tmp_path, "s")


def test_generators_continue_where_they_were(tmp_path):
    random.random(), np.random.rand(), torch.rand(1)
    save_state(random_state(), tmp_path, "r")
    expected = (random.random(), np.random.rand(), torch.rand(3))
    load_random_state(load_state(tmp_path, "r"))
    again = (random.random(), np.random.rand(), torch.rand(3))
    assert expected[:2] == again[:2]
    assert torch.equal(expected[2], again[2])
