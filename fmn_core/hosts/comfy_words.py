"""ComfyUI's text encoders fed with vectors in the place of words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle

import torch
from torch import nn

from .base import WordVectors


def word_vectors(clip, text: str) -> WordVectors:
    """Each encoder's input vectors [n, D], fp32, of the words in `text`, embeddings among them."""
    with torch.inference_mode(False), torch.no_grad():
        clip.load_model()
        vectors = {}
        for name, chunks in clip.tokenize(text, return_word_ids=True).items():
            table = getattr(clip.cond_stage_model, f"clip_{name}").transformer.get_input_embeddings().weight
            words = [id for chunk in chunks for id, _, word in chunk if word]
            rows = [(table[id] if isinstance(id, int) else id).float().cpu() for id in words]
            vectors[f"clip_{name}"] = torch.stack(rows) if rows else torch.empty(0, table.shape[1])
        return vectors


def with_vectors(clip, texts: list[str], vectors: WordVectors) -> dict[str, list]:
    """The host's tokens of the first text with vectors where those of the second are others."""
    tokens, others = (clip.tokenize(text) for text in texts)
    for name, chunks in tokens.items():
        rows = cycle(vectors[f"clip_{name}"])
        for chunk, other in zip(chunks, others[name], strict=True):
            for column, ((id, weight), (elsewhere, _)) in enumerate(zip(chunk, other, strict=True)):
                if isinstance(id, int) and id != elsewhere:
                    chunk[column] = (next(rows), weight)
    return tokens


@contextmanager
def norms_of_copies(module: nn.Module) -> Iterator[None]:
    """Context in which layer norms see a copy of their input: the host's text encoder adds to it in place, and autograd
    needs it as it was."""
    with ExitStack() as stack:
        for part in module.modules():
            if isinstance(part, nn.LayerNorm):
                hook = part.register_forward_pre_hook(lambda norm, args: (args[0].clone(), *args[1:]))
                stack.callback(hook.remove)
        yield
