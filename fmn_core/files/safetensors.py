"""Files of weights by others: opened tensor by tensor, and what is wrong with them in a sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ForgetError, brief
from .header import Entry, read_header, size_of

# What a folder of diffusers or PEFT calls its file of weights.
IN_FOLDER = ("unet/diffusion_pytorch_model", "diffusion_pytorch_model", "adapter_model", "pytorch_lora_weights")


class WeightsFile:
    """An open safetensors file; tensors are read when asked for."""

    def __init__(self, path: Path, file):
        self.path, self.file = path, file
        self.keys, self.metadata = list(file.keys()), file.metadata() or {}

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, from the header alone."""
        return tuple(self.file.get_slice(key).get_shape())

    def misfit(self, name: str, found: object, shape: tuple[int, ...]) -> ForgetError:
        """What to raise where the file has another shape than the model's layer `name`."""
        return ForgetError(
            f"{self.path.name} does not fit the model at {name}: it has {found} there, and the model's layer is of "
            f"{[*shape]}. Use the model that it was made for."
        )

    def read(self, key: str) -> Tensor:
        """A tensor; raises ForgetError for one that is no weight, or has values that are not finite."""
        try:
            tensor = self.file.get_tensor(key).clone()  # the file is mapped, and may be written over
            if not tensor.is_floating_point():
                raise TypeError(tensor.dtype)
            finite = torch.isfinite(tensor.float()).all()
        except (SafetensorError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise ForgetError(
                f"{self.path.name} holds {brief(key)} in a form that is no weight ({brief(error)}): save it as fp16 or fp32."
            ) from error
        if not finite:
            raise ForgetError(
                f"{self.path.name} has values that are not finite in {brief(key)}: it is damaged; download it again."
            )
        return tensor


UNREADABLE = (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError)  # of `read_small`
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_small(path: Path, most: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file of at most `most` bytes, in memory of their own: a mapped file that somebody writes
    over takes the process down, or changes what was read. Raises one of UNREADABLE."""
    with open(path, "rb") as file:
        size = size_of(file)
        if size > most:
            raise ValueError(f"it has {size:,} bytes, and {most:,} are the most that it may have")
        header = read_header(file)
        data = bytearray(size - header.size)
        if file.readinto(data) != len(data):
            raise ValueError("it is cut short")
    return {name: tensor_in(data, name, entry) for name, entry in header.tensors.items()}, header.metadata


def tensor_in(data: bytearray, name: str, entry: Entry) -> Tensor:
    """A tensor in a file's data, of which it is a view; raises ValueError where its bytes are not those of its shape."""
    dtype = TYPES.get(entry.dtype)
    if dtype is None:
        raise ValueError(f"{name} is of the type {entry.dtype[:20]}, which is no weight's")
    count = math.prod(entry.shape)
    if count * dtype.itemsize != entry.end - entry.start:
        raise ValueError(f"{name} has {entry.end - entry.start:,} bytes, which are not those of its shape")
    if not count:
        return torch.empty(entry.shape, dtype=dtype)
    if entry.start % dtype.itemsize:  # numbers at odd places are not read on every machine
        data, entry = data[entry.start : entry.end], entry._replace(start=0)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=entry.start).reshape(entry.shape)


@contextmanager
def open_weights(path: Path) -> Iterator[WeightsFile]:
    """Context with an open .safetensors file, or with the UNet's or the LoRA's in a folder of diffusers; raises ForgetError
    with the file's name and the remedy where it cannot be read."""
    path = inside(path) if path.is_dir() else path
    if path.suffix != ".safetensors":
        raise ForgetError(f"{path.name} is not a .safetensors file, and no other kind is read: convert it first.")
    try:
        with open(path, "rb") as file:
            read_header(file)
        opened = safe_open(path, "pt")
        weights = WeightsFile(path, opened)
    except FileNotFoundError:
        raise ForgetError(f"{path.name} is not there: choose another file.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ForgetError(
            f"{path.name} cannot be read ({brief(error)}): it is damaged or no safetensors file; download it again."
        ) from error
    with opened:
        yield weights


def inside(folder: Path) -> Path:
    """The file of weights in a folder of diffusers or PEFT."""
    for name in IN_FOLDER:
        for variant in ("", ".fp16"):
            file = folder / f"{name}{variant}.safetensors"
            if file.is_file():
                return file
    raise ForgetError(f"{folder} holds no file of weights such as {IN_FOLDER[0]}.safetensors: name the file itself.")
