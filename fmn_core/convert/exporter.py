"""Forget patches in the forms of others: PEFT's names, full differences, and a checkpoint with the patch in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from ..errors import ForgetError
from ..files.atomic import new_file, require_new, write_all_new
from ..files.header import read_header
from ..files.safetensors import open_weights
from ..files.streamed import write_half
from ..lora.keys import blocks_per_level, dotted, of_text_encoder, one_name, split_key
from ..patch.metadata import metadata
from ..patch.patch import ALPHA, DOWN, UP, Patch, check_strength

PER_LEVEL = 3  # of SD1, SD2 and SDXL
EXPORT_FORMATS = ("peft", "diff")


def to_peft(tensors: dict[str, Tensor], per_level: int = PER_LEVEL) -> dict[str, Tensor]:
    """A patch's tensors, or those of its `unet_lora`, under diffusers' and PEFT's names, for `load_lora_weights`.

    alpha = rank, so it needs no alpha, of which diffusers 0.35 to 0.42 reads all but uniform ones wrongly. `per_level` is
    what `blocks_per_level` says of the model, for SDXL's names.
    """
    named = {}
    for module in layers_of(tensors):
        name = dotted(one_name(module, per_level))
        named[f"unet.{name}.lora_A.weight"] = tensors[module + DOWN]
        named[f"unet.{name}.lora_B.weight"] = tensors[module + UP]
    return named


def to_diff(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The full change of each layer, fp16, under kohya's names, one after the other, since all of them are as large as the
    model's: for ComfyUI and the webuis, not for diffusers or sd-scripts."""
    for module in layers_of(tensors):
        up, down = tensors[module + UP], tensors[module + DOWN]
        delta = up.float().flatten(1) @ down.float().flatten(1)
        yield f"{module}.diff", delta.reshape(len(up), *down.shape[1:]).half()


def diff_shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what `to_diff` gives."""
    return {
        f"{module}.diff": (len(tensors[module + UP]), *tensors[module + DOWN].shape[1:]) for module in layers_of(tensors)
    }


def layers_of(tensors: Iterable[str]) -> list[str]:
    """Names of the layers in a patch or its rest."""
    return sorted(key.removesuffix(ALPHA) for key in tensors if key.endswith(ALPHA))


def save_as(patch: Patch, format: str, path: Path, per_level: int = PER_LEVEL) -> list[Path]:
    """Writes a patch in one of FORMATS, and its UNet LoRA, if it has one, beside it as `<name>-unet`; returns the files.

    Raises ForgetError where a name is taken or a file cannot be written.
    """
    sources = {path: dict(patch)} | ({path.with_stem(f"{path.stem}-unet"): patch.unet_lora} if patch.unet_lora else {})

    def write(file: IO[bytes], name: str, tensors: dict[str, Tensor]) -> None:
        if format == "peft":
            named = dict(sorted(to_peft(tensors, per_level).items()))
            shapes: dict[str, tuple[int, ...]] = {key: tuple(tensor.shape) for key, tensor in named.items()}
            values: Iterable[Tensor] = named.values()
        else:
            shapes, values = diff_shapes(tensors), (change for _, change in to_diff(tensors))
        write_half(file, shapes, values, lambda digest: metadata(patch, name, digest))

    write_all_new({path: partial(write, name=path.stem, tensors=tensors) for path, tensors in sources.items()})
    return [*sources]


@torch.no_grad()
def merge(checkpoint: Path, patch: Patch, strength: float, out: Path) -> Path:
    """Writes a checkpoint with the patch in it: a copy of the file, header, metadata and all other tensors to the bit, in
    which the patched projections are W + strength up down, in the type they had. One tensor at a time is in memory.

    `checkpoint` is a single .safetensors file, with the ldm's names or diffusers'. Raises ForgetError where it lacks a
    layer of the patch, or has another shape there.
    """
    require_new(out)
    check_strength(strength)
    with open_weights(checkpoint) as weights:
        per_level = blocks_per_level(split_key(key)[0] for key in weights.keys if not of_text_encoder(key))
        layers = {}
        for key in weights.keys:
            layer, part = split_key(key)
            if part == "weight" and not of_text_encoder(key):
                layers[one_name(layer, per_level)] = key
        patched = {}
        for module in patch.modules:
            key = layers.get(one_name(module, per_level))
            shape = len(patch[module + UP]), patch[module + DOWN].shape[1]
            if key is None or weights.shape(key) not in (shape, (*shape, 1, 1)):
                raise ForgetError(
                    f"The patch that forgets `{patch.info['concept']}` does not fit {weights.path.name}, which has "
                    f"{'another shape' if key else 'no layer'} at {module}: choose the checkpoint that it was made for."
                )
            patched[key] = module
        with new_file(out) as file, open(weights.path, "rb") as original:
            header = read_header(original)
            original.seek(0)
            shutil.copyfileobj(original, file, 1 << 24)
            for key, module in patched.items():
                weight = weights.read(key)
                delta = patch[module + UP].float() @ patch[module + DOWN].float() * strength
                merged = (weight.float() + delta.reshape(weight.shape)).to(weight.dtype)
                if not merged.float().isfinite().all():
                    raise ForgetError(f"{module} is not finite with the patch at strength {strength}: lower the strength.")
                file.seek(header.size + header.tensors[key].start)
                file.write(merged.contiguous().view(torch.uint8).numpy().tobytes())
    return out
