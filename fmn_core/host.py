"""DiffusionHost: everything the core may ask of the program it runs in."""

from __future__ import annotations

import math
import re
import statistics
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .errors import ForgetError
from .log import ENCODED_AT_ONCE, Progress

MATRICES = ("to_q", "to_k", "to_v", "to_out")
IMAGES_AT_ONCE = 4  # that are sampled or decoded: what a consumer GPU holds at SDXL's size
SAMPLES = 1024  # values of each weight that tell models apart
TokenEmbeddings = dict[str, Tensor]  # text encoder (`clip_l`, `clip_g`, `clip_h`) -> vectors [n, D] that stand for n tokens
EMBEDDING_CALL = re.compile(r"(?<![^\s(])embedding:([^\s,()]*)")  # as ComfyUI spells it, which no plain word is
CANNOT_INVERT = "This host cannot learn words: invert the concept in ComfyUI or on the command line, and use the file here."


def linear_name(matrix: str) -> str:
    """Where a layer has the projection called `matrix` (one of MATRICES); `to_out` is a Sequential around it."""
    return "to_out.0" if matrix == "to_out" else matrix


def weight_of(layer: nn.Module) -> Tensor:
    """A layer's weight, whatever class the host makes its layers of."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


@dataclass(frozen=True)
class CrossAttention:
    """One cross-attention layer of the UNet: its module, its number of heads, and `down`, `mid` or `up`."""

    name: str
    module: nn.Module
    heads: int
    unet_block: str

    def linear(self, matrix: str) -> nn.Module:
        """The projection called `matrix` (one of MATRICES)."""
        return self.module.get_submodule(linear_name(matrix))


@dataclass(frozen=True)
class Token:
    """One column of the cross-attention map: the tokenizer's piece and its id, below zero for an embedding's."""

    id: int
    text: str
    kind: str  # start, word, end (the first after the words) or padding

    @property
    def ends_word(self) -> bool:
        """CLIP's BPE marks a word's last piece with `</w>`; an embedding's columns are words of their own."""
        return self.text.endswith("</w>") or self.id < 0


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts: embeddings [B, T, D], pooled embeddings [B, P] or None, and T tokens for each prompt."""

    texts: tuple[str, ...]
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None
    tokens: tuple[tuple[Token, ...], ...]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: int | list[int]) -> Prompts:
        """The prompts at these row numbers, repeats allowed."""
        rows = [rows] if isinstance(rows, int) else rows
        return replace(
            self,
            texts=tuple(self.texts[r] for r in rows),
            prompt_embeds=self.prompt_embeds[rows],
            pooled_prompt_embeds=None if self.pooled_prompt_embeds is None else self.pooled_prompt_embeds[rows],
            tokens=tuple(self.tokens[r] for r in rows),
        )

    def expand(self, count: int) -> Prompts:
        """A single prompt, so many times; unlike that of indexing, its gradient is the same from run to run on any number of
        threads."""
        return replace(
            self,
            texts=self.texts * count,
            prompt_embeds=self.prompt_embeds.expand(count, -1, -1),
            pooled_prompt_embeds=None if self.pooled_prompt_embeds is None else self.pooled_prompt_embeds.expand(count, -1),
            tokens=self.tokens * count,
        )

    @classmethod
    def cat(cls, batches: Sequence[Prompts]) -> Prompts:
        """Batches of prompts as one, tiled to a common length where they differ, as hosts do."""
        pooled = [batch.pooled_prompt_embeds for batch in batches if batch.pooled_prompt_embeds is not None]
        length = math.lcm(*(batch.prompt_embeds.shape[1] for batch in batches))
        return cls(
            texts=tuple(text for batch in batches for text in batch.texts),
            prompt_embeds=torch.cat([tile(batch.prompt_embeds, length) for batch in batches]),
            pooled_prompt_embeds=torch.cat(pooled) if pooled else None,
            tokens=tuple(row * (length // len(row)) for batch in batches for row in batch.tokens),
        )

    def mean(self) -> Prompts:
        """What the prompts have in common, as one prompt: the mean of those that are as long as most."""
        ends = [[token.kind for token in tokens].index("end") for tokens in self.tokens]
        common = statistics.mode(ends)
        alike = self[[row for row, end in enumerate(ends) if end == common]]
        pooled = alike.pooled_prompt_embeds
        pooled = None if pooled is None else pooled.mean(0, keepdim=True)
        return replace(alike[0], prompt_embeds=alike.prompt_embeds.mean(0, keepdim=True), pooled_prompt_embeds=pooled)


def tile(tokens: Tensor, length: int) -> Tensor:
    """A mask [T] or embeddings [B, T, D] of tokens, repeated to this length."""
    times = length // tokens.shape[-1 if tokens.ndim == 1 else 1]
    return tokens.repeat(times) if tokens.ndim == 1 else tokens.repeat(1, times, 1)


def sampled(weight: Tensor) -> list[object]:
    """A weight's type and shape and some of its values, all over it: enough to tell it from another model's."""
    flat = weight.detach().reshape(-1)
    return [str(weight.dtype), *weight.shape, flat[:: -(-len(flat) // SAMPLES) or 1].cpu()]


class DiffusionHost(Progress):
    """A text-to-image model with cross-attention inside a host; latents are those the UNet sees."""

    resolution = 0  # the pictures' side in pixels, as `sized` sets it; 0: what the model was made for

    if TYPE_CHECKING:  # what a host keeps, or computes when it is asked for

        @property
        def family(self) -> str:
            """A key of FAMILIES."""

        @property
        def unet(self) -> nn.Module: ...

        @property
        def device(self) -> torch.device: ...

        @property
        def alphas_cumprod(self) -> Tensor:
            """[number of timesteps]: the noise schedule."""

    @property
    def recomputes(self) -> bool:
        """Whether a block can be computed again outside of `predict`."""
        return True

    @abstractmethod
    def cross_attentions(self) -> dict[str, CrossAttention]:
        """Layer name -> layer, in forward order."""

    @abstractmethod
    def other_layers(self) -> dict[str, nn.Module]:
        """Kohya name -> every other Linear and convolution in the UNet's blocks: what sd-scripts puts a LoRA on."""

    @abstractmethod
    def tokenize(self, text: str) -> tuple[Token, ...]:
        """The columns that `text` gets in the cross-attention, by the host's own tokenizer and prompt syntax."""

    @abstractmethod
    def encode(self, texts: list[str]) -> Prompts:
        """Embeddings of prompts as the UNet's cross-attention receives them, all of one length."""

    def at_once(self, texts: list[str]) -> Iterator[list[str]]:
        """The texts, ENCODED_AT_ONCE at a time, which inside `reading` are shown as read when the next are asked for; raises
        the host's own exception if the user has asked to stop."""
        for start in range(0, len(texts), ENCODED_AT_ONCE):
            self.check_interrupt()
            some = texts[start : start + ENCODED_AT_ONCE]
            yield some
            if self.prompts_read:
                done, total = self.prompts_read
                self.prompts_read = (done + len(some), total)
                self.show_progress(*self.prompts_read, None)

    @abstractmethod
    def encode_prefix(self, texts: list[str], num_tokens: int) -> Tensor:
        """The first tokens' embeddings of many prompts [B, num_tokens, D], as `encode` gives them; what is left out is not
        computed."""

    @abstractmethod
    def missing_embeddings(self, text: str) -> dict[str, str]:
        """What in a prompt calls for an embedding (learned words) that this host does not have, by its own spelling or by
        ComfyUI's -> a sentence that says what to do."""

    def token_embeddings(self, text: str) -> TokenEmbeddings:
        """The text encoders' input vectors of every token in `text`, special tokens left out."""
        raise ForgetError(CANNOT_INVERT)

    def token_embedding(self, id: int) -> TokenEmbeddings:
        """The text encoders' input vector [1, D] of the token with this number in the tokenizer's vocabulary; raises
        ForgetError where there is none."""
        raise ForgetError(f"This host finds no tokens by number: write the word of the token {id} in its place.")

    def encode_with_embeddings(self, template: str, vectors: TokenEmbeddings) -> Prompts:
        """One encoded prompt: `template` with vectors in the place of `{}`, differentiable by them.

        Only inside `training(shape, text=True)`.
        """
        raise ForgetError(CANNOT_INVERT)

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
        """The UNet's noise estimate epsilon [B, C, h, w] for x_t [B, C, h, w] at integer timesteps t [B]."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents of images [B, H, W, 3] in 0..1; raises ForgetError where the host was given no VAE."""

    def decode(self, latents: Tensor) -> Tensor | None:
        """Images [B, H, W, 3] in 0..1, on the CPU, a few decoded at a time; None where the host was given no VAE."""
        parts = [self.decode_few(few) for few in latents.split(IMAGES_AT_ONCE)]
        pictures = [part.float().cpu() for part in parts if part is not None]
        return torch.cat(pictures) if pictures else None

    @abstractmethod
    def decode_few(self, latents: Tensor) -> Tensor | None:
        """As decode, all of them at once."""

    @abstractmethod
    def native_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent of the size the model was made for."""

    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent of the size that is asked for."""
        channels, height, width = self.native_shape()
        side = self.resolution // 8
        return channels, side or height, side or width

    @contextmanager
    def sized(self, resolution: int) -> Iterator[None]:
        """Context in which pictures have this side, in pixels; 0: what the model was made for."""
        outer, self.resolution = self.resolution, resolution
        try:
            yield
        finally:
            self.resolution = outer

    @abstractmethod
    def lora_key(self, layer: str, matrix: str) -> str:
        """The kohya name of a projection, e.g. `lora_unet_mid_block_attentions_0_..._attn2_to_k`."""

    @abstractmethod
    def weight(self, layer: str, matrix: str) -> Tensor:
        """A projection's weight [out, in] without the LoRAs that are on the model."""

    def identity(self) -> object:
        """Plain values and tensors that are the same for the same model, with all that is on it, from run to run."""
        return [sampled(self.weight(layer, matrix)) for layer in self.cross_attentions() for matrix in MATRICES]

    @abstractmethod
    def training(self, shape: Sequence[int], text: bool = False) -> AbstractContextManager[None]:
        """A context in which autograd works on the host's own, frozen UNet; the host leaves it as it entered.

        `shape` [B, C, h, w] is the largest batch of latents that it has to hold. With `text` autograd works on the
        text encoders too.
        """

    def learn(self, token: str, vectors: TokenEmbeddings) -> None:
        """Adds a token that stands for vectors; raises ForgetError for one that the model knows, and where the host takes
        none."""
        raise ForgetError("This host takes no learned words: put the embedding's file into its own folder.")

    def free_memory(self) -> float:
        """Bytes of a GPU that are free for tensors. Infinite where nobody knows, and on a CPU: what happens to be free must
        not decide how sums are ordered where the same inputs give the same file."""
        if self.device.type != "cuda":
            return math.inf
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        kept = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)  # by torch, for tensors
        return torch.cuda.mem_get_info(index)[0] + kept

    def cache_folder(self) -> Path | None:
        """Where files may be kept that only save time; None where nothing is."""
        return None

    @abstractmethod
    def check_interrupt(self) -> None:
        """Raises the host's own exception if the user has asked to stop."""

    @abstractmethod
    def model_name(self) -> str:
        """What the host calls the model's architecture or file."""
