"""Context managers that change how a model runs for a while and put everything back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no graph inside; each module's own train or eval mode afterwards.

    Also drops autocast's cache of cast weights on the way out: casts made without a graph would
    otherwise cut the gradient of the next training forward under the same autocast.
    """
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in was_training:
            module.training = True
        torch.clear_autocast_cache()


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Silences transformers' bars for loading and saving, which a log file cannot show."""
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()
