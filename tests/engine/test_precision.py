"""What is stored in which dtype."""

import pytest
import torch
from torch import nn

from xtuner_lite.engine.precision import Precision, parse_dtype


def test_what_trains_is_float32_and_what_is_frozen_is_small():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2)).to(torch.bfloat16)
    net[0].requires_grad_(False)
    net[2].running_mean = torch.zeros(2)
    Precision("bf16").prepare(net)
    assert net[0].weight.dtype == torch.bfloat16
    assert net[1].weight.dtype == torch.float32
    assert net[2].running_mean.dtype == torch.float32


def test_integer_parameters_stay():
    net = nn.Module()
    net.packed = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    Precision("fp16").prepare(net)
    assert net.packed.dtype == torch.uint8


def test_autocast_computes_in_the_compute_dtype():
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        with Precision(name).autocast():
            assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


def test_only_fp16_scales_the_loss():
    assert Precision("bf16").scaler is None
    assert Precision("fp16").scaler.get_scale() == 65536
    assert Precision("fp16", loss_scale=8).scaler.get_scale() == 8


def test_names():
    assert parse_dtype("bfloat16") is parse_dtype(torch.bfloat16) is torch.bfloat16
    with pytest.raises(ValueError, match="dtype 'int8' is not known; allowed: auto, bf16"):
        parse_dtype("int8")


def test_auto_takes_what_the_device_computes(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert Precision("auto").dtype == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert Precision("auto").dtype == torch.float32
    assert Precision("auto").reason == "this CPU has no bf16 instructions"
