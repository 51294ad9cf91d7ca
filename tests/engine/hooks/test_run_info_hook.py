from tests.engine.hooks.toy_run import toy_loader, train
from xtuner_lite.version import __version__


def test_what_the_message_hub_knows(tmp_path):
    runner, outputs = train(
        tmp_path, {"runtime_info": {"type": "RunInfoHook"}}, val_dataloader=toy_loader(size=4)
    )
    hub = runner.message_hub
    assert hub.get_info("seed") == 1
    assert hub.get_info("xtuner_lite_version") == __version__
    assert hub.get_info("max_iters") == 6
    assert hub.get_info("iter") == 5  # 0-based, as MMEngine's
    assert hub.get_info("cfg") is None
    losses, _ = hub.get_scalar("train/loss").data
    assert losses.tolist() == [step["loss"] for step in outputs.steps]
    assert len(hub.get_scalar("train/lr").data[0]) == 6
    assert len(hub.get_scalar("val/loss").data[0]) == 2
