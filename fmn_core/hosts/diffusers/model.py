"""A diffusers pipeline as a DiffusionHost: Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...attention.eager import run_eagerly, uncompiled
from ...errors import ForgetError
from ...host import (
    EMBEDDING_CALL,
    CrossAttention,
    DiffusionHost,
    Prompts,
    Token,
    TokenEmbeddings,
    linear_name,
    sampled,
    weight_of,
)  # fmt: skip
from ...text.templates import placeholder_texts
from .names import sgm_name
from .pipeline import asked_beside_text, beside_latents, require_fit
from .text import put_into, tokens_of

if TYPE_CHECKING:
    from .unet import UNet

PLACES = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}
OF_ANOTHER = re.compile(r"\.(attn2|base_layer|lora_A|lora_B)\.|\.base_layer$")  # what PEFT wraps and puts beside it
ENCODED_PIXELS = 4 * 1024**2  # in a batch of the VAE: four pictures of SDXL's size
LEAST_SIGNAL = 2**-24  # of alphas_cumprod, as diffusers' Euler has it: at none, the noise says nothing of the picture
IMAGE_SIDES = {"sdxl": 128}  # latent pixels where the UNet's config says none; of the other families 64
PLACEHOLDER_TOKEN = re.compile(r"<[^<>\s]+>")


class DiffusersHost(DiffusionHost):
    """A loaded StableDiffusionPipeline or StableDiffusionXLPipeline; its modules are used as they are."""

    unet: UNet

    def __init__(self, pipeline, progress_bar: bool = True, cache: Path | None = None):
        require_fit(pipeline)
        self.pipeline, self.cache = pipeline, cache
        self.unet, self.vae = uncompiled(pipeline.unet), uncompiled(getattr(pipeline, "vae", None))
        self.bar = tqdm(disable=not progress_bar, leave=False)
        self.beside: dict[tuple[int, int], Tensor] = {}  # height and width -> what goes beside latents of that size

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def cache_folder(self) -> Path | None:
        return self.cache

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        return self.pipeline.scheduler.alphas_cumprod.float().cpu().clamp(min=LEAST_SIGNAL)

    @property
    def family(self) -> str:
        if getattr(self.pipeline, "text_encoder_2", None) is not None:
            return "sdxl"
        if self.unet.config.cross_attention_dim == 1024:
            return "sd2_v" if self.predicts_v else "sd2"
        return "sd1"

    @property
    def predicts_v(self) -> bool:
        return self.pipeline.scheduler.config.prediction_type == "v_prediction"

    def model_name(self) -> str:
        return type(self.pipeline).__name__

    def cross_attentions(self) -> dict[str, CrossAttention]:
        return dict(self.layers)

    @cached_property
    def layers(self) -> dict[str, CrossAttention]:
        return {
            name: CrossAttention(name, module, module.heads, PLACES[name.split(".")[0]])
            for place in PLACES
            for name, module in self.unet.named_modules()
            if name.startswith(place) and name.endswith("attn2")
        }

    def other_layers(self) -> dict[str, nn.Module]:
        return {
            f"lora_unet_{name.replace('.', '_')}": module
            for name, module in self.unet.named_modules()
            if isinstance(getattr(module, "base_layer", module), nn.Linear | nn.Conv2d)
            and name.split(".")[0] in PLACES
            and not OF_ANOTHER.search(name)
        }

    def native_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size or IMAGE_SIDES.get(self.family, 64)
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.out_channels, height, width

    @property
    def encoders(self) -> list[tuple]:
        """(tokenizer, text encoder) of the pipeline: one, or SDXL's two."""
        names = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
        pairs = [tuple(getattr(self.pipeline, name, None) for name in pair) for pair in names]
        return [(tokenizer, uncompiled(encoder)) for tokenizer, encoder in pairs if encoder is not None]

    def ids(self, tokenizer, texts: list[str]) -> Tensor:
        options = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
        return tokenizer([self.expanded(tokenizer, text) for text in texts], return_tensors="pt", **options).input_ids

    def expanded(self, tokenizer, text: str) -> str:
        """A prompt with every token of an embedding that has several."""
        learned = len(tokenizer) > tokenizer.vocab_size
        return self.pipeline.maybe_convert_prompt(text, tokenizer) if learned else text

    def tokenize(self, text: str) -> tuple[Token, ...]:
        tokenizer = self.encoders[0][0]
        return tokens_of(tokenizer, self.ids(tokenizer, [text])[0].tolist())

    def missing_embeddings(self, text: str) -> dict[str, str]:
        known = self.encoders[0][0].get_vocab()
        missing = {
            call: "Load the embedding into the pipeline, with --embedding on the command line, or correct the name."
            for call in PLACEHOLDER_TOKEN.findall(text)
            if call not in known
        }
        spelled = "Here an embedding's name stands in angle brackets, `<NAME>`, and its file is given with --embedding."
        return missing | {found[0]: spelled for found in EMBEDDING_CALL.finditer(text)}

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Prompts:
        embeddings, pooled = self.hidden_states(texts, None)
        return Prompts(tuple(texts), embeddings, pooled, tuple(self.tokenize(text) for text in texts))

    @torch.no_grad()
    def encode_prefix(self, texts: list[str], columns: int) -> Tensor:
        return torch.cat([self.hidden_states(some, columns)[0] for some in self.at_once(texts)])

    def hidden_states(self, texts: list[str], columns: int | None) -> tuple[Tensor, Tensor | None]:
        """Embeddings [B, columns, D] in fp32 as the UNet takes them, and SDXL's pooled ones."""
        parts, pooled, two = [], None, len(self.encoders) > 1
        for tokenizer, encoder in self.encoders:
            ids = self.ids(tokenizer, texts)[:, :columns].to(encoder.device)
            output = encoder(ids, output_hidden_states=two)
            if two:  # the last but one layer, without its norm (diffusers, encode_prompt of the XL pipeline)
                parts.append(output.hidden_states[-2])
                pooled = output[0]
            else:
                parts.append(output[0])
        pooled = None if pooled is None else pooled.float().to(self.device)
        return torch.cat(parts, -1).float().to(self.device), pooled

    @property
    def encoder_names(self) -> list[str]:
        """What an embedding's file calls each of the encoders."""
        return ["clip_l", "clip_g"] if self.family == "sdxl" else ["clip_l" if self.family == "sd1" else "clip_h"]

    def learn(self, token: str, vectors: TokenEmbeddings) -> None:
        """Adds a token that stands for vectors to the pipeline; raises ForgetError for one that it knows."""
        for name, (tokenizer, encoder) in zip(self.encoder_names, self.encoders, strict=True):
            if token in tokenizer.get_vocab():
                raise ForgetError(f"The model knows the token {token} already: give the embedding's file another name.")
            self.pipeline.load_textual_inversion(
                {token: vectors[name]}, token=token, tokenizer=tokenizer, text_encoder=encoder
            )

    @torch.no_grad()
    def token_embeddings(self, text: str) -> TokenEmbeddings:
        vectors = {}
        for name, (tokenizer, encoder) in zip(self.encoder_names, self.encoders, strict=True):
            ids = tokenizer(self.expanded(tokenizer, text), add_special_tokens=False, verbose=False).input_ids
            vectors[name] = encoder.get_input_embeddings().weight[ids].float().cpu()
        return vectors

    @torch.no_grad()
    def token_embedding(self, id: int) -> TokenEmbeddings:
        own = [encoder.get_input_embeddings().weight for _, encoder in self.encoders]
        if id >= len(own[0]):
            raise ForgetError(f"There is no token {id}: the text encoder has {len(own[0])}, and the first is 0.")
        return {name: weight[[id]].float().cpu() for name, weight in zip(self.encoder_names, own, strict=True)}

    def encode_with_embeddings(self, template: str, vectors: TokenEmbeddings) -> Prompts:
        texts = placeholder_texts(template, len(next(iter(vectors.values()))))
        with ExitStack() as stack:
            for name, (tokenizer, encoder) in zip(self.encoder_names, self.encoders, strict=True):
                ids, others = self.ids(tokenizer, texts)
                columns = (ids != others).nonzero()[:, 0].tolist()
                hook = encoder.get_input_embeddings().register_forward_hook(put_into(columns, vectors[name]))
                stack.callback(hook.remove)
            embeddings, pooled = self.hidden_states(texts[:1], None)
        return Prompts((template,), embeddings, pooled, (self.tokenize(texts[0]),))

    def predict(self, x_t: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
        if lacking := asked_beside_text(self.unet):
            raise ForgetError(f"{self.model_name()} wants {lacking}, so only the preset `fast` works on it.")
        dtype, added = self.unet.dtype, None
        if prompts.pooled_prompt_embeds is not None:
            height, width = (side * 8 for side in x_t.shape[-2:])
            ids = torch.tensor([[height, width, 0, 0, height, width]], device=x_t.device).expand(len(x_t), -1)
            added = {"text_embeds": prompts.pooled_prompt_embeds.to(dtype), "time_ids": ids.to(dtype)}
        latents = self.with_beside(x_t).to(dtype)
        out = self.unet(latents, t, prompts.prompt_embeds.to(dtype), added_cond_kwargs=added).sample.float()
        if not self.predicts_v:
            return out
        a = self.alphas_cumprod.to(x_t)[t][:, None, None, None]
        return a.sqrt() * out + (1 - a).sqrt() * x_t

    def with_beside(self, x_t: Tensor) -> Tensor:
        """Latents [B, C, h, w] with what the UNet takes beside them, of which there may be nothing."""
        channels, height, width = x_t.shape[1:]
        if self.unet.config.in_channels == channels:
            return x_t
        if (height, width) not in self.beside:
            self.beside[height, width] = beside_latents(self, channels, height, width)
        return torch.cat([x_t, self.beside[height, width].to(x_t).expand(len(x_t), -1, -1, -1)], 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        if self.vae is None:
            raise ForgetError(f"{self.model_name()} is without its vae, which makes latents of pictures: load it whole.")
        at_once = max(ENCODED_PIXELS // (images.shape[1] * images.shape[2]), 1)
        latents = torch.cat([self.encode_few(few) for few in images.split(at_once)])
        return (latents.float() * self.vae.config.scaling_factor).to(self.device)

    def encode_few(self, images: Tensor) -> Tensor:
        """Latents of images [B, H, W, 3] in 0..1, all of them at once and of the VAE's own size."""
        latents = self.vae.encode(images.movedim(-1, 1).to(self.vae.device, self.vae.dtype) * 2 - 1)
        return latents.latents if hasattr(latents, "latents") else latents.latent_dist.mean

    @torch.no_grad()
    def decode_few(self, latents: Tensor) -> Tensor | None:
        if self.vae is None:
            return None
        pixels = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1).movedim(1, -1).cpu()

    def lora_key(self, layer: str, matrix: str) -> str:
        name = sgm_name(layer, self.unet.config.layers_per_block) if self.family == "sdxl" else layer
        return f"lora_unet_{name}_{linear_name(matrix)}".replace(".", "_")

    def weight(self, layer: str, matrix: str) -> Tensor:
        linear = self.unet.get_submodule(f"{layer}.{linear_name(matrix)}")
        return weight_of(getattr(linear, "base_layer", linear))  # PEFT keeps the layer that it wraps

    def identity(self) -> object:
        modules = [self.unet, *(encoder for _, encoder in self.encoders), *([] if self.vae is None else [self.vae])]
        return [self.predicts_v, sampled(self.alphas_cumprod)] + [
            {name: sampled(weight) for name, weight in module.state_dict().items()} for module in modules
        ]

    @contextmanager
    def training(self, shape: Sequence[int], text: bool = False) -> Iterator[None]:
        modules = [self.unet, *(encoder for _, encoder in self.encoders)] if text else [self.unet]
        flags = [(p, p.requires_grad) for module in modules for p in module.parameters()]
        was_training = [module.training for module in modules]
        try:
            for module in modules:
                module.requires_grad_(False).train(False)
            with torch.enable_grad(), run_eagerly(*modules):
                yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for module, mode in zip(modules, was_training, strict=True):
                module.train(mode)

    def show_progress(self, step: int, total: int, preview: Tensor | None) -> None:
        self.bar.total, self.bar.n = total, step
        self.bar.refresh()

    def check_interrupt(self) -> None:
        """Python raises KeyboardInterrupt by itself."""
