"""ChatDataset and TextDataset: rows of any source as packed samples of tokens."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from xtuner_lite.data.cache import (
    CacheOption,
    DataCache,
    cache_root,
    kept_packs,
    make_key,
    unchanged,
)
from xtuner_lite.data.choose_map_fn import map_function, recognised
from xtuner_lite.data.content import NotKeyable, function_digest
from xtuner_lite.data.contract import DataContract
from xtuner_lite.data.encode import (
    ON_BAD_ROW,
    EncodedRows,
    MapFn,
    OnBadRow,
    RowEncoder,
    join_chunks,
)
from xtuner_lite.data.ledger import Ledger
from xtuner_lite.data.overlong import OVERLONG, Overlong
from xtuner_lite.data.packing import Packing, check_packing, pack
from xtuner_lite.data.parallel import encode_chunks
from xtuner_lite.data.row_images import image_options, row_images
from xtuner_lite.data.samples import PackedRows
from xtuner_lite.data.sources import Source, open_sources
from xtuner_lite.registry import DATASETS, MAP_FNS
from xtuner_lite.templates.adapter import ChatTemplate
from xtuner_lite.templates.apply import apply_template
from xtuner_lite.templates.layout import TRAIN_ON, TrainOn
from xtuner_lite.templates.tokenise import encode_text


@DATASETS.register_module()
class ChatDataset(Dataset):
    """Conversations or plain text, tokenised and packed; ``dataset[i]`` is one sample.

    A sample is a dict: ``input_ids`` int32 [T]; ``labels`` int32 [T], not shifted, IGNORE_INDEX
    where nothing is learnt and on the first token of each segment; ``lengths``, tokens of each
    segment; ``row_ids``, 'file:line' of each segment; ``loss_weights`` float32 [T] if the data has
    weights; ``images`` if the data has any: of each segment the list of its images (ImageRef).

    Conversations may hold images if the tokenizer is one of load_processor or load_llava_processor.
    An image's tokens stand in the text where it stands, are never learnt and never cut; its pixels
    are read when a batch is made. A row whose image cannot be read is a bad row.

    Args:
        data: path, folder, glob, hub id; a list of them; a list of dicts; a datasets.Dataset; or
            dict(type=load_dataset, ...). See docs/howto.
        tokenizer: with a chat template, unless the data is plain text. Given by the Runner.
        dataset_map_fn: XTuner's name of map_fn; give one of the two.
        map_fn: "auto", a registered name (xtuner-lite list map_fns), a function from a row (dict)
            to dict(messages=..., tools=...) or dict(text=...), or dict(type=..., keyword=...).
        max_length: tokens of one packed sample, and the most that is kept of one row. None: no
            limit (packing="none" only).
        packing: "best_fit" splits and drops nothing; "concat" joins and cuts rows, for
            pre-training; "none" makes one sample of each row.
        overlong: what happens to a row longer than max_length: "truncate" keeps its beginning,
            "truncate_left" its end, "split" makes several segments of it in which each learnt token
            is learnt once (see data/overlong.py), "drop" skips it, "raise" stops. With
            packing="concat" no row is too long.
        train_on: "assistant" learns every assistant turn, "last" the last one, "all" everything.
            A message's own ``loss`` goes before it.
        train_thinking: learn the answers' ``reasoning_content`` too; by default it is only read.
        on_bad_row: a row that does not parse or breaks the schema: "raise" or "skip" (counted).
        num_proc: processes that encode.
        cache: "auto" keeps the encoded rows on disk ($XTUNER_LITE_DATA_CACHE, else below
            $XTUNER_LITE_HOME or the user's cache folder) and takes them from there while files, map
            function, tokenizer, template, options and versions stay the same; a path keeps them in
            that folder; False keeps nothing and holds the rows in memory.
        limit: rows read at most; None reads all.
        name: in logs and the ledger; default is the source's name.
        template: of this data set alone, as load_tokenizer's; None takes the tokenizer's. For
            mixtures: the model is exported with the tokenizer's template.
        image_folder: image paths of the rows lie below it; None: beside the data file.
        data_contract: limits on the ledger, as dict(max_skipped=0.01, max_truncated=0.05,
            require_eos=True, min_supervised=0.1); the run stops where one is broken. A float is a
            share, an int a number. See data/contract.py.

    Attributes:
        ledger: Ledger, what became of every row.
        lengths: int64 [len(self)], tokens of each sample.
        num_images: int64 [len(self)], images of each sample.
        num_rows: rows kept.

    Raises:
        FileNotFoundError, ValueError: the source is missing, empty or not readable; no row can be
            used; nothing in it is learnt; an option is not known; a file changed while it was read.
        DataCacheError: the cache cannot be written.
        TemplateError: the tokenizer has no template, or its mask cannot be proved.
    """

    def __init__(
        self,
        data: Any,
        *,
        tokenizer: PreTrainedTokenizerBase,
        map_fn: str | Callable[..., Any] | dict[str, Any] = "auto",
        max_length: int | None = 2048,
        packing: Packing = "best_fit",
        overlong: Overlong = "truncate",
        train_on: TrainOn = "assistant",
        train_thinking: bool = False,
        on_bad_row: OnBadRow = "raise",
        num_proc: int = 1,
        cache: CacheOption = "auto",
        limit: int | None = None,
        name: str | None = None,
        template: str | dict[str, Any] | None = None,
        image_folder: str | Path | None = None,
        data_contract: DataContract | dict[str, Any] | None = None,
        dataset_map_fn: str | Callable[..., Any] | dict[str, Any] | None = None,
    ) -> None:
        if dataset_map_fn is not None:
            if map_fn != "auto":
                raise ValueError(
                    f"map_fn={map_fn!r} and dataset_map_fn={dataset_map_fn!r} are two names of one "
                    "option; give one of them"
                )
            map_fn = dataset_map_fn
        check_options(max_length, packing, overlong, train_on, on_bad_row, num_proc, limit)
        contract = DataContract.of(data_contract)
        notes: list[str] = []
        if template is not None:
            tokenizer = apply_template(copy.deepcopy(tokenizer), template)
            notes.append("a template of its own; the model is exported with the tokenizer's")
        self.name = name or name_of(data)
        self.max_length = max_length
        options: dict[str, Any] = dict(
            max_length=None if packing == "concat" else max_length,
            overlong=overlong,
            train_on=train_on,
            train_thinking=train_thinking,
            on_bad_row=on_bad_row,
        )
        sources = open_sources(data)
        self._row_images = row_images(tokenizer, sources, image_folder, packing)
        rows = self._prepared(sources, tokenizer, map_fn, options, limit, num_proc, cache)
        self.ledger = rows.ledger
        self.ledger.name = self.name
        self.ledger.notes += notes
        check_usable(self.ledger, max_length)
        packs = kept_packs(
            rows, f"{packing}-{max_length}", lambda: pack(rows.lengths, max_length, packing)
        )
        files = None if self._row_images is None else self._row_images.files
        self._packed = PackedRows(rows, packs, files)
        self.lengths, self.num_images = packs.lengths, self._packed.num_images()
        self.ledger.lose_supervised(self._packed.num_cut_targets())
        self.ledger.num_samples = len(packs)
        self.ledger.capacity = 0 if packing == "none" else len(packs) * (max_length or 0)
        self.ledger.check()
        contract.check(self.ledger)

    def _prepared(
        self,
        sources: list[Source],
        tokenizer: PreTrainedTokenizerBase,
        map_fn: Any,
        options: dict[str, Any],
        limit: int | None,
        num_proc: int,
        cache: CacheOption,
    ) -> EncodedRows:
        """The encoded rows, from the cache or made now."""
        function = None if isinstance(map_fn, str) and map_fn == "auto" else map_function(map_fn)

        def build() -> tuple[Iterator[EncodedRows], list[str]]:
            check = unchanged(sources)
            rows = islice(chain.from_iterable(source.rows() for source in sources), limit)
            chosen, notes = function, []
            if chosen is None:
                chosen, rows, notes = recognised(rows, self.name)
            needs_template = self._needs_template(chosen)
            encoder = RowEncoder(
                template=ChatTemplate(tokenizer) if needs_template else None,
                encode_text=partial(encode_text, tokenizer),
                map_fn=chosen,
                bos_token_id=tokenizer.bos_token_id,
                row_images=self._row_images,
                **options,
            )
            return _then(encode_chunks(encoder, rows, num_proc), check), notes

        if cache is False:
            return _in_memory(build, self.name)
        kept = DataCache(cache_root(cache))
        try:
            key = make_key(
                sources,
                map_fn="auto" if function is None else function,
                tokenizer=tokenizer,
                options={
                    **options,
                    "limit": limit,
                    "dataset": function_digest(type(self)),
                    **image_options(self._row_images),
                },
                memory=kept.memory,
            )
        except NotKeyable as error:
            why = (
                f"data cache: {self.name} is not kept, because its content cannot be told: {error}"
            )
            print_log(why, logger="current", level=logging.INFO)
            return _in_memory(build, self.name)
        return kept.rows(key, self.name, build)

    def _needs_template(self, map_fn: MapFn) -> bool:
        return map_fn is not MAP_FNS.get("pretrain")

    @property
    def num_rows(self) -> int:
        """Rows kept."""
        return self.ledger.rows_kept

    def __len__(self) -> int:
        """Samples after packing."""
        return len(self._packed)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {self.name}, which has {len(self)}")
        return self._packed.sample(index % len(self))

    @property
    def fingerprint(self) -> str:
        """Digest of every token, mask and pack: equal exactly where training would see the same."""
        return self._packed.fingerprint


@DATASETS.register_module()
class TextDataset(ChatDataset):
    """Plain text for continued pre-training: every token learnt, joined and cut to max_length.

    Args:
        data: as ChatDataset; rows are {"text": ...}.
        tokenizer: needs an EOS token, no chat template. Given by the Runner.
        max_length: tokens of one sample.
        packing: "concat" fills every sample to max_length; "best_fit" cuts no document that fits.
        map_fn: "pretrain" reads the key 'text'; any other must return dict(text=...).
        overlong, on_bad_row, num_proc, cache, limit, name, data_contract: as ChatDataset's.
    """

    def __init__(
        self,
        data: Any,
        *,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = 2048,
        packing: Packing = "concat",
        map_fn: str | Callable[..., Any] | dict[str, Any] = "pretrain",
        overlong: Overlong = "truncate",
        on_bad_row: OnBadRow = "raise",
        num_proc: int = 1,
        cache: CacheOption = "auto",
        limit: int | None = None,
        name: str | None = None,
        data_contract: DataContract | dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            data,
            tokenizer=tokenizer,
            map_fn=map_fn,
            max_length=max_length,
            packing=packing,
            overlong=overlong,
            on_bad_row=on_bad_row,
            num_proc=num_proc,
            cache=cache,
            limit=limit,
            name=name,
            data_contract=data_contract,
        )

    def _needs_template(self, map_fn: MapFn) -> bool:
        return False


def check_options(
    max_length: int | None,
    packing: str,
    overlong: str,
    train_on: str,
    on_bad_row: str,
    num_proc: int,
    limit: int | None,
) -> None:
    check_packing(packing, max_length)
    for option, value, allowed in (
        ("overlong", overlong, OVERLONG),
        ("train_on", train_on, TRAIN_ON),
        ("on_bad_row", on_bad_row, ON_BAD_ROW),
    ):
        if value not in allowed:
            raise ValueError(
                f"{option}={value!r} is unknown; allowed: {', '.join(map(repr, allowed))}"
            )
    for option, number, least in (("max_length", max_length, 2), ("limit", limit, 1)):
        if number is not None and number < least:
            raise ValueError(f"{option}={number!r} is too small; at least {least}, or None")
    if num_proc < 1:
        raise ValueError(f"num_proc={num_proc!r} is too small; at least 1 process encodes")


def name_of(data: Any) -> str:
    if isinstance(data, Mapping):
        return str(data.get("path", "dataset"))
    if isinstance(data, (list, tuple)) and data and not isinstance(data[0], Mapping):
        return ", ".join(map(str, data[:3])) + (", ..." if len(data) > 3 else "")
    return "rows" if isinstance(data, (list, tuple)) else str(data) if _is_path(data) else "dataset"


def _is_path(data: Any) -> bool:
    return isinstance(data, str) or hasattr(data, "__fspath__")


def _in_memory(
    build: Callable[[], tuple[Iterator[EncodedRows], list[str]]], name: str
) -> EncodedRows:
    chunks, notes = build()
    rows = join_chunks(chunks, name)
    rows.ledger.notes += notes
    return rows


def _then(chunks: Iterable[EncodedRows], check: Callable[[], None]) -> Iterator[EncodedRows]:
    """The chunks, and a check behind the last one."""
    yield from chunks
    check()


def check_usable(ledger: Ledger, max_length: int | None) -> None:
    """Raises ValueError if no row can be learnt from, with the reasons and how to go on."""
    if ledger.rows_kept:
        return
    reasons = "; ".join(
        f"{entry.count} x {reason} (such as {entry.examples[0]})"
        for reason, entry in sorted(ledger.skipped.items(), key=lambda item: -item[1].count)
    )
    raise ValueError(
        f"{ledger.name}: nothing is supervised: none of its {ledger.rows_read} rows can be learnt "
        f"from (max_length={max_length}): {reasons}. Raise max_length if rows are too long, "
        "otherwise correct the data, map_fn or train_on."
    )


__all__ = ["ChatDataset", "EncodedRows", "TextDataset"]
