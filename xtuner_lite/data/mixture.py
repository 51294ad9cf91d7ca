"""MixtureDataset: several data sets as one, with weights, repeats and caps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from xtuner_lite.data.contract import DataContract
from xtuner_lite.data.fingerprint import dataset_fingerprint
from xtuner_lite.data.ledger import Ledger
from xtuner_lite.registry import DATASETS
from xtuner_lite.suggestions import did_you_mean

# Last words of the keys that seed the orders, so that no two of them draw the same numbers.
_MIX, _PASS, _CAP = 101, 102, 103


@dataclass(frozen=True)
class MixtureSource:
    """One data set of a mixture, as an entry of ``datasets`` describes it.

    Args:
        dataset: a data set or its config, with its own map_fn, template, packing.
        weight: its share of an epoch's samples, relative to the others'. All sources or none.
        repeat: passes over it in an epoch, 1 by default; 0.5 takes the other half next time. Not
            with weights, which set the passes.
        cap: samples of it that are used at most, chosen at random once: the same in every epoch.
        name: in the log (``loss/<name>``) and the ledger; default is the data set's own.
    """

    dataset: Any
    weight: float | None = None
    repeat: float | None = None
    cap: int | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "repeat", "cap"):
            value = getattr(self, name)
            kinds = (int,) if name == "cap" else (int, float)
            if value is None or (
                isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < np.inf
            ):
                continue
            raise ValueError(
                f"a mixture's {name}={value!r}; allowed: a{'n integer' * (name == 'cap')} number "
                "above 0. To leave a data set out, take it out of datasets."
            )


@DATASETS.register_module(name=["MixtureDataset", "ConcatDataset"])
class MixtureDataset(Dataset):
    """Several data sets, shuffled into one; without weights, each is passed over once an epoch.

    The sources are packed one by one, so a sample (a pack, or a row with packing="none") is of one
    source, and weights, repeats and caps count such samples. With weights w an epoch has N samples,
    w[s] / sum(w) * N of source s, exactly (rounded to whole ones). A source is read pass by pass
    through all epochs, each pass in an order of its own: none of its samples comes a second time
    before all came once. Which samples an epoch has, and their order, is a function of
    (seed, epoch).

    Args:
        datasets: one per source: dict(dataset=..., weight=..., repeat=..., cap=..., name=...), see
            MixtureSource; or a data set or its config alone.
        tokenizer: given by the Runner, handed on to the sources.
        num_samples: samples of an epoch, with weights only; default: as many as the sources hold
            together (caps applied).
        data_contract: limits on the sum of the ledgers; a source may have limits of its own.
        name: of the sum in the ledger.

    Attributes:
        ledger: the sum over the sources, with theirs in ``parts``; None if none keeps one.
        source_names: their names; a sample's ``sources`` are indices into them.
        samples_per_epoch: samples of an epoch; ``len`` counts the distinct ones there are.
        lengths: int64 [len(self)], tokens of each sample; None if a source does not tell.
        num_images: int64 [len(self)], images of each sample; None if a source does not tell.
        max_length: the largest of the sources'; None if one has no limit.

    Raises:
        TypeError, ValueError: no sources, unknown keys, weights for some of them only, two sources
            of one name, a source that cannot be indexed or is empty.
    """

    def __init__(
        self,
        datasets: Sequence[Any],
        *,
        tokenizer: Any = None,
        num_samples: int | None = None,
        data_contract: DataContract | dict[str, Any] | None = None,
        name: str = "mixture",
    ) -> None:
        contract = DataContract.of(data_contract)
        sources = [_source_of(entry) for entry in _checked_list(datasets)]
        _check_together(sources, num_samples)
        self.datasets = [DATASETS.build(source.dataset, tokenizer=tokenizer) for source in sources]
        for index, dataset in enumerate(self.datasets):
            _check_indexable(dataset, index)
        self.source_names = _names(sources, self.datasets)
        self._sizes = np.array([len(dataset) for dataset in self.datasets])
        self._offsets = np.concatenate([[0], np.cumsum(self._sizes)])
        caps = np.array([source.cap or size for source, size in zip(sources, self._sizes)])
        self._used = np.minimum(caps, self._sizes)
        self._counts = _samples_of_each(sources, self._used, num_samples, self.source_names)
        self.samples_per_epoch = int(self._counts.sum())
        self._subset_of: dict[tuple[int, int], np.ndarray] = {}
        self.lengths = self._of_all("lengths")
        self.num_images = self._of_all("num_images")
        limits = [getattr(dataset, "max_length", None) for dataset in self.datasets]
        self.max_length = None if None in limits else max(limits)
        self.ledger = self._sum_of_ledgers(name)
        if self.ledger is not None:
            contract.check(self.ledger)

    def __len__(self) -> int:
        """Distinct samples of all sources; an epoch may take fewer of them, or some twice."""
        return int(self._offsets[-1])

    def _of_all(self, name: str) -> np.ndarray | None:
        values = [getattr(dataset, name, None) for dataset in self.datasets]
        return None if any(one is None for one in values) else np.concatenate(values)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of a mixture that has {len(self)}")
        index %= len(self)
        source = int(np.searchsorted(self._offsets, index, side="right")) - 1
        sample = dict(self.datasets[source][index - int(self._offsets[source])])
        sample["sources"] = [source] * len(sample.get("lengths", ()))
        sample["source_names"] = self.source_names
        return sample

    def epoch_order(self, epoch: int, *, seed: int, shuffle: bool) -> np.ndarray:
        """int64 [samples_per_epoch]: indices of the epoch's samples in reading order.

        Without ``shuffle``: source after source, each in its own order, the same in every epoch.
        """
        drawn = [
            self._offsets[source] + self._draw(source, epoch, seed, shuffle)
            for source in range(len(self.datasets))
        ]
        if not shuffle:
            return np.concatenate(drawn)
        source_of = np.repeat(np.arange(len(drawn)), self._counts)  # [samples_per_epoch]
        source_of = _rng(seed, epoch, _MIX).permutation(source_of)
        order = np.empty(len(source_of), dtype=np.int64)
        for source, indices in enumerate(drawn):
            order[source_of == source] = indices
        return order

    def _draw(self, source: int, epoch: int, seed: int, shuffle: bool) -> np.ndarray:
        """The samples of ``source`` in ``epoch``: a stretch of its endless row of passes."""
        size, count = int(self._used[source]), int(self._counts[source])
        if not shuffle:
            return np.arange(count) % size
        begin, end = epoch * count, (epoch + 1) * count
        passes = range(begin // size, (end - 1) // size + 1)
        row = np.concatenate([_rng(seed, source, p, _PASS).permutation(size) for p in passes])
        drawn = row[begin - passes[0] * size :][:count]
        return drawn if size == self._sizes[source] else self._subset(source, seed)[drawn]

    def _subset(self, source: int, seed: int) -> np.ndarray:
        """The samples that a cap leaves of a source."""
        if (source, seed) not in self._subset_of:
            chosen = _rng(seed, source, _CAP).permutation(int(self._sizes[source]))
            self._subset_of[source, seed] = np.sort(chosen[: int(self._used[source])])
        return self._subset_of[source, seed]

    @property
    def num_rows(self) -> int:
        """Rows kept, in all sources."""
        return sum(getattr(dataset, "num_rows", len(dataset)) for dataset in self.datasets)

    @property
    def fingerprint(self) -> str:
        """Digest of the sources and of how many samples an epoch takes of each."""
        digest = hashlib.sha256()
        for source, dataset in enumerate(self.datasets):
            counts = (int(self._used[source]), int(self._counts[source]))
            digest.update(repr((dataset_fingerprint(dataset), *counts)).encode())
        return digest.hexdigest()[:32]

    def _sum_of_ledgers(self, name: str) -> Ledger | None:
        total = Ledger(name=name)
        for source, dataset in enumerate(self.datasets):
            title = self.source_names[source]
            ledger = getattr(dataset, "ledger", None)
            if isinstance(ledger, Ledger):
                total.add(ledger)
                total.parts.append(replace(ledger, name=title))
                total.num_samples += ledger.num_samples
                total.capacity += ledger.capacity
            else:
                total.notes.append(f"{title} keeps no ledger; it is not in the sum")
            count, size = int(self._counts[source]), int(self._used[source])
            whole = int(self._sizes[source])
            capped = f" (capped from {whole:,})" if size < whole else ""
            total.notes.append(
                f"{title}: {count:,} of the {self.samples_per_epoch:,} samples of an epoch "
                f"({count / self.samples_per_epoch:.1%}), {count / size:.2f} passes over its "
                f"{size:,}{capped}"
            )
        if not total.parts:
            return None
        total.check()
        return total


@DATASETS.register_module(name="RepeatDataset")
def repeat_dataset(dataset: Any, times: float, *, tokenizer: Any = None) -> MixtureDataset:
    """A mixture of one data set that is passed over ``times`` times in an epoch.

    Args:
        dataset: a data set or its config.
        times: passes; also a fraction.
        tokenizer: given by the Runner.
    """
    return MixtureDataset([dict(dataset=dataset, repeat=times)], tokenizer=tokenizer)


def _rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(list(key))


def _checked_list(datasets: Any) -> list[Any]:
    if isinstance(datasets, (str, Mapping)) or not isinstance(datasets, Sequence) or not datasets:
        raise TypeError(
            f"datasets={datasets!r:.80}; allowed: a list of one or more data sets, each as "
            "dict(dataset=dict(type=ChatDataset, ...), weight=..., name=...)"
        )
    return list(datasets)


def _source_of(entry: Any) -> MixtureSource:
    """An entry of ``datasets``: the dict of a MixtureSource, or a data set or its config."""
    if isinstance(entry, MixtureSource):
        return entry
    if not isinstance(entry, Mapping) or "type" in entry:
        return MixtureSource(entry)
    known = [field.name for field in fields(MixtureSource)]
    for key in entry:
        if key not in known:
            raise ValueError(
                f"an entry of a mixture's datasets has no key {key!r}"
                f"{did_you_mean(str(key), known)} Allowed: {', '.join(known)}"
            )
    if "dataset" not in entry:
        raise ValueError(
            f"an entry of a mixture's datasets has the keys {', '.join(entry) or 'none'} and no "
            "'dataset'; add dataset=dict(type=ChatDataset, ...)"
        )
    return MixtureSource(**entry)


def _check_together(sources: list[MixtureSource], num_samples: int | None) -> None:
    without = [i for i, source in enumerate(sources) if source.weight is None]
    if len(without) == len(sources):
        if num_samples is not None:
            raise ValueError(
                f"num_samples={num_samples!r} sets the length of an epoch, which without weights "
                "follows from repeat and cap. Give each data set a weight, or leave it out."
            )
        return
    if without:
        raise ValueError(
            f"data sets {', '.join(map(str, without))} of the mixture (counted from 0) have no "
            "weight and the others do; give all of them a weight, or none"
        )
    if any(source.repeat is not None for source in sources):
        raise ValueError(
            "a mixture has weights and repeat; with weights the number of passes follows from "
            "num_samples. Leave one of the two out."
        )
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples={num_samples!r}; an epoch has 1 sample at least")


def _check_indexable(dataset: Any, index: int) -> None:
    if hasattr(dataset, "epoch_order"):
        raise ValueError(
            f"data set {index} of the mixture (counted from 0) is a mixture itself, whose weights "
            "would be lost; put its data sets into this one"
        )
    if isinstance(dataset, IterableDataset) or not (
        hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    ):
        raise TypeError(
            f"data set {index} of the mixture (counted from 0), a {type(dataset).__name__}, is a "
            "stream; a mixture needs len() and indexing"
        )
    if len(dataset) == 0:
        raise ValueError(f"data set {index} of the mixture (counted from 0) is empty; take it out")


def _names(sources: list[MixtureSource], datasets: list[Any]) -> list[str]:
    names = [
        source.name or str(getattr(dataset, "name", None) or f"source{index}")
        for index, (source, dataset) in enumerate(zip(sources, datasets))
    ]
    names = [name.replace("\\", "/").rsplit("/", 1)[-1] or name for name in names]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"two data sets of the mixture are called {', '.join(map(repr, twice))}; their losses "
            "could not be told apart. Give each a name= of its own."
        )
    return names


def _samples_of_each(
    sources: list[MixtureSource], used: np.ndarray, num_samples: int | None, names: list[str]
) -> np.ndarray:
    """int64 [S]: samples of each source in an epoch."""
    if sources[0].weight is None:
        repeats = [1.0 if source.repeat is None else source.repeat for source in sources]
        counts = np.rint(used * np.array(repeats)).astype(np.int64)
    else:
        weights = np.array([source.weight for source in sources], dtype=np.float64)
        exact = weights / weights.sum() * (num_samples or int(used.sum()))
        counts = np.floor(exact).astype(np.int64)
        missing = round(float(exact.sum())) - int(counts.sum())
        counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1  # largest remainders
    none = [name for name, count in zip(names, counts) if count == 0]
    if none:
        raise ValueError(
            f"{', '.join(none)} would get no sample of an epoch of {int(counts.sum())}; raise its "
            "weight, its repeat or num_samples, or take it out"
        )
    return counts
