"""The header of a safetensors file: names, types and places of its tensors, bounded before anything else is read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from typing import BinaryIO, NamedTuple, TypeGuard

from safetensors.torch import save
from torch import Tensor

from .bounded_json import parse_json, require_bounded_json

MOST_HEADER_BYTES = 1 << 25  # a hundred stacked patches of SDXL have 18 million, others' training notes one or two
MOST_TENSORS = 1 << 15  # the state of a training of all of SDXL has 8 thousand, its checkpoint 2,515, a LoRA 3 thousand
MOST_KEY_LETTERS = 512  # of a tensor's name: the longest have 120
MOST_SIDES = 8  # of a tensor: a convolution has 4
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # what breaks a line, or does worse to a terminal
LENGTH = struct.Struct("<Q")


class Entry(NamedTuple):
    """A tensor's type by its name in the file, its shape, and where its bytes begin and end behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Header(NamedTuple):
    """A file's tensors by name, its metadata, and how many bytes stand before the first tensor."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    size: int


def read_header(file: BinaryIO) -> Header:
    """The header of an open file; raises ValueError for a file that is none or is cut short, and for a header that holds
    more than any real file's."""
    raw = read_raw_header(file)
    found = parse_json(raw)
    if not isinstance(found, dict):
        raise ValueError("its header is not a list of tensors")
    metadata = found.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are no texts")
    if len(found) > MOST_TENSORS:
        raise ValueError(f"it holds {len(found):,} tensors, and {MOST_TENSORS:,} are the most")
    tensors = {name: read_entry(name, entry) for name, entry in found.items()}
    size, end = LENGTH.size + len(raw), 0
    for entry in sorted(tensors.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != end:
            raise ValueError("its tensors do not follow one another")
        end = entry.end
    if size + end != size_of(file):
        raise ValueError(f"its tensors end at {size + end:,} bytes, and it has {size_of(file):,}")
    return Header(tensors, metadata, size)


def read_raw_header(file: BinaryIO) -> bytes:
    """The JSON at the beginning of an open file; raises ValueError where there is none, or too much of it."""
    first = file.read(LENGTH.size)
    if len(first) < LENGTH.size:
        raise ValueError(f"it has {len(first)} bytes")
    (length,) = LENGTH.unpack(first)
    if length > size_of(file) - LENGTH.size:
        raise ValueError("its header is cut short, or none")
    require_length(length)
    return file.read(length)


def require_bounded_header(raw: bytes) -> None:
    """Raises ValueError where a whole file's header is more than `read_header` takes."""
    (length,) = LENGTH.unpack_from(raw)
    require_length(length)
    require_bounded_json(raw[LENGTH.size : LENGTH.size + length])


def require_length(length: int) -> None:
    """Raises ValueError for a header of more bytes than any file has."""
    if length > MOST_HEADER_BYTES:
        raise ValueError(f"its header has {length:,} bytes, and {MOST_HEADER_BYTES:,} are the most")


def size_of(file: BinaryIO) -> int:
    """Bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def read_entry(name: str, entry: object) -> Entry:
    """What a header says of a tensor; raises ValueError where that is none."""
    if len(name) > MOST_KEY_LETTERS:
        raise ValueError(
            f"it holds a name of {len(name):,} characters, {name[:60]} ..., and {MOST_KEY_LETTERS} are the most"
        )
    if UNPRINTABLE.search(name):
        raise ValueError(f"it holds a name with control characters, {ascii(name[:60])}")
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not whole_numbers(shape) or len(shape) > MOST_SIDES:
        raise ValueError(f"what it says of {name} is no type and shape")
    if not whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"what it says of {name} is no place")
    return Entry(dtype, tuple(shape), *offsets)


def whole_numbers(value: object) -> TypeGuard[list[int]]:
    """Whether this is a list of whole numbers from 0 on."""
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def one_line(text: str) -> str:
    """The text, with spaces in the place of control characters."""
    return UNPRINTABLE.sub(" ", text)


def tensor_hash(tensors: dict[str, Tensor]) -> str:
    """sha256 of the tensor data as the file holds it: the hash that the webuis show."""
    raw = save(dict(tensors))
    return hashlib.sha256(memoryview(raw)[8 + LENGTH.unpack_from(raw)[0] :]).hexdigest()


def with_sorted_header(raw: bytes) -> bytes:
    """safetensors writes the metadata in the order of a hash map, which changes from run to run: sorts it."""
    size = LENGTH.unpack_from(raw)[0]
    header = json.dumps(json.loads(raw[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return LENGTH.pack(len(header)) + header + raw[8 + size :]
