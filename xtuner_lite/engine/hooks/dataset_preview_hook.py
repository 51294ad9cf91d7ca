"""Shows the first sample as the model gets it, with what is learnt in colour."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.hooks import Hook

from xtuner_lite.data.preview import render_preview
from xtuner_lite.registry import HOOKS
from xtuner_lite.structures import Batch


@HOOKS.register_module()
class DatasetPreviewHook(Hook):
    """Print the first sample of the first step, read back from its batch.

    Acts once, before the first step, on the main rank. What the loss counts is green on a terminal
    and stands in [[ ]] elsewhere. The text is kept in ``work_dir/<file_name>``. A wrong template or
    mask shows here, before any time is spent.

    Args:
        max_tokens: tokens shown on the console. The file has all of them.
        file_name: the text file in ``work_dir``.
    """

    priority = "NORMAL"

    def __init__(self, max_tokens: int = 300, file_name: str = "dataset_preview.txt") -> None:
        self.max_tokens, self.file_name = max_tokens, file_name
        self._shown = False

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Prints the sample, the first time it is called."""
        if self._shown or runner.rank != 0:
            return
        self._shown = True
        batch = data_batch[0] if data_batch else {}
        if runner.tokenizer is None or not {"input_ids", "labels", "position_ids"} <= set(batch):
            runner.logger.info("no preview: the run has no tokenizer, or its batches no input_ids")
            return
        sample = first_sample(batch)
        whole = render_preview(sample, runner.tokenizer, color=False, max_tokens=None)
        path = Path(runner.work_dir) / self.file_name
        path.write_text(whole + "\n", encoding="utf-8")
        head = f"first sample (whole: {path})"
        is_terminal = sys.stdout.isatty()
        text = render_preview(
            sample, runner.tokenizer, color=is_terminal, max_tokens=self.max_tokens
        )
        if is_terminal:  # colours are for the terminal; the log file would keep their codes
            runner.logger.info(head)
            print(text, flush=True)
        else:
            runner.logger.info(f"{head}\n{text}")


def first_sample(batch: Batch) -> dict[str, Any]:
    """The first sample of a batch in the form of ``dataset[i]``, without its padding."""
    positions = batch["position_ids"][0].cpu().numpy()
    starts = np.flatnonzero(positions == 0)
    lengths = np.diff(np.append(starts, len(positions))).tolist()
    row_ids = (batch.get("row_ids") or [[]])[0]
    if row_ids and len(lengths) > len(row_ids):  # padding is a segment of its own, without a row
        lengths = lengths[: len(row_ids)]
    size = sum(lengths)
    return {
        "input_ids": batch["input_ids"][0, :size].cpu().numpy(),
        "labels": batch["labels"][0, :size].cpu().numpy(),
        "lengths": lengths,
        "row_ids": row_ids,
    }
