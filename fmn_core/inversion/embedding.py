"""The file of learned words: a textual-inversion embedding as ComfyUI, the webuis and diffusers read it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save

from .. import __version__
from ..errors import ForgetError, brief
from ..files.atomic import write_new
from ..files.header import with_sorted_header
from ..files.safetensors import UNREADABLE, read_small
from ..host import DiffusionHost, TokenEmbeddings

ONE_ENCODER = "emb_params"  # the key of SD1 and SD2; SDXL's are the encoders' own names
MOST_EMBEDDING_BYTES = 1 << 26  # of a file: 64 words of SDXL's take less than a million
PLACEHOLDER = re.compile(r"<s(\d+)>")  # the original's files have one tensor for each of its tokens


def save_embedding(vectors: TokenEmbeddings, path: Path, settings: dict) -> Path:
    """Writes vectors under a name that must be new, with the settings that made them, whole or not at all; returns the file.

    Raises ForgetError where the name is taken or the file cannot be written.
    """
    (*names,) = vectors
    keys = names if len(names) > 1 else [ONE_ENCODER]
    tensors = {key: vectors[name].float().contiguous() for key, name in zip(keys, names, strict=True)}
    made = {"version": __version__, "settings": settings}
    metadata = {"modelspec.title": path.stem, "fmn.embedding": json.dumps(made, sort_keys=True)}
    return write_new(with_sorted_header(save(tensors, metadata)), path)


def read_embedding(path: Path, encoders: dict[str, int]) -> TokenEmbeddings:
    """The vectors in an embedding's file for these text encoders, name -> width; also of the original's files.

    Raises ForgetError for a file that is damaged or for another model.
    """
    try:
        stored, _ = read_small(path, MOST_EMBEDDING_BYTES)
    except FileNotFoundError:
        raise ForgetError(f"There is no embedding {path}: learn it with `invert`, or correct the path.") from None
    except UNREADABLE as error:
        raise ForgetError(
            f"{path} cannot be read ({brief(error)}): it is damaged or no safetensors file; copy it again."
        ) from error
    if len(encoders) == 1:
        (name,) = encoders
        numbered = sorted((int(match[1]), key) for key in stored if (match := PLACEHOLDER.fullmatch(key)))
        words = [stored[key] for _, key in numbered]
        if words and all(word.numel() == encoders[name] for word in words):
            stored = {name: torch.cat([word.reshape(1, -1) for word in words])}
        elif len(stored) == 1:
            stored = {name: next(iter(stored.values()))}
    vectors = {name: stored[name].float() for name in encoders if name in stored and stored[name].is_floating_point()}
    vectors = {name: v.reshape(-1, v.shape[-1]) for name, v in vectors.items() if v.ndim and v.numel()}
    if {name: v.shape[1] for name, v in vectors.items()} != encoders:
        found = ", ".join(f"{key} {tuple(v.shape)}" for key, v in stored.items()) or "nothing"
        wanted = " and ".join(f"{name} of width {width}" for name, width in encoders.items())
        raise ForgetError(
            f"{path.name} holds {brief(found)}, and this model takes {wanted}: it was learned with another model."
        )
    if not all(v.isfinite().all() for v in vectors.values()):
        raise ForgetError(f"{path.name} has values that are not finite: it is damaged; learn the words again.")
    return vectors


def require_embeddings(host: DiffusionHost, *texts: str) -> None:
    """Raises ForgetError where a text calls for an embedding that the host does not have, and so would read as words."""
    for text in texts:
        for call, remedy in host.missing_embeddings(text).items():
            raise ForgetError(f"There is no embedding behind `{call}`. {remedy}")


def embedding_token(name: str) -> str:
    """What prompts call the words of an embedding: its name in angle brackets."""
    return f"<{name}>"


def add_embedding(host: DiffusionHost, name: str, file: Path) -> str:
    """Adds the words in an embedding's file to a host as one token, and returns it."""
    encoders = {encoder: vectors.shape[1] for encoder, vectors in host.token_embeddings("").items()}
    token = embedding_token(name)
    host.learn(token, read_embedding(file, encoders))
    return token
