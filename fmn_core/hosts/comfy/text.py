"""ComfyUI's text encoders: their tokens, short prompts, and vectors in the place of words."""

from __future__ import annotations

from itertools import cycle

import torch
from comfy.sd1_clip import escape_important, token_weights, unescape_important
from torch import Tensor, nn

from ...config import require_text
from ...errors import ForgetError
from ...host import Token, TokenEmbeddings
from ..ldm import learned_token
from .training import as_host

EMBEDDING = "embedding:"


def require_clip(clip) -> None:
    """Raises ForgetError where there is no text encoder."""
    if clip is None:
        raise ForgetError("There is no CLIP: the checkpoint holds no text encoder; load one with the host's Load CLIP.")


def tokenize(clip, text: str) -> tuple[Token, ...]:
    """The columns of a prompt; SDXL's two encoders share one axis, and the first names it.

    Raises ForgetError where there is no text encoder.
    """
    require_clip(clip)
    require_text(text)
    chunks = next(iter(clip.tokenize(text, return_word_ids=True).values()))
    tokens = []
    for chunk in chunks:
        ended = False
        for place, (id, weight, word) in enumerate(chunk):
            kind = "word" if word else "start" if place == 0 else "padding" if ended else "end"
            ended = ended or kind == "end"
            if isinstance(id, int):
                tokens.append(Token(id, clip.tokenizer.untokenize([(id, weight)])[0][1], kind))
            else:
                tokens.append(learned_token(id, kind))
    return tuple(tokens)


def missing_embeddings(clip, text: str) -> dict[str, str]:
    """Every `embedding:NAME` in a prompt, as the host takes weights off it, that gets no vectors; with what to do."""
    missing = {}
    for segment, _ in token_weights(escape_important(text), 1.0):
        for call in (word for word in unescape_important(segment).split() if word.startswith(EMBEDDING)):
            name = call.removeprefix(EMBEDDING).strip(",")
            if not name:  # the host itself fails on it
                missing[call] = "Type the embedding's name right after the colon."
            elif not any(token.id < 0 for token in tokenize(clip, call)):
                missing[call] = f"Put the file {name}.safetensors into models/embeddings, or correct the name."
    return missing


class ShortClip(nn.Module):
    """The host's text encoder for prompts of fewer columns than it pads to: it is causal, so the first are the same."""

    def __init__(self, clip):
        super().__init__()
        self.clip = clip
        self.encoder = clip.cond_stage_model

    def positions(self, columns: int) -> dict[str, Tensor]:
        """Name -> the first position embeddings, for torch.func.functional_call."""
        return {n: p[:columns] for n, p in self.named_parameters() if n.endswith("position_embedding.weight")}

    def forward(self, chunks):
        """As encode_from_tokens, but for its load_model, which must not see parameters that are put in for a moment."""
        self.encoder.reset_clip_options()
        if self.clip.layer_idx is not None:
            self.encoder.set_clip_options({"layer": self.clip.layer_idx})
        return self.encoder.encode_token_weights(chunks)[:2]


def token_embeddings(clip, text: str) -> TokenEmbeddings:
    """Each encoder's input vectors [n, D], fp32, of the words in `text`, embeddings among them."""
    require_text(text)
    with torch.inference_mode(False), torch.no_grad():
        as_host(clip.load_model)
        vectors = {}
        for name, chunks in clip.tokenize(text, return_word_ids=True).items():
            table = getattr(clip.cond_stage_model, f"clip_{name}").transformer.get_input_embeddings().weight
            words = [id for chunk in chunks for id, _, word in chunk if word]
            rows = [(table[id] if isinstance(id, int) else id).float().cpu() for id in words]
            vectors[f"clip_{name}"] = torch.stack(rows) if rows else torch.empty(0, table.shape[1])
        return vectors


def with_vectors(clip, texts: list[str], vectors: TokenEmbeddings) -> dict[str, list]:
    """The host's tokens of the first text with vectors where those of the second are others."""
    tokens, others = (clip.tokenize(text) for text in texts)
    for name, chunks in tokens.items():
        rows = cycle(vectors[f"clip_{name}"])
        for chunk, other in zip(chunks, others[name], strict=True):
            for column, ((id, weight), (elsewhere, _)) in enumerate(zip(chunk, other, strict=True)):
                if isinstance(id, int) and id != elsewhere:
                    chunk[column] = (next(rows), weight)
    return tokens
