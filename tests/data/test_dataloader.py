"""Reading by steps: the same batches from any start, with any number of workers."""

import time

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from xtuner_lite.data.dataloader import build_dataloader, rows_of_step


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


class Counting(Dataset):
    """Two million one-token samples; counts what is read."""

    def __init__(self, size=2_000_000):
        self.size, self.num_read = size, 0
        self.lengths = np.ones(size, dtype=np.int64)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.num_read += 1
        return {"index": index, "noise": 0.0, "labels": np.array([1]), "row_ids": [f"r{index}"]}


@pytest.mark.parametrize("sampler", ["EpochSampler", "LengthGroupedSampler"])
def test_resuming_at_sample_one_million_reads_no_skipped_sample(sampler):
    dataset = Counting()
    made = build_dataloader(
        dataset, 4, collate_fn=collate, accumulative_counts=2, sampler=dict(type=sampler)
    )
    begin = time.process_time()
    [step] = made.steps(125_000, 125_001)
    took_s = time.process_time() - begin
    assert dataset.num_read == 8
    indices = [i for micro in step for i in micro["index"]]
    assert indices == made.sampler.order(0)[1_000_000:1_000_008].tolist()
    assert took_s < 2  # seconds of this process, whatever else the machine does


def test_the_rows_of_a_step_are_those_it_trains():
    made = loader(accumulative_counts=2)
    for number, step in enumerate(made.steps(0, 6)):
        trained = [f"r{i}" for micro in step for i in micro["index"]]
        assert rows_of_step(made, number) == trained
    noise = [sample["noise"] for _, sample in made.samples_of_step(4)]
    assert noise == [n for micro in next(made.steps(4, 5)) for n in micro["noise"]]


def test_the_rows_of_a_step_are_those_of_all_ranks():
    ranks = [loader(rank=rank, world_size=2) for rank in range(2)]
    rows = [f"r{i}" for one in ranks for micro in next(one.steps(1, 2)) for i in micro["index"]]
    assert sorted(rows) == sorted(rows_of_step(ranks[0], 1))


class Texts(Dataset):
    """What a first try of a data set looks like."""

    def __init__(self, broken=False):
        self.broken = broken

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return {"text": "hello"}["txt" if self.broken else "text"] and {"text": "hello"}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_data_set_of_the_wrong_form_is_told_with_its_sample_and_keys(num_workers):
    made = build_dataloader(Texts(), shuffle=False, num_workers=num_workers)
    message = "sample 1 of the data set cannot be used: it has the keys text; missing: input_ids"
    with pytest.raises(ValueError, match=message):
        list(made.steps(1, 2))


def test_an_error_in_a_data_set_or_a_collator_names_the_sample():
    made = build_dataloader(Texts(broken=True), shuffle=False)
    with pytest.raises(ValueError, match="reading sample 2 of Texts raised KeyError: 'txt'. Corr"):
        list(made.steps(2, 3))
    made = build_dataloader(Texts(), 2, shuffle=False, collate_fn=collate)
    with pytest.raises(ValueError, match="collate_fn raised KeyError: 'index' on the samples 2, 3"):
        list(made.steps(1, 2))
    made = build_dataloader(Texts(), collate_fn=collate, rank=1, world_size=4)
    with pytest.raises(ValueError, match="has no 'labels' to mask.*Set drop_last=True"):
        list(made.steps(1, 2))


class Tokens(Dataset):
    """Sample i has i + 1 tokens."""

    max_length = 16
    lengths = np.arange(1, 11)

    def __len__(self):
        return 10

    def __getitem__(self, index):
        ids = np.arange(1, index + 2)
        return {"input_ids": ids, "labels": ids, "lengths": [len(ids)], "row_ids": [f"t:{index}"]}


class Tokenizer:
    pad_token_id = 0


@pytest.mark.parametrize(
    ("collate_fn", "widths"),
    [
        (None, [2, 4, 6, 8, 10]),
        (dict(type="packed_collate", pad_to_multiple_of=8), [8, 8, 8, 8, 16]),
        (dict(type="packed_collate", pad_to_max_length=True), [16] * 5),
    ],
)
def test_padding_to_the_longest_to_a_multiple_and_to_max_length(collate_fn, widths):
    made = build_dataloader(
        Tokens(), 2, collate_fn=collate_fn, tokenizer=Tokenizer(), shuffle=False
    )
    assert [step[0]["input_ids"].shape[1] for step in made] == widths


def test_length_grouped_steps_need_less_padding():
    class Many(Tokens):
        lengths = np.random.default_rng(0).integers(1, 200, 1000)

        def __len__(self):
            return 1000

    def padded(sampler):
        made = build_dataloader(
            Many(), 4, collate_fn=collate, accumulative_counts=2, sampler=dict(type=sampler)
        )
        micro = [m for s in range(len(made)) for m in made.plan.micro_batches(s)]
        sizes = [Many.lengths[[t.index for t in tickets]] for tickets in micro]
        return sum(len(size) * size.max() - size.sum() for size in sizes) / Many.lengths.sum()

    assert padded("LengthGroupedSampler") < 0.05 < 0.4 < padded("EpochSampler")
