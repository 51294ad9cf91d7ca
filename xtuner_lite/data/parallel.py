"""Encoding rows chunk by chunk, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice

from xtuner_lite.data.encode import EncodedRows, RowEncoder
from xtuner_lite.data.sources import Row

#: Rows of one tokenizer call.
CHUNK_ROWS = 1000


def encode_chunks(
    encoder: RowEncoder, rows: Iterable[Row], num_proc: int = 1
) -> Iterator[EncodedRows]:
    """Yields the encoded chunks in the order of the rows, whatever num_proc is.

    Args:
        rows: read here; only a few chunks are held at a time.
        num_proc: processes. With 1 the tokenizer's own threads still use every core.
    """
    chunks = _chunks(rows)
    if num_proc == 1:
        for chunk in chunks:
            yield encoder.encode(chunk)
        return
    # fork where there is one: it starts at once and takes map functions that cannot be pickled
    # (lambdas, plug-in files). The children run no torch and no tokenizer threads.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    with ProcessPoolExecutor(num_proc, context, _start, (encoder,)) as pool:
        waiting: list[Future[EncodedRows]] = []
        for chunk in chunks:
            waiting.append(pool.submit(_encode, chunk))
            if len(waiting) > 2 * num_proc:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, CHUNK_ROWS)):
        yield chunk


_encoder: RowEncoder | None = None  # of a worker process


def _start(encoder: RowEncoder) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _encoder = encoder


def _encode(chunk: list[Row]) -> EncodedRows:
    assert _encoder is not None
    return _encoder.encode(chunk)
