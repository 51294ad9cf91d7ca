"""Modes put everything back."""

import torch

from tests.tiny import tiny_llama
from xtuner_lite.models.modes import evaluating, without_progress_bars


def test_evaluating_restores_each_modules_own_mode():
    model = tiny_llama()
    model.model.norm.eval()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert [n for n, m in model.named_modules() if not m.training] == ["model.norm"]


def test_evaluating_under_autocast_cuts_no_gradient():
    linear = torch.nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        with evaluating(linear):
            linear(torch.ones(1, 4))
        linear(torch.ones(1, 4)).sum().backward()
    assert linear.weight.grad is not None


def test_without_progress_bars():
    from transformers.utils import logging

    assert logging.is_progress_bar_enabled()
    with without_progress_bars():
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled()
