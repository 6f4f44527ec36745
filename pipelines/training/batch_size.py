"""Suggest a batch size if a batch does not fit into memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from samfeat.pipelines.memory import is_out_of_memory
from samfeat.pipelines.training.batches import RawBatch, first_items


def largest_that_fits(raw: RawBatch, attempt: Callable[[RawBatch], None]) -> int:
    """The largest number of the batch's first items with which ``attempt`` succeeds, by bisection; 0 if not even one.

    Args:
        raw: the batch that did not fit.
        attempt: takes a step with some of its items; raises if there is not enough memory.
    """
    fits, too_many = 0, len(raw.synthetic)
    while too_many - fits > 1:
        tried = (fits + too_many) // 2
        try:
            attempt(first_items(raw, tried))
            fits = tried
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            too_many = tried
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return fits
