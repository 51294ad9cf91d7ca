"""LLaVA under the Runner: exact resume, load_from, and several ranks of which one has no images."""

import pytest
import torch

from tests.methods.llava_runs import losses_of_runs, train
from tests.ranks import run_ranks
from xtuner_lite.engine.checkpoint import list_checkpoints
from xtuner_lite.models.image_text import load_image_text_model
from xtuner_lite.runner.persistence import frozen_digest

ZERO3 = dict(type="DeepSpeed", config="zero3")


@pytest.mark.parametrize("kind", ["one", "two", "whole"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, kind):
    whole, losses = train(tmp_path / "whole", kind)
    _, first = train(tmp_path / "cut", kind, stop_after=4)
    again, rest = train(tmp_path / "cut", kind, resume=True)
    assert first[:3] == losses[:3]
    assert (first + rest)[-2:] == losses[-2:]
    assert len(rest) in (2, 3)
    assert losses[-1] < losses[0]
    mine, theirs = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    # The checkpoint holds what the run holds, and a run started from it begins there.
    last = list_checkpoints(tmp_path / "cut")[-1]
    names = {path.name for path in last.iterdir()}
    assert ("llava.json" in names) == (kind != "whole")
    begun, _ = train(tmp_path / "begun", kind, load_from=str(last), max_iters=1)
    assert begun.model.projector.linear_1.weight.shape == (32, 16)
    before = frozen_digest(whole.model)
    assert frozen_digest(begun.model) == before


def test_stage_two_begins_with_stage_ones_projector(tmp_path):
    one, _ = train(tmp_path / "one", "one", max_iters=3)
    last = list_checkpoints(tmp_path / "one")[-1]
    two, _ = train(
        tmp_path / "two", "two", load_from=str(last), max_iters=1,
        optim_wrapper=dict(
            optimizer=dict(type="SGD", lr=0.0), dtype="fp32", accumulative_counts=2
        ),
    )  # fmt: skip
    ours, theirs = one.model.projector.state_dict(), two.model.projector.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_pickled_projector_of_xtuner_is_loaded_when_it_is_allowed(tmp_path):
    weights = {
        "projector.model.0.weight": torch.ones(32, 16), "projector.model.0.bias": torch.ones(32),
        "projector.model.2.weight": torch.ones(32, 32), "projector.model.2.bias": torch.ones(32),
    }  # fmt: skip
    torch.save({"state_dict": weights}, tmp_path / "iter_3.pth")
    still = dict(optimizer=dict(type="SGD", lr=0.0), dtype="fp32", accumulative_counts=2)
    options = dict(load_from=str(tmp_path / "iter_3.pth"), max_iters=1, optim_wrapper=still)
    with pytest.raises(ValueError, match="allow_pth=True"):
        train(tmp_path / "asked", "two", **options)
    runner, _ = train(tmp_path / "allowed", "two", allow_pth=True, **options)
    assert torch.equal(runner.model.projector.linear_1.weight, torch.ones(32, 16))


def test_a_run_without_paths_says_what_its_folder_lacks(tmp_path):
    train(tmp_path, "one", max_iters=3)
    with pytest.raises(ValueError, match="does not say where llm lies"):
        load_image_text_model(list_checkpoints(tmp_path)[-1])


def test_two_ranks_one_without_images_equal_one_process(tmp_path):
    alone = [train(tmp_path / f"alone_{kind}", kind)[1] for kind in ("one", "towers", "whole")]
    runs = [
        (tmp_path / f"both_{kind}", kind, dict(strategy=dict(type="DDP")))
        for kind in ("one", "towers", "whole")
    ]
    both = run_ranks(losses_of_runs, runs)
    assert both[0] == both[1]
    for ours, theirs in zip(both[0], alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_fsdp2_with_one_rank_without_images_equals_one_process(tmp_path):
    alone = train(tmp_path / "alone", "towers")[1]
    runs = [(tmp_path / "both", "towers", dict(strategy=dict(type="FSDP2")))]
    assert run_ranks(losses_of_runs, runs)[0][0] == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_zero3_with_one_rank_without_images_equals_one_process(tmp_path):
    kinds = ("one", "towers", "whole")
    alone = [train(tmp_path / f"alone_{kind}", kind)[1] for kind in kinds]
    runs = [(tmp_path / f"both_{kind}", kind, dict(strategy=ZERO3)) for kind in kinds]
    both = run_ranks(losses_of_runs, runs, timeout_s=300)
    for ours, theirs in zip(both[0], alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    resumed = [(tmp_path / "both_towers", "towers", dict(strategy=ZERO3, resume=True, max_iters=7))]
    assert len(run_ranks(losses_of_runs, resumed, timeout_s=300)[0][0]) == 1
