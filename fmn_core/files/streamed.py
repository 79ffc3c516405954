"""A safetensors file written one tensor at a time, where all of them together would not fit into memory."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import IO

from torch import Tensor

from .header import LENGTH

HALF, NO_HASH = 2, "0" * 64  # bytes of a number; a sha256 that is not known yet


def write_half(
    file: IO[bytes],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[Tensor],
    describe: Callable[[str], dict[str, str]],
) -> None:
    """Writes fp16 tensors, in the order of their names, and what `describe` says of the sha256 of their data, as `save` and
    `with_sorted_header` would: each tensor is asked for when its turn has come, and the header's place is kept for it."""
    entries, end = {}, 0
    for name in sorted(shapes):
        start, end = end, end + HALF * math.prod(shapes[name])
        entries[name] = {"data_offsets": [start, end], "dtype": "F16", "shape": [*shapes[name]]}

    def header(digest: str) -> bytes:
        text = json.dumps(entries | {"__metadata__": describe(digest)}, sort_keys=True, separators=(",", ":")).encode()
        text += b" " * (-len(text) % LENGTH.size)
        return LENGTH.pack(len(text)) + text

    found = hashlib.sha256()
    file.write(header(NO_HASH))
    for tensor in tensors:
        data = tensor.half().contiguous().numpy().reshape(-1).view("u1").data
        found.update(data)
        file.write(data)
    file.seek(0)
    file.write(header(found.hexdigest()))
