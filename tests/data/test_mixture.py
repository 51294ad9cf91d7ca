"""Mixtures: what an epoch holds, by hand; losses per source; resume."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook

from tests.config.pages import write_page
from tests.tiny import tiny_llama, tiny_tokenizer
from xtuner_lite.config import check_config, load_config
from xtuner_lite.data.contract import DataContractError
from xtuner_lite.data.dataloader import build_dataloader, rows_of_step
from xtuner_lite.data.dataset import ChatDataset
from xtuner_lite.data.ledger import Ledger
from xtuner_lite.data.mixture import MixtureDataset, MixtureSource
from xtuner_lite.data.sampler import EpochSampler, LengthGroupedSampler
from xtuner_lite.engine.checkpoint import CheckpointError, list_checkpoints
from xtuner_lite.methods.functional import loss_of_sources
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.runner.runner import Runner


class Numbers:
    """Samples named after their data set; sample i has i + 1 tokens."""

    def __init__(self, name, size):
        self.name, self.size = name, size
        self.lengths = np.arange(1, size + 1)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        ids = np.arange(1, index + 2)
        row_ids = [f"{self.name}:{index}"]
        return {"input_ids": ids, "labels": ids, "lengths": [len(ids)], "row_ids": row_ids}


def mixture(*entries, **options):
    return MixtureDataset([dict(dataset=Numbers(*e[:2]), **e[2]) for e in entries], **options)


def epoch(mixed, number, seed=0, shuffle=True):
    order = EpochSampler(len(mixed), dataset=mixed, seed=seed, shuffle=shuffle).order(number)
    return [mixed[int(index)]["row_ids"][0] for index in order]


def counts(rows):
    return dict(Counter(row.split(":")[0] for row in rows))


def test_without_weights_each_source_is_passed_over_once():
    mixed = mixture(("a", 5, {}), ("b", 3, {}))
    for number in range(3):
        rows = epoch(mixed, number)
        assert sorted(rows) == [f"a:{i}" for i in range(5)] + [f"b:{i}" for i in range(3)]
    assert len(mixed) == mixed.samples_per_epoch == 8
    assert epoch(mixed, 0) != epoch(mixed, 1)
    assert epoch(mixed, 1) == epoch(mixed, 1)
    assert epoch(mixed, 1) != epoch(mixed, 1, seed=1)


def test_weights_by_hand():
    # 12 samples: 2/3 and 1/3 of 12 are 8 and 4.
    mixed = mixture(("a", 10, dict(weight=2)), ("b", 2, dict(weight=1)))
    assert mixed.samples_per_epoch == 12
    rows = epoch(mixed, 0)
    assert counts(rows) == {"a": 8, "b": 4}
    assert Counter(rows)["b:0"] == Counter(rows)["b:1"] == 2
    # Largest remainders: 10 * (0.5, 0.3, 0.2) is whole; of 9: 4.5, 2.7, 1.8 -> 4, 3, 2.
    entries = [(n, 4, dict(weight=w)) for n, w in (("a", 0.5), ("b", 0.3), ("c", 0.2))]
    assert counts(epoch(mixture(*entries, num_samples=10), 0)) == {"a": 5, "b": 3, "c": 2}
    assert counts(epoch(mixture(*entries, num_samples=9), 0)) == {"a": 4, "b": 3, "c": 2}


@pytest.mark.parametrize("options", [dict(weight=1), dict(repeat=0.3), dict(repeat=2.6), dict()])
@pytest.mark.parametrize("cap", [None, 4])
def test_no_sample_comes_again_before_all_came(options, cap):
    other = dict(weight=3) if "weight" in options else {}
    mixed = mixture(("a", 7, dict(**options, cap=cap)), ("b", 11, other))
    seen = Counter()
    for number in range(9):
        for row in epoch(mixed, number, seed=4):
            if row.startswith("a"):
                seen[row] += 1
                assert seen[row] <= min((seen[f"a:{i}"] for i in kept(mixed)), default=0) + 1
    assert len(seen) == (cap or 7)


def kept(mixed):
    return mixed._subset(0, 4).tolist() if mixed._used[0] < 7 else range(7)


def test_repeat_and_cap_by_hand():
    mixed = mixture(("a", 10, dict(repeat=2)), ("b", 10, dict(cap=3)), ("c", 9, dict(repeat=1 / 3)))
    rows = epoch(mixed, 0)
    assert counts(rows) == {"a": 20, "b": 3, "c": 3}
    # The cap's choice stays, a fraction goes on through the rest.
    epochs = [set(epoch(mixed, number)) for number in range(3)]
    assert len({frozenset(r for r in e if r[0] == "b") for e in epochs}) == 1
    assert len({r for e in epochs for r in e if r[0] == "c"}) == 9


def test_without_shuffle_one_source_follows_the_other():
    mixed = mixture(("a", 2, dict(repeat=1.5)), ("b", 3, dict(cap=2)))
    for number in (0, 3):
        assert epoch(mixed, number, shuffle=False) == ["a:0", "a:1", "a:0", "b:0", "b:1"]


def test_sources_are_mixed_within_an_epoch():
    rows = epoch(mixture(("a", 500, {}), ("b", 500, {})), 0)
    # A fair shuffle puts 250 +- 11 of a into the first half.
    assert 200 < counts(rows[:500])["a"] < 300


def test_a_sample_names_its_source_and_a_data_set_may_stand_alone():
    mixed = MixtureDataset([Numbers("a", 2), dict(dataset=Numbers("x", 2), name="b")])
    assert mixed.source_names == ["a", "b"]
    assert mixed[3]["sources"] == [1]
    assert mixed[-4]["sources"] == [0]
    assert mixed[3]["source_names"] == ["a", "b"]
    assert mixed.lengths.tolist() == [1, 2, 1, 2]
    with pytest.raises(IndexError, match="sample 4 of a mixture that has 4"):
        mixed[4]


def test_length_groups_of_a_mixture():
    mixed = mixture(("a", 20, dict(repeat=0.5)), ("b", 6, {}))
    sampler = LengthGroupedSampler(len(mixed), dataset=mixed, group_size=4, seed=2)
    assert sampler.num_samples == 16
    plain = EpochSampler(len(mixed), dataset=mixed, seed=2)
    assert sorted(sampler.order(1).tolist()) == sorted(plain.order(1).tolist())


def test_steps_and_ranks_of_a_mixture():
    mixed = mixture(("a", 6, dict(weight=3)), ("b", 6, dict(weight=1)))
    options = dict(tokenizer=type("T", (), dict(pad_token_id=0)), seed=1)
    one = build_dataloader(mixed, 4, **options)
    two = build_dataloader(mixed, 2, world_size=2, **options)
    assert len(one) == len(two) == 3
    for step in range(6):
        assert sorted(rows_of_step(one, step)) == sorted(rows_of_step(two, step))
    batch = next(one.steps(1, 2))[0]
    sources = [row[0].split(":")[0] for row in batch["row_ids"]]
    real = batch["segment_sources"][batch["segment_sources"] >= 0].tolist()
    assert [batch["source_names"][i] for i in real] == sources


def test_resuming_a_large_mixture_reads_no_skipped_sample():
    class Large(Numbers):
        lengths, read = None, 0

        def __init__(self, name):
            self.name, self.size = name, 1_000_000

        def __getitem__(self, index):
            Large.read += 1
            return {**super().__getitem__(0), "row_ids": [f"{self.name}:{index}"]}

    mixed = MixtureDataset([dict(dataset=Large("a"), weight=1), dict(dataset=Large("b"), weight=2)])
    loader = build_dataloader(mixed, 8, tokenizer=type("T", (), dict(pad_token_id=0)))
    next(loader.steps(125_000, 125_001))
    assert Large.read == 8


@pytest.mark.parametrize(
    ("datasets", "options", "message"),
    [
        ([], {}, r"datasets=\[\]; allowed: a list of one or more"),
        ([dict(dataset=Numbers("a", 2), wieght=1)], {}, "no key 'wieght'; did you mean 'weight'"),
        ([dict(weight=1)], {}, "has the keys weight and no 'dataset'; add dataset="),
        ([dict(dataset=Numbers("a", 2), weight=0)], {}, "weight=0; allowed: a number above 0"),
        ([dict(dataset=Numbers("a", 2), cap=1.5)], {}, "cap=1.5; allowed: an integer number above"),
        ([dict(dataset=Numbers("a", 2), weight=1), Numbers("b", 2)], {},
         "data sets 1 of the mixture .* have no weight and the others do"),
        ([dict(dataset=Numbers("a", 2), weight=1, repeat=2)], {}, "has weights and repeat"),
        ([Numbers("a", 2)], dict(num_samples=3), "num_samples=3 sets the length of an epoch"),
        ([Numbers("d/a", 2), Numbers("a", 2)], {}, "are called 'a'; their losses could not be"),
        ([Numbers("a", 0)], {}, "data set 0 of the mixture .* is empty"),
        ([MixtureDataset([Numbers("a", 2)])], {}, "data set 0 .* is a mixture itself"),
        ([iter([1])], {}, "data set 0 .*, a list_iterator, is a stream"),
        ([dict(dataset=Numbers("a", 9), weight=99), dict(dataset=Numbers("b", 1), weight=1)], {},
         "b would get no sample of an epoch of 10; raise its weight"),
    ],
)  # fmt: skip
def test_wrong_mixtures(datasets, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        MixtureDataset(datasets, **options)


# ---------------------------------------------------------------- real data sets


def rows(word, num):
    return [{"instruction": f"Say {i}.", "output": f"{word} " * (1 + i % 5)} for i in range(num)]


SOURCES = [
    dict(dataset=dict(type=ChatDataset, data=rows("yes", 12), max_length=48), weight=2, name="yes"),
    dict(
        dataset=dict(
            type=ChatDataset,
            data=[{"q": "a", "a": f"no {i}"} for i in range(9)],
            map_fn=lambda row: {"messages": [dict(role="user", content=row["q"]),
                                             dict(role="assistant", content=row["a"])]},
            template="default", max_length=48, packing="none",
        ),
        weight=1, name="no",
    ),
]  # fmt: skip


def test_each_source_has_its_own_map_function_and_template_and_ledger():
    tokenizer = tiny_tokenizer()
    mixed = MixtureDataset(SOURCES, tokenizer=tokenizer)
    texts = {
        name: tokenizer.decode(mixed[index]["input_ids"])
        for name, index in (("yes", 0), ("no", len(mixed) - 1))
    }
    assert "<|im_start|>user\nSay 0." in texts["yes"]
    assert "no 8" in texts["no"]
    assert "<|im_start|>" not in texts["no"]
    assert tokenizer.chat_template == tiny_tokenizer().chat_template, "the run's own is untouched"
    ledger = mixed.ledger
    assert (ledger.rows_read, ledger.rows_kept) == (21, 21)
    assert [part.rows_kept for part in ledger.parts] == [12, 9]
    assert ledger.tokens_supervised == sum(p.tokens_supervised for p in ledger.parts)
    report = ledger.report()
    assert "yes: 13 of the 19 samples of an epoch (68.4%), 1.30 passes over its 10" in report
    assert report.startswith("yes: what each row teaches")
    assert json.loads(json.dumps(ledger.to_dict()))["parts"][1]["rows_kept"] == 9
    with pytest.raises(DataContractError, match="mixture breaks the data_contract.*\n.*min_superv"):
        MixtureDataset(SOURCES, tokenizer=tokenizer, data_contract=dict(min_supervised=0.99))


def test_the_fingerprint_knows_the_sources_and_the_counts():
    def fingerprint(*entries):
        return mixture(*entries).fingerprint

    base = fingerprint(("a", 4, {}), ("b", 3, {}))
    assert base == fingerprint(("a", 4, {}), ("b", 3, {}))
    assert base != fingerprint(("a", 4, {}), ("b", 4, {}))
    assert base != fingerprint(("a", 4, {}), ("b", 3, dict(repeat=2)))
    assert base != fingerprint(("a", 4, {}), ("b", 3, dict(cap=2)))


def test_loss_of_sources_by_hand():
    # Segments of 3, 2 and 2 tokens, of the sources 1, 0 and 1; padding behind them.
    batch = dict(
        cu_seqlens=torch.tensor([0, 3, 5, 7, 9], dtype=torch.int32),
        segment_sources=torch.tensor([1, 0, 1, -1]),
    )
    losses, at = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 1, 3, 5])
    sums, targets = loss_of_sources(losses, at, None, batch, 3)
    assert (sums.tolist(), targets.tolist()) == ([4.0, 11.0, 0.0], [1.0, 3.0, 0.0])
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0])
    sums, targets = loss_of_sources(losses, at, weights, batch, 3)
    assert (sums.tolist(), targets.tolist()) == ([8.0, 10.0, 0.0], [2.0, 2.5, 0.0])


def loader_of(datasets, batch_size=5):
    mixed = MixtureDataset(datasets, tokenizer=tiny_tokenizer())
    return build_dataloader(mixed, batch_size, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("head", ["chunked", "model"])
def test_the_losses_of_the_sources_are_those_of_their_samples_alone(head):
    method = SupervisedFinetune(tiny_llama(), head=head, self_check=False, head_chunk_tokens=7)
    batch = next(loader_of(SOURCES).steps(0, 1))[0]
    output = method(batch)
    pairs = {n.removeprefix("loss/"): p for n, p in output.metrics.items() if "loss/" in n}
    assert set(pairs) == {"yes", "no"}
    total = sum(pair[0] for pair in pairs.values())
    torch.testing.assert_close(total, output.loss_sum.detach())
    assert sum(float(pair[1]) for pair in pairs.values()) == output.num_units
    # Labels of one source alone give its loss.
    for number, name in enumerate(batch["source_names"]):
        segments = batch["segment_sources"].repeat_interleave(batch["cu_seqlens"].diff())
        labels = batch["labels"].clone()
        labels[(segments != number).reshape(labels.shape)] = -100
        alone = method({**batch, "labels": labels})
        torch.testing.assert_close(pairs[name][0], alone.loss_sum.detach())
        assert float(pairs[name][1]) == alone.num_units


class Losses(Hook):
    priority = "HIGHEST"

    def __init__(self, stop_after=None):
        self.stop_after, self.steps, self.val = stop_after, [], None

    def after_val_epoch(self, runner, metrics=None):
        self.val = metrics

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        seen = [row for batch in data_batch for sample in batch["row_ids"] for row in sample]
        self.steps.append((outputs["loss"], seen, dict(outputs)))
        if runner.iter + 1 == self.stop_after:
            runner.train_loop.stop_training = True


def run(work_dir, stop_after=None, resume=False, val=None, **loader):
    losses = Losses(stop_after)
    runner = Runner(
        model=SupervisedFinetune(tiny_llama(attention_dropout=0.1), self_check=False),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=dict(type="MixtureDataset", datasets=SOURCES), batch_size=2, **loader
        ),
        val_dataloader=val and dict(dataset=dict(type="ConcatDataset", datasets=SOURCES)),
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=1e-2), dtype="fp32", accumulative_counts=2
        ),
        train_cfg=dict(max_iters=9, val_interval=9),
        randomness=dict(seed=3),
        default_hooks=dict(dataset_preview=None, loss_curve=None, trainability=None),
        custom_hooks=[losses],
        resume=resume,
        log_level="ERROR",
    )
    runner.tokenizer = tiny_tokenizer()
    runner.train()
    return runner, losses.steps, losses.val


@pytest.mark.parametrize("sampler", ["EpochSampler", "LengthGroupedSampler"])
def test_a_resumed_mixture_is_bit_identical(tmp_path, sampler):
    # 15 samples, 4 a step: 4 steps an epoch; the run stops and goes on inside the second epoch.
    options = dict(sampler=dict(type=sampler))
    whole, expected, _ = run(tmp_path / "whole", **options)
    _, first, _ = run(tmp_path / "cut", stop_after=6, **options)
    torch.manual_seed(99)
    resumed, rest, _ = run(tmp_path / "cut", resume=True, **options)
    assert first + rest == expected
    for (name, one), two in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values()
    ):
        assert torch.equal(one, two), name


def test_the_log_has_a_loss_per_source_and_the_checkpoint_the_ledger(tmp_path):
    runner, steps, validation = run(tmp_path, val=True)
    for _, _, outputs in steps:
        units = {n: outputs[f"units/{n}"] for n in ("yes", "no") if f"units/{n}" in outputs}
        assert sum(units.values()) == outputs["num_units"]
        parts = sum(outputs[f"loss/{n}"] * count for n, count in units.items())
        assert parts / outputs["num_units"] == pytest.approx(outputs["loss"], rel=1e-5)
        assert all(f"loss/{n}" not in outputs for n in {"yes", "no"} - set(units))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("loss/no" in line and "units/no" in line for line in lines)
    assert {"loss", "loss/yes", "loss/no"} <= set(validation)
    [stored] = runner.log_dir.glob("train_dataloader_ledger.json")
    [checkpoint] = list_checkpoints(tmp_path)[-1:]
    [kept_ledger] = checkpoint.rglob("ledger.json")
    for file in (stored, kept_ledger):
        assert (
            Ledger.from_dict(json.loads(file.read_text())) == runner.train_dataloader.dataset.ledger
        )


def test_a_resume_with_another_order_is_refused(tmp_path):
    run(tmp_path, stop_after=2)
    with pytest.raises(CheckpointError, match="the order of the samples"):
        run(tmp_path, resume=True, sampler=dict(type="LengthGroupedSampler"))


# ---------------------------------------------------------------- config

PAGE = """dataset=dict(
        type="MixtureDataset",
        datasets=[
            dict(dataset=dict(type=ChatDataset, data="a.json", max_length=max_length), weight=0.7),
            dict(dataset=dict(type="ChatDataset", data="b.json"), weight=0.3, name="b"),
        ],"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("weight=0.7", "weight=0.7, cap=10", None),
        ("weight=0.7", "wieght=0.7", "MixtureSource has no option 'wieght'; did you mean 'weight'"),
        ("weight=0.3", "weight='0.3'", "got '0.3' .str.; allowed: float or None"),
        ('data="b.json"', 'dta="b.json"', "ChatDataset has no option 'dta'"),
        ('dict(dataset=dict(type="ChatDataset", data="b.json"), ', "dict(",
         "MixtureSource needs 'dataset'"),
    ],
)  # fmt: skip
def test_a_config_of_a_mixture_is_checked(tmp_path, old, new, message):
    text = PAGE.replace(old, new)
    start = 'dataset=dict(\n        type=ChatDataset,\n        data="data/rows.json",\n'
    page = write_page(tmp_path, (start + "        max_length=max_length,", text))
    problems = " | ".join(str(problem) for problem in check_config(load_config(page)))
    if message is None:
        assert not problems
    else:
        pytest.raises(ValueError, _raise, problems).match(message)


def _raise(text):
    raise ValueError(text)


def test_repeat_dataset_is_a_mixture_of_one():
    from xtuner_lite.registry import DATASETS

    mixed = DATASETS.build(dict(type="RepeatDataset", dataset=Numbers("a", 4), times=2.5))
    assert isinstance(mixed, MixtureDataset)
    assert counts(epoch(mixed, 0)) == {"a": 10}
    assert MixtureSource(Numbers("a", 1)).weight is None


def test_workers_change_nothing_in_a_mixture():
    def read(num_workers):
        mixed = mixture(("a", 6, dict(weight=3)), ("b", 6, dict(weight=1)))
        tokenizer = type("T", (), dict(pad_token_id=0))
        loader = build_dataloader(mixed, 2, num_workers=num_workers, tokenizer=tokenizer, seed=1)
        batches = [batch for step in loader.steps(4, 9) for batch in step]
        return [(b["row_ids"], b["segment_sources"].tolist(), b["source_names"]) for b in batches]

    assert read(2) == read(0)
