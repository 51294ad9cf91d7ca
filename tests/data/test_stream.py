"""Streams: every row once a pass, the same samples from anywhere on, changes of the data seen."""

import json

import pytest

from tests.tiny import tiny_tokenizer
from xtuner_lite.data.cache import SourceChanged
from xtuner_lite.data.dataloader import build_dataloader
from xtuner_lite.data.dataset import ChatDataset
from xtuner_lite.data.stream import StreamDataset


def write(file, numbers, words=3):
    rows = [{"instruction": f"{n}?", "output": "word " * (n % 7 + words)} for n in numbers]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


@pytest.fixture
def files(tmp_path):
    return [write(tmp_path / "a.jsonl", range(25)), write(tmp_path / "b.jsonl", range(25, 40))]


def make(data, cache=False, **options):
    options = {"max_length": 64, "window_rows": 10, **options}
    return StreamDataset(data, tokenizer=tiny_tokenizer(), cache=cache, **options)


def ids(samples):
    return [sample["input_ids"].tolist() for sample in samples]


def samples_of_a_pass(stream, num_rows):
    """Samples until every row was seen once, counted by segments."""
    samples, seen = [], 0
    while seen < num_rows:
        samples.append(stream[len(samples)])
        seen += len(samples[-1]["lengths"])
    assert seen == num_rows
    return samples


def test_every_row_once_a_pass_and_then_again(files):
    stream = make(files)
    samples = samples_of_a_pass(stream, 40)
    rows = sorted(row for sample in samples for row in sample["row_ids"])
    assert rows == sorted(row for sample in ChatDataset(files, tokenizer=tiny_tokenizer())
                          for row in sample["row_ids"])  # fmt: skip
    again = [stream[len(samples) + n] for n in range(len(samples))]
    assert sorted(row for sample in again for row in sample["row_ids"]) == rows
    assert ids(again) != ids(samples)  # another order
    assert sorted(ids(again)) == sorted(ids(samples))
    plain = make(files, shuffle=False, packing="none")
    assert [plain[n]["row_ids"][0] for n in (0, 24, 25, 39, 40)] == [
        f"{files[0]}:1", f"{files[0]}:25", f"{files[1]}:1", f"{files[1]}:15", f"{files[0]}:1",
    ]  # fmt: skip


@pytest.mark.parametrize("kept", [True, False])
def test_any_sample_is_the_same_whatever_was_read_before(files, tmp_path, kept, monkeypatch):
    cache = str(tmp_path / "c") if kept else False
    whole = make(files, cache)
    samples = [whole[n] for n in range(30)]
    reads = []
    monkeypatch.setattr(StreamDataset, "_read", lambda self, begin, read=StreamDataset._read:
                        reads.append(begin) or read(self, begin))  # fmt: skip
    resumed = make(files, cache)
    assert resumed[29]["input_ids"].tolist() == samples[29]["input_ids"].tolist()
    assert resumed[29]["row_ids"] == samples[29]["row_ids"]
    if kept:  # the first window, for its ledger, and the one it needs
        assert len(reads) == 2
    assert ids(resumed[n] for n in range(30)) == ids(samples)


def test_the_loader_reads_it_alike_with_workers_ranks_and_after_a_resume(files, tmp_path):
    def loader(**options):
        dataset = make(files, str(tmp_path / "c"))
        tokenizer = tiny_tokenizer()
        return build_dataloader(dataset, 1, tokenizer=tokenizer, seed=3, **options)

    steps = list(loader(accumulative_counts=2).steps(0, 6))
    rows = [[batch["row_ids"] for batch in step] for step in steps]
    resumed = loader(accumulative_counts=2, num_workers=1).steps(4, 6)
    assert [[batch["row_ids"] for batch in step] for step in resumed] == rows[4:]
    ranks = [list(loader(rank=rank, world_size=2).steps(0, 6)) for rank in (0, 1)]
    for step in range(6):
        assert [ranks[r][step][0]["row_ids"] for r in (0, 1)] == rows[step]
    assert loader().endless
    assert loader().order_digest == loader().order_digest
    with pytest.raises(ValueError, match="a stream cannot be read to its end"):
        iter(loader())


