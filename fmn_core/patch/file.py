"""The patch file: a safetensors file that every LoRA loader takes, with the patch's own JSON in its metadata."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import IO

from safetensors.torch import save

from ..errors import ForgetError, brief
from ..files.atomic import write_all_new
from ..files.bounded_json import parse_json, require_bounded_json
from ..files.header import read_header, read_raw_header, require_bounded_header, tensor_hash, with_sorted_header
from ..files.safetensors import UNREADABLE, read_small
from .bounds import require_brief, require_room
from .metadata import metadata
from .patch import Patch, check_patch, shapes_of
from .schema import upgraded

MOST_PATCH_BYTES = 1 << 30  # of a file: SDXL's at rank 128 has 202 million, a hundred concepts of rank 4 stacked 380 million


def serialize(patch: Patch, name: str) -> bytes:
    """The bytes of a patch file; the same for the same patch and name. Raises ForgetError for one that `read_patch` would
    refuse for its size."""
    try:
        require_brief(patch.info)
        require_room(shapes_of(patch), patch.rank)
        stored = json.dumps(patch.info, sort_keys=True)
        require_bounded_json(stored.encode())
        raw = with_sorted_header(save(dict(patch), metadata(patch, name, tensor_hash(patch)) | {"fmn.patch": stored}))
        require_bounded_header(raw)
        if len(raw) > MOST_PATCH_BYTES:
            raise ValueError(f"it has {len(raw):,} bytes, and {MOST_PATCH_BYTES:,} are the most")
    except ValueError as error:
        raise ForgetError(
            f"The patch cannot be saved, {error}: forget or stack fewer concepts at once, or with a lower rank."
        ) from None
    return raw


def serialize_unet_lora(patch: Patch, name: str) -> bytes:
    """The bytes of the file with a patch's UNet LoRA, an ordinary one."""
    title = {
        "modelspec.title": f"Forget {patch.info['concept']}, outside the cross-attention",
        "modelspec.usage_hint": "Load beside the forget patch of the same name, at strength 1.",
    }
    return with_sorted_header(save(patch.unet_lora, metadata(patch, name, tensor_hash(patch.unet_lora)) | title))


def save_patch(patch: Patch, path: Path) -> list[Path]:
    """Writes a patch under a name that must be new, whole or not at all, and with it its UNet LoRA, if it has one, beside it
    as `<name>-unet`; returns the files.

    Raises ForgetError where a name is taken or a file cannot be written.
    """
    files = {path: serialize(patch, path.stem)}
    if patch.unet_lora:
        beside = path.with_stem(f"{path.stem}-unet")
        files[beside] = serialize_unet_lora(patch, beside.stem)

    def write(file: IO[bytes], raw: bytes) -> None:
        file.write(raw)

    write_all_new({path: partial(write, raw=raw) for path, raw in files.items()})
    return list(files)


def is_patch(path: Path) -> bool:
    """Whether a file says that it is a forget patch; other LoRA files, and what cannot be read, do not."""
    try:
        with open(path, "rb") as file:
            if b'"fmn.patch"' not in read_raw_header(file):  # as of most files in a folder, which are not worth parsing
                return False
            file.seek(0)
            return "fmn.patch" in read_header(file).metadata
    except (OSError, ValueError):
        return False


def read_patch(path: Path) -> Patch:
    """Reads and checks a patch file; raises ForgetError with the file's name and the remedy."""
    try:
        with open(path, "rb") as file:
            if b'"fmn.patch"' not in read_raw_header(file):
                raise ForgetError(f"{path.name} is not a forget patch: use the host's Load LoRA for ordinary LoRA files.")
        tensors, keys = read_small(path, MOST_PATCH_BYTES)
        info = upgraded(parse_json(keys.pop("fmn.patch")))
        patch = Patch(dict(sorted(tensors.items())), info if isinstance(info, dict) else {})
    except FileNotFoundError:
        raise ForgetError(f"{path.name} is not there any more: refresh the list of patches and choose again.") from None
    except ForgetError:
        raise
    except UNREADABLE as error:
        raise ForgetError(
            f"{path.name} cannot be read ({brief(error)}): it is damaged or no safetensors file; copy it again."
        ) from error
    check_patch(patch, path.name)
    return patch
