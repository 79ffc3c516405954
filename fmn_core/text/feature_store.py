"""What a text encoder makes of the common prompts, in a file: reading them all takes longest, and every run needs the
same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import ForgetError
from ..files.atomic import write_over
from ..files.safetensors import UNREADABLE, read_small
from ..log import logger

MOST_STORE_BYTES = 256 << 20  # of a file: SDXL's has 56 million
MOST_FILES = 4  # of so many text encoders
STORE_ENDING = ".features"  # safetensors inside; hosts list what ends so, in any folder, as a model


def load_embeds(folder: Path, encoder: str, texts: Sequence[str]) -> list[Tensor] | None:
    """The embeddings [n, D] of these prompts by the encoder of this hash, or None where they are not stored."""
    path = file_for(folder, encoder, texts)
    if not path.exists():
        return None
    try:
        tensors, _ = read_small(path, MOST_STORE_BYTES)
        lengths, embeds = tensors["lengths"].tolist(), tensors["embeds"]
        if len(lengths) != len(texts) or min(lengths) < 1 or not embeds.isfinite().all():
            raise ValueError("it is of other prompts, or damaged")
        return list(embeds.split(lengths))
    except UNREADABLE as error:
        logger.warning("features.unusable file=%s why=%s", path.name, json.dumps(str(error)))
        return None


def save_embeds(folder: Path, encoder: str, texts: Sequence[str], embeds: Sequence[Tensor]) -> None:
    """Stores the embeddings of these prompts, and takes away the files beyond MOST_FILES; a full disk costs the file
    alone."""
    lengths = torch.tensor([len(each) for each in embeds])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_over(save({"lengths": lengths, "embeds": torch.cat(list(embeds))}), file_for(folder, encoder, texts))
        files = sorted(folder.glob(f"*{STORE_ENDING}"), key=lambda file: file.stat().st_mtime, reverse=True)
        for file in files[MOST_FILES:]:
            file.unlink(missing_ok=True)
    except (OSError, ForgetError) as error:
        logger.warning("features.unwritten why=%s", json.dumps(str(error)))


def file_for(folder: Path, encoder: str, texts: Sequence[str]) -> Path:
    """The file of an encoder's embeddings of these prompts."""
    return folder / f"{hashlib.sha256(json.dumps([encoder, *texts]).encode()).hexdigest()}{STORE_ENDING}"