def test_a_stream_has_steps_and_no_epochs(files):
    from xtuner_lite.runner.loops import TrainLoop

    loader = build_dataloader(make(files), 1, tokenizer=tiny_tokenizer())
    assert TrainLoop(None, loader, max_iters=7).max_epochs == 1
    with pytest.raises(ValueError, match="max_epochs=2, and the training data is a stream.*max_it"):
        TrainLoop(None, loader, max_epochs=2)
    with pytest.raises(TypeError):
        len(make(files))


def test_bad_rows_and_empty_windows(tmp_path):
    file = tmp_path / "a.jsonl"
    good = json.dumps({"instruction": "a", "output": "b"})
    file.write_text("\n".join([good, *["{oops"] * 5, good]))
    stream = make(str(file), window_rows=2, on_bad_row="skip", packing="none", shuffle=False)
    assert [stream[n]["row_ids"][0][-2:] for n in range(4)] == [":1", ":7", ":1", ":7"]
    assert stream.ledger.skipped["bad row"].count == 1
    assert stream.ledger.notes[-1] == "a stream: these are its first 2 rows"
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not valid JSON"):
        make(str(file), window_rows=2)
    later = make(str(file), window_rows=1)
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not valid JSON"):
        later[1]
    file.write_text("\n".join(["{oops"] * 5))
    with pytest.raises(ValueError, match="none of the first 5 rows can be read"):
        make(str(file), on_bad_row="skip")
    with pytest.raises(ValueError, match="nothing is supervised"):
        make(str(file), map_fn="alpaca", on_bad_row="skip")


def test_data_that_change_are_seen(files, tmp_path):
    first = make(files)
    write(tmp_path / "b.jsonl", range(25, 41))
    with pytest.raises(SourceChanged, match=r"b\.jsonl changed while it was streamed"):
        [first[n] for n in range(20)]
    assert make(files).fingerprint != first.fingerprint


def test_a_change_that_the_ends_of_a_file_do_not_show(tmp_path, monkeypatch):
    monkeypatch.setattr("xtuner_lite.data.windows._EDGE", 16)
    file = write(tmp_path / "a.jsonl", range(40))
    stream = make(file, str(tmp_path / "c"))
    [stream[n] for n in range(12)]
    text = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(text.replace("15?", "51?"))
    resumed = make(file, str(tmp_path / "c"))
    with pytest.raises(SourceChanged, match="window 1 .from row 11 of .* the data changed"):
        [resumed[n] for n in range(12)]


def test_a_list_of_windows_cut_off_by_a_kill(files, tmp_path):
    cache = tmp_path / "c"
    stream = make(files, str(cache))
    samples = [stream[n] for n in range(12)]
    (log,) = (cache / "streams").glob("*.jsonl")
    log.write_bytes(log.read_bytes()[:-20])
    again = make(files, str(cache))
    assert ids(again[n] for n in range(12)) == ids(samples)
    assert log.read_bytes().endswith(b"\n")


def test_text_and_options(tmp_path):
    (tmp_path / "a.txt").write_text("one two three\nfour five\n" * 8)
    stream = make(str(tmp_path / "a.txt"), packing="concat", max_length=16)
    assert len(stream[0]["input_ids"]) <= 16
    assert stream.ledger.fill > 0.75
    with pytest.raises(ValueError, match="window_rows=0 is too small"):
        make(str(tmp_path / "a.txt"), window_rows=0)
    with pytest.raises(IndexError, match="they start at 0"):
        stream[-1]


def test_rows_in_memory_and_streamed_hub_data():
    datasets = pytest.importorskip("datasets")
    rows = [{"instruction": str(n), "output": "b"} for n in range(12)]
    expected = ids(make(rows)[n] for n in range(8))
    streamed = datasets.Dataset.from_list(rows).to_iterable_dataset()
    assert ids(make(streamed)[n] for n in range(8)) == expected
