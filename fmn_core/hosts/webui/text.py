"""The webuis' text encoders: chunks of 77 columns, their tokens, short prompts, and vectors in the place of words.

An engine is what the webui puts around a CLIP: FrozenCLIPEmbedderWithCustomWords and its kin in the webui, a
ClassicTextProcessingEngine in Forge. Both cut prompts into chunks by `tokenize_line` and encode these by
`process_tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...host import Token, weight_of
from ..ldm import learned_token


def chunks_of(engine, text: str) -> list:
    """A prompt's chunks: token ids, weights and embeddings of 77 columns each."""
    return engine.tokenize_line(text)[0]


def tokens_of(engine, text: str) -> tuple[Token, ...]:
    """The columns of a prompt, chunk after chunk."""
    tokens = []
    for chunk in chunks_of(engine, text):
        learned = learned_columns(engine, chunk)
        ended = False
        for column, id in enumerate(chunk.tokens):
            ending = id == engine.id_end and column not in learned
            kind = "start" if column == 0 else "padding" if ended and ending else "end" if ending else "word"
            ended = ended or ending
            tokens.append(learned_token(learned[column], kind) if column in learned else Token(id, piece(engine, id), kind))
    return tuple(tokens)


def piece(engine, id: int) -> str:
    """The tokenizer's piece behind an id; SD2's and SDXL's second encoder have open_clip's tokenizer, of the same pieces."""
    if hasattr(engine, "tokenizer"):
        return engine.tokenizer.convert_ids_to_tokens(id)
    from open_clip.tokenizer import _tokenizer

    return _tokenizer.decoder[id]


def learned_columns(engine, chunk) -> dict[int, Tensor]:
    """Column -> vector of the embeddings in a chunk."""
    found: dict[int, Tensor] = {}
    for offset, embedding in chunk.fixes:
        vectors = embedding.vec
        if isinstance(vectors, dict):  # SDXL's, one for each encoder
            vectors = vectors[embedding_key(engine)]
        found |= {offset + 1 + i: vector for i, vector in enumerate(vectors)}
    return found


def embedding_names(engine) -> set[str]:
    """The names of the embeddings that an engine puts into prompts."""
    database = engine.embeddings if hasattr(engine, "embeddings") else engine.hijack.embedding_db
    return {*database.word_embeddings}


def embedding_key(engine) -> str:
    """What SDXL's embeddings call this engine's encoder."""
    return getattr(engine, "embedding_key", None) or ("clip_l" if hasattr(engine, "tokenizer") else "clip_g")


def text_model(engine) -> nn.Module:
    """The CLIP inside an engine, of transformers or of open_clip."""
    inside = getattr(engine, "text_encoder", None) or engine.wrapped
    return inside.transformer if hasattr(inside, "transformer") else inside.model


def token_embedding(engine) -> nn.Module:
    """The layer that gives a CLIP its tokens' vectors; the webui's own stands around it."""
    model = text_model(engine)
    embeddings = getattr(model, "get_input_embeddings", None)
    layer = model.token_embedding if embeddings is None else embeddings()
    assert isinstance(layer, nn.Module)
    return layer


def set_fixes(engine, chunks: list) -> None:
    """Tells an engine the embeddings of the chunks that it encodes next."""
    owner = engine.embeddings if hasattr(engine, "embeddings") else engine.hijack
    owner.fixes = [chunk.fixes for chunk in chunks]


def encode_chunks(engine, chunks: list) -> Tensor:
    """Embeddings [B, 77, D] of a chunk of each of B prompts."""
    set_fixes(engine, chunks)
    return engine.process_tokens([chunk.tokens for chunk in chunks], [chunk.multipliers for chunk in chunks])


def can_be_short(engine, chunks: list) -> bool:
    """Whether an engine can leave the chunks' last columns out and give the others all the same: CLIP is causal.

    open_clip takes 77 columns and no fewer; weights are levelled over the whole chunk; embeddings may reach beyond.
    """
    plain = all(not chunk.fixes and set(chunk.multipliers) == {1.0} for chunk in chunks)
    return plain and hasattr(engine, "tokenizer")


def first_columns(engine, chunks: list, columns: int) -> Tensor:
    """The first columns [B, columns, D] of the chunks, computed alone."""
    set_fixes(engine, chunks)
    return engine.process_tokens(
        [chunk.tokens[:columns] for chunk in chunks], [chunk.multipliers[:columns] for chunk in chunks]
    )


def token_embeddings(engine, text: str) -> Tensor:
    """The encoder's input vectors [n, D] in fp32 of the words in `text`, embeddings among them."""
    layer = token_embedding(engine)
    table, rows = weight_of(getattr(layer, "wrapped", layer)), []
    for chunk in chunks_of(engine, text):
        learned = learned_columns(engine, chunk)
        words = [c for c, id in enumerate(chunk.tokens) if c and (c in learned or id != engine.id_end)]
        rows += [learned[c] if c in learned else table[chunk.tokens[c]] for c in words]
    return torch.stack([row.detach().float().cpu() for row in rows]) if rows else torch.empty(0, table.shape[1])


def encode_with_vectors(engine, texts: list[str], vectors: Tensor) -> Tensor:
    """Embeddings [1, T, D] of the first text with `vectors` where the second has other tokens, from the start again at
    need."""
    parts, done = [], 0
    for chunk, other in zip(chunks_of(engine, texts[0]), chunks_of(engine, texts[1]), strict=True):
        columns = [c for c, (one, two) in enumerate(zip(chunk.tokens, other.tokens, strict=True)) if one != two]
        rows = torch.arange(done, done + len(columns)) % len(vectors)
        with put_in(token_embedding(engine), columns, vectors[rows]):
            parts.append(encode_chunks(engine, [chunk]))
        done += len(columns)
    return torch.cat(parts, 1)


@contextmanager
def put_in(layer: nn.Module, columns: list[int], vectors: Tensor) -> Iterator[None]:
    """Context in which an embedding layer gives `vectors` in these columns."""

    def replace(module, args, output):
        output = output.clone()
        output[:, columns] = vectors.to(output)
        return output

    hook = layer.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()
