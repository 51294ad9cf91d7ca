"""Encoding rows chunk by chunk, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from xtuner_lite.data.encode import EncodedRows, RowEncoder
from xtuner_lite.data.sources import Row

#: Rows of one tokenizer call.
CHUNK_ROWS = 500


def encode_chunks(
    encoder: RowEncoder, rows: Iterable[Row], num_proc: int = 1
) -> Iterator[EncodedRows]:
    """Yields the encoded chunks in the order of the rows, whatever num_proc is.

    Args:
        rows: read here; only a few chunks are held at a time.
        num_proc: processes. With 1 the tokenizer's own threads may still use every core.

    Raises:
        RuntimeError: a process was killed, as for want of memory.
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
    pool = ProcessPoolExecutor(num_proc, context, _start, (encoder, os.getpid()))
    try:
        yield from _in_order(pool, chunks, 2 * num_proc)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that encodes rows was killed from outside, as the system does when memory "
            f"runs out. Lower num_proc (now {num_proc})."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, chunks: Iterable[list[Row]], ahead: int
) -> Iterator[EncodedRows]:
    waiting: deque[Future[EncodedRows]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(_encode, chunk))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, CHUNK_ROWS)):
        yield chunk


_encoder: RowEncoder | None = None  # of a worker process


def _start(encoder: RowEncoder, parent: int) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _encoder = encoder
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process when its parent was killed: it would wait for work, and hold its locks."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _encode(chunk: list[Row]) -> EncodedRows:
    assert _encoder is not None
    return _encoder.encode(chunk)
