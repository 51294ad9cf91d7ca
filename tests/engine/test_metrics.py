"""Validation metrics by hand."""

import math

import pytest
import torch

from xtuner_lite.engine.metrics import MeanLoss, Perplexity
from xtuner_lite.structures import LossOutput


def fed(metric, *outputs):
    metric.reset()
    for output in outputs:
        metric.update({}, output)
    return metric.compute(lambda value: value)


def test_the_mean_is_over_units_not_batches():
    # 3 tokens of 1 nat and 1 token of 5 nats: (3 + 5) / 4.
    outputs = LossOutput(torch.tensor(3.0), 3), LossOutput(torch.tensor(5.0), 1)
    assert fed(MeanLoss(), *outputs) == {"loss": 2.0}
    assert fed(Perplexity(), *outputs) == {"perplexity": pytest.approx(math.exp(2))}


def test_metrics_of_the_method_keep_their_own_count():
    outputs = (
        LossOutput(
            torch.tensor(1.0), 2, {"hits": torch.tensor(1.0), "share": (torch.tensor(3.0), 4)}
        ),
        LossOutput(
            torch.tensor(1.0), 2, {"hits": torch.tensor(2.0), "share": (torch.tensor(1.0), 4)}
        ),
    )
    assert fed(MeanLoss(), *outputs) == {"loss": 0.5, "hits": 0.75, "share": 0.5}


def test_nothing_supervised_is_an_error():
    with pytest.raises(ValueError, match="the validation set has no supervised token"):
        fed(MeanLoss(), LossOutput(torch.tensor(0.0), 0))
