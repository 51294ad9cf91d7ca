import re
from types import SimpleNamespace

import pytest
import torch

from tests.engine.hooks.toy_run import log_text, train
from xtuner_lite.engine.hooks.throughput_hook import ThroughputHook, peak_memory_bytes


def test_speeds_fit_together(tmp_path):
    runner, outputs = train(tmp_path, {"throughput": {"type": "ThroughputHook"}})
    for step in outputs.steps:
        assert step["tokens_per_s"] == pytest.approx(step["num_tokens"] / step["step_time_s"])
        assert step["units_per_s"] == pytest.approx(step["num_units"] / step["step_time_s"])
        assert step["peak_memory_bytes"] > 10 * 2**20
    history, _ = runner.message_hub.get_scalar("train/tokens_per_s").data
    assert history.tolist() == [step["tokens_per_s"] for step in outputs.steps]
    # 6 steps of 2 x 2 samples, a token and a unit each.
    assert re.search(
        r"trained 6 steps, 24 tokens, 24 units of the loss in 0:00:0", log_text(runner)
    )


def test_the_wait_for_data_is_counted():
    runner = SimpleNamespace(
        train_loop=SimpleNamespace(data_time_s=3.0),
        message_hub=SimpleNamespace(update_scalar=lambda name, value: None),
    )
    hook, outputs = ThroughputHook(), {"num_tokens": 8, "num_units": 4.0}
    hook.before_train_iter(runner, 0)
    hook.after_train_iter(runner, 0, outputs=outputs)
    assert outputs["data_time_s"] == 3.0
    assert outputs["step_time_s"] > 3.0
    assert outputs["data_share"] > 0.9
    assert outputs["tokens_per_s"] < 8 / 3


def test_memory_is_in_bytes():
    before = peak_memory_bytes()
    block = torch.ones(before + 50 * 2**20, dtype=torch.uint8)  # more than the peak so far
    assert peak_memory_bytes() >= block.numel()
