"""Running out of a device's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def out_of_memory_told() -> Iterator[None]:
    """Context in which running out of memory stays the same exception, by which hosts know that they have to free some, and
    says what the user can do."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:  # the name that torch 2.1 has as well
        raise type(error)(
            f"{error} There is not enough memory on the device: lower `batch_size` or `resolution`, or close what else uses "
            "it, and queue again."
        ) from error
