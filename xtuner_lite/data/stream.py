"""StreamDataset: data larger than the disk, encoded and packed while training reads it.

The rows are taken in windows of fixed size; each window is encoded, packed and shuffled by itself,
so that what a sample holds depends on nothing but the rows and the options. Where each window
begins (in samples and in rows) is written down, and so a resumed run goes straight to its sample.
See docs/decisions/0007.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import print_log
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from xtuner_lite.data.cache import CacheOption, SourceChanged, cache_root
from xtuner_lite.data.choose_map_fn import map_function, recognised
from xtuner_lite.data.content import (
    NotKeyable,
    function_digest,
    library_versions,
    template_digest,
    tokenizer_digest,
)
from xtuner_lite.data.dataset import check_options, check_usable, name_of
from xtuner_lite.data.encode import OnBadRow, RowEncoder, join_chunks
from xtuner_lite.data.map_fns.recognise import NUM_LOOKED_AT
from xtuner_lite.data.overlong import Overlong
from xtuner_lite.data.packing import Packing, pack
from xtuner_lite.data.parallel import encode_chunks
from xtuner_lite.data.row_images import image_options, row_images
from xtuner_lite.data.samples import PackedRows
from xtuner_lite.data.sources import open_sources
from xtuner_lite.data.windows import Position, StreamRows, Window, WindowLog
from xtuner_lite.registry import DATASETS, MAP_FNS
from xtuner_lite.templates.adapter import ChatTemplate
from xtuner_lite.templates.layout import TrainOn
from xtuner_lite.templates.tokenise import encode_text

#: What stands for the number of samples: more than any run reads.
ENDLESS = 1 << 40


@DATASETS.register_module()
class StreamDataset(Dataset):
    """Rows encoded and packed while training reads them; nothing of the data is kept.

    It has no end: behind the last row the first follows again, in another order. So the length of a
    run is given in steps (train_cfg=dict(max_iters=...)). Every rank encodes every window, and so
    does every worker: num_workers=1 encodes beside the training, more gain nothing. Samples are as
    ChatDataset's, and the same for every number of ranks and workers; a resume is exact.

    Args:
        data: as ChatDataset; also a streamed hub data set: dict(type=load_dataset, ...,
            streaming=True).
        tokenizer: given by the Runner.
        map_fn, max_length, packing, overlong, train_on, train_thinking, on_bad_row, image_folder,
            name: as ChatDataset's. on_bad_row="skip" keeps a long run from ending at one bad row.
        window_rows: rows of a window: more shuffle wider and pack tighter, and take longer at once.
        shuffle: shuffle the samples inside each window.
        seed: of that shuffle.
        cache: where the list of windows is kept (some 200 bytes for each), as ChatDataset's; False
            keeps none, and a resumed run encodes all that came before once more.

    Attributes:
        ledger: Ledger of the first window.

    Raises:
        FileNotFoundError, ValueError, TemplateError: as ChatDataset, for the first window; later
            ones raise while training.
        SourceChanged: a file is not the one that the run began with.
    """

    samples_per_epoch = ENDLESS
    endless = True

    def __init__(
        self,
        data: Any,
        *,
        tokenizer: PreTrainedTokenizerBase,
        map_fn: str | Callable[..., Any] | dict[str, Any] = "auto",
        max_length: int = 2048,
        packing: Packing = "best_fit",
        overlong: Overlong = "truncate",
        train_on: TrainOn = "assistant",
        train_thinking: bool = False,
        on_bad_row: OnBadRow = "raise",
        window_rows: int = 5000,
        shuffle: bool = True,
        seed: int = 0,
        cache: CacheOption = "auto",
        image_folder: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        check_options(max_length, packing, overlong, train_on, on_bad_row, 1, None)
        if window_rows < 1:
            raise ValueError(f"window_rows={window_rows!r} is too small; at least 1 row")
        self.name = name or name_of(data)
        self.max_length, self.packing, self.window_rows = max_length, packing, window_rows
        self.shuffle, self.seed = shuffle, seed
        sources = open_sources(data)
        self._rows = StreamRows(sources)
        self._row_images = row_images(tokenizer, sources, image_folder, packing)
        chosen, notes = _choose(map_fn, self._rows, self.name)
        needs_template = chosen is not MAP_FNS.get("pretrain")
        options: dict[str, Any] = dict(
            max_length=None if packing == "concat" else max_length,
            overlong=overlong,
            train_on=train_on,
            train_thinking=train_thinking,
            on_bad_row=on_bad_row,
        )
        self._encoder = RowEncoder(
            template=ChatTemplate(tokenizer) if needs_template else None,
            encode_text=partial(encode_text, tokenizer),
            map_fn=chosen,
            bos_token_id=tokenizer.bos_token_id,
            row_images=self._row_images,
            **options,
        )
        self.fingerprint = _digest(
            {**options, "packing": packing, "max_length": max_length, "window_rows": window_rows,
             "shuffle": shuffle, "seed": seed, "sources": self._rows.identities,
             "tokenizer": tokenizer_digest(tokenizer), "template": template_digest(tokenizer),
             "map_fn": _code(chosen), **image_options(self._row_images)}
        )  # fmt: skip
        key = _digest({"fingerprint": self.fingerprint, **library_versions()})
        root = None if cache is False else cache_root(cache)
        self._log = WindowLog(root / "streams" / f"{key}.jsonl" if root else None)
        self._open: OrderedDict[int, tuple[PackedRows, np.ndarray]] = OrderedDict()
        packed = self._window(0)[0]
        self.ledger = packed.rows.ledger
        self.ledger.name = self.name
        self.ledger.notes += [*notes, f"a stream: these are its first {window_rows:,} rows"]
        self.ledger.num_samples = len(packed)
        self.ledger.capacity = 0 if packing == "none" else len(packed) * max_length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # a worker opens its own

    def epoch_order(self, epoch: int, *, seed: int, shuffle: bool) -> range:
        """For EpochSampler: the samples as they come; shuffling happens inside the windows."""
        return range(ENDLESS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < ENDLESS:
            raise IndexError(f"sample {index} of the stream {self.name}; they start at 0")
        number = self._log.find(index)
        if number is None and index > self._log[len(self._log) - 1].end_sample + self.window_rows:
            _say(f"{self.name}: going forward to sample {index}, as no list of windows is kept")
        while number is None:
            self._window(len(self._log))
            number = self._log.find(index)
        packed, order = self._window(number)
        return packed.sample(int(order[index - self._log[number].first_sample]))

    # ------------------------------------------------------------------------------------ windows

    def _window(self, number: int) -> tuple[PackedRows, np.ndarray]:
        """The samples of a window and their order; it is read and encoded if it is not open."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        known = self._log.get(number)
        before = self._log[number - 1] if number else None
        begin = known.begin if known else before.end if before else Position(0, 0, 0)
        packed, begin, end = self._read(begin)
        first = before.end_sample if before else 0
        window = Window(first, len(packed), begin, end, packed.fingerprint)
        if known is not None and known != window:
            raise SourceChanged(
                f"{self.name}: window {number} (from row {begin.row + 1} of "
                f"{self._rows.sources[begin.source].name}) is not what it was when it was first "
                "read: the data changed. Put the old data back, or start a new run."
            )
        self._log.append(number, window)
        order = np.arange(len(packed))
        if self.shuffle:
            order = np.random.default_rng([self.seed, number]).permutation(len(packed))
        self._open[number] = (packed, order)
        while len(self._open) > 2:
            self._open.popitem(last=False)
        return self._open[number]

    def _read(self, begin: Position) -> tuple[PackedRows, Position, Position]:
        """The window from ``begin`` on, or from the first row again where no row is left."""
        rows, end = self._rows.take(begin, self.window_rows)
        if not rows:
            begin = Position(begin.read + 1, 0, 0)
            _say(f"{self.name}: all rows were read {begin.read} times; on with the first one")
            rows, end = self._rows.take(begin, self.window_rows)
        encoded = join_chunks(encode_chunks(self._encoder, rows), self.name)
        self._rows.check_unchanged()
        if begin == Position(0, 0, 0):
            check_usable(encoded.ledger, self.max_length)
        packs = pack(encoded.lengths, self.max_length, self.packing)
        files = None if self._row_images is None else self._row_images.files
        packed = PackedRows(encoded, packs, files)
        encoded.ledger.lose_supervised(packed.num_cut_targets())
        return packed, begin, end


def _choose(map_fn: Any, rows: StreamRows, name: str) -> tuple[Any, list[str]]:
    if isinstance(map_fn, str) and map_fn == "auto":
        first, _ = rows.take(Position(0, 0, 0), NUM_LOOKED_AT)
        chosen, _, notes = recognised(iter(first), name)
        return chosen, notes
    return map_function(map_fn), []


def _code(function: Any) -> str:
    """Digest of a map function, its name where its code cannot be told."""
    try:
        return function_digest(function)
    except NotKeyable:
        return getattr(function, "__qualname__", type(function).__qualname__)


def _digest(parts: dict[str, Any]) -> str:
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _say(text: str) -> None:
    print_log(text, logger="current", level=logging.INFO)
