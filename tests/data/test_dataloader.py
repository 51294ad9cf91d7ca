"""Reading by steps: the same batches from any start, with any number of workers."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from xtuner_lite.data.dataloader import build_dataloader


class NoisyNumbers(Dataset):
    """Sample i holds i and a random number; remembers which were read."""

    def __init__(self, size):
        self.size, self.read = size, []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.read.append(index)
        noise = float(torch.rand(1)) + float(np.random.rand())
        return {
            "index": index,
            "noise": noise,
            "labels": np.array([1, 2]),
            "row_ids": [f"r{index}"],
        }


def collate(samples):
    return {
        "index": [s["index"] for s in samples],
        "noise": [s["noise"] for s in samples],
        "labels": [s["labels"].tolist() for s in samples],
    }


def loader(size=10, **kwargs):
    return build_dataloader(
        NoisyNumbers(size), collate_fn=collate, **{"batch_size": 2, "seed": 5, **kwargs}
    )


def test_steps_hold_their_micro_batches():
    steps = list(loader(accumulative_counts=2).steps(0, 3))
    assert [len(step) for step in steps] == [2, 2, 1]
    assert sorted(i for step in steps for micro in step for i in micro["index"]) == list(range(10))


def test_starting_late_reads_nothing_before_and_draws_the_same_noise():
    whole = list(loader().steps(0, 12))
    late = loader()
    rest = list(late.steps(7, 12))
    assert rest == whole[7:]
    assert len(late.dataset.read) == 10


def test_workers_change_nothing():
    assert list(loader(num_workers=2).steps(3, 9)) == list(loader().steps(3, 9))


def test_reading_does_not_move_the_global_generator():
    before = torch.get_rng_state()
    list(loader().steps(0, 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_filler_teaches_nothing():
    steps = list(loader(size=1, batch_size=1, rank=1, world_size=2).steps(0, 1))
    assert steps[0][0]["labels"] == [[-100, -100]]


def test_drop_last_with_too_little_data_is_refused():
    with pytest.raises(
        ValueError,
        match=r"drop_last=True leaves no step: the data set has 3 samples and one step takes 4",
    ):
        loader(size=3, drop_last=True, accumulative_counts=2)


def test_a_batch_size_of_zero_is_refused():
    with pytest.raises(ValueError, match="batch_size is 0"):
        loader(batch_size=0)
