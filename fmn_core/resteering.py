"""The preset `paper`: attention re-steering of a LoRA on the cross-attention (Forget-Me-Not, arXiv 2303.17591)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import AllTaken, concept_mass, layer_size, tapped
from .checkpoint import Checkpoint, State
from .concept import Concept, concept_columns
from .errors import ForgetError
from .fast import word_moments
from .gradient import differentiated
from .heatmap import overlay
from .hosts.base import DiffusionHost, Prompts
from .log import phase
from .lora import CrossAttentionLoRA, LoRAs
from .losses import attention_resteering_loss, visual_denoising_loss
from .memory import Economy, rehearse
from .patch import Patch, make_patch, rest_tensors
from .pictures import prepare_pictures
from .sampling import AT_ONCE, sample_pictures, sampling_calls
from .settings import ForgetSettings

MAX_GRAD_NORM = 1.0  # the original's max_grad_norm
LITTLE = 0.9  # of the attention left: a patch that takes less away is worth a warning
PROBES = 8  # fixed noisy latents on which the attention to the concept is measured before and after


def forget_by_resteering(
    host: DiffusionHost,
    concepts: tuple[Concept, ...],
    settings: ForgetSettings,
    images: Tensor | None = None,
    mask: Tensor | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[Patch, list[float]]:
    """Trains a patch that forgets concepts; returns it and the loss of each step.

    `images` [P, H, W, 3] in 0..1 show the concept; without them the model makes its own. `mask` [1 or P, H, W] in
    0..1 limits the re-steering to a region of them. Raises ForgetError for inputs that cannot work.
    """
    if settings.mode != "remove":
        raise ForgetError(f"The preset `paper` removes, it cannot {settings.mode}: choose another preset.")
    if settings.gradient != "whole" and settings.layers != "cross-attention":
        raise ForgetError(f"`gradient: {settings.gradient}` leaves out what `layers: {settings.layers}` trains: choose one.")
    images, mask = prepare_pictures(host, images, mask, settings.flip)
    layers = host.cross_attentions()
    generator = torch.Generator().manual_seed(settings.seed)

    # The text encoder and the VAE do their work outside the training context: loading them may move the UNet.
    texts = [prompt for concept in concepts for prompt in concept.prompts]
    columns = [concept_columns(host, name, prompt, settings.tokens) for prompt, name in texts]
    prompts, empty = host.encode([prompt for prompt, _ in texts]), host.encode([""])
    moments, unknown = word_moments(host, concepts, settings)
    length = prompts.embeddings.shape[1]  # of the longest; shorter ones are tiled to it
    columns = torch.stack([column.repeat(length // len(column)) for column in columns]).to(host.device)
    pictures_made = max(settings.num_pictures, len(concepts)) if images is None or settings.visual_weight else 0
    calls = sampling_calls(pictures_made, settings.sampling_steps) * (2 if settings.visual_weight else 1)
    with host.one_bar(calls + settings.steps):
        pairs = None
        if pictures_made:
            with phase("forget.pictures", count=pictures_made), host.training((AT_ONCE, *host.latent_shape())):
                rows = [i % len(prompts) for i in range(pictures_made)]
                ignored = columns[rows] if settings.visual_weight else None
                pairs = sample_pairs(host, prompts.take(rows), empty, ignored, settings, generator)
        latents = pairs[0] if images is None else host.encode_images(images)
        pictures = host.decode(latents) if images is None else images

        with host.training((settings.batch_size, *latents.shape[1:])):
            lora = CrossAttentionLoRA(layers, settings.projections, settings.rank, generator).to(host.device)
            whole = settings.layers == "whole unet"
            rest = LoRAs(host.other_layers() if whole else {}, settings.rank, generator).to(host.device)
            probe = make_probe(host, latents, prompts, columns, generator)
            mass_before = probe()
            rehearsal = rehearse(host, *add_noise(host, latents[:1], torch.Generator().manual_seed(0)), prompts.take([0]))

            def patch_of(report: dict) -> Patch:
                patch = make_patch(host, lora.factors(), concepts, asdict(settings), report, moments)
                patch.rest = rest_tensors(rest)
                return patch

            with lora.attached():
                with rest.attached(), phase("forget.train", preset="paper") as told:
                    state = training_state(nn.ModuleList([lora, rest]), settings, generator)
                    checkpoint = checkpoint or Checkpoint()
                    host.skip(checkpoint.resume(state, lambda: patch_of(unfinished(state.losses, settings.steps))))
                    rows = settings.batch_size * (2 if settings.visual_weight else 1)
                    economy = Economy.of(host, rehearsal, rows, rows * settings.steps, settings.gradient)
                    given = (prompts, columns, latents, mask, pairs, pictures)
                    losses = resteer(host, state, *given, settings, economy, checkpoint)
                    mass_with_rest = probe()
                    told["steps"] = len(losses)
                mass = {"before": mass_before, "after": probe()}
            if rest:
                mass["with rest"] = mass_with_rest
            report = {"attention_mass": mass, "loss": [losses[0], losses[-1]]}
            report["warnings"] = warnings(report, len(losses), settings) + unknown
            return patch_of(report), losses


def warnings(report: dict, steps: int, settings: ForgetSettings) -> list[str]:
    """A sentence for each figure of a report that says the patch does nothing, or was not finished."""
    found, mass = [], report["attention_mass"]
    if steps < settings.steps:
        found.append(
            f"The training diverged after step {steps} of {settings.steps}, and the last good state was kept: lower the "
            "learning rate."
        )
    after = mass.get("with rest", mass["after"])
    if after > LITTLE * mass["before"]:
        found.append(
            f"Little effect: the attention to the concept went from {mass['before']:.4f} to {after:.4f}. Raise the "
            "learning rate, or take another preset."
        )
    return found


def sample_pairs(
    host: DiffusionHost,
    asked: Prompts,
    empty: Prompts,
    ignored: Tensor | None,
    settings: ForgetSettings,
    generator: torch.Generator,
    shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Latents [B, C, h, w] of pictures that the model makes of each prompt and, where `ignored` [B, T] names columns, of
    those it makes of the same noise with the attention to them set to zero; `shape` [C, h, w] if not the model's own."""
    noise = torch.randn(len(asked), *(shape or host.latent_shape()), generator=generator).to(host.device)

    def sample(ignored: Tensor | None = None) -> Tensor:
        return sample_pictures(host, noise, asked, empty, settings.sampling_steps, settings.guidance, ignored)

    return sample(), None if ignored is None else sample(ignored)


class Step(NamedTuple):
    """What a step has seen: its loss, maps of some columns and which of them count [B, n], which pictures it drew, and the
    noisy latents."""

    loss: float
    maps: dict[str, Tensor]
    columns: Tensor
    shown: list[int]
    x_t: Tensor


def training_state(lora: nn.Module, settings: ForgetSettings, generator: torch.Generator) -> State:
    """The state of a training that has not begun; `good`: the parameters with which the last loss was finite."""
    parameters = [*lora.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate)
    return State(parameters, optimizer, generator, tensors={"good": [p.detach().clone() for p in parameters]})


def resteer(
    host: DiffusionHost,
    state: State,
    prompts: Prompts,
    columns: Tensor,
    latents: Tensor,
    mask: Tensor | None,
    pairs: tuple[Tensor, Tensor | None] | None,
    pictures: Tensor | None,
    settings: ForgetSettings,
    economy: Economy,
    checkpoint: Checkpoint,
) -> list[float]:
    """Algorithm 1: noise a picture to a random timestep, read the attention, step the LoRA against what attends to
    the concept. Goes on from a state; returns the loss of each step."""
    layers, generator = host.cross_attentions(), state.generator
    parameters, losses, good = state.parameters, state.losses, state.tensors["good"]

    def step() -> Step:
        state.optimizer.zero_grad(set_to_none=True)
        shown = draw(len(latents), settings.batch_size, generator)
        rows = draw(len(prompts), settings.batch_size, generator)
        x_t, t = add_noise(host, latents[shown], generator)
        penalised, asked = penalised_columns(columns[rows])
        # What is hooked on stays until the backward is done, which may compute the forward again.
        with differentiated(host.unet, settings.gradient), tapped(layers, penalised, stop=True) as maps:
            with suppress(AllTaken):
                host.predict(x_t, t, prompts.take(rows))
            regions = None if mask is None else [region_of(mask, shown, A.shape[2], x_t) for A in maps.values()]
            loss = attention_resteering_loss(maps.values(), asked, regions)
            if settings.visual_weight:
                loss = loss + settings.visual_weight * visual_loss(host, prompts, pairs, settings.batch_size, generator)
            if torch.isfinite(loss):
                good[:] = [p.detach().clone() for p in parameters]
                loss.backward()
        return Step(loss.item(), maps, asked, shown, x_t)

    while len(losses) < settings.steps:
        host.check_interrupt()
        taken = economy.take(step, generator)
        if not math.isfinite(taken.loss):
            if not losses:
                raise ForgetError("The loss is not finite at step 1: look for broken pictures.")
            state.take(good)
            break
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        state.optimizer.step()
        losses.append(taken.loss)
        checkpoint.keep()
        shown = preview(taken.maps, taken.columns, pictures, taken.shown, taken.x_t)
        host.progress(len(losses), settings.steps, shown)
    return losses


def penalised_columns(columns: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers [n] of the columns that a mask [B, T] has for any row, and the mask of these [B, n]."""
    numbers = columns.any(0).nonzero()[:, 0]
    return numbers, columns[:, numbers]


def unfinished(losses: list[float], steps: int) -> dict:
    """The report of a patch whose training was stopped."""
    told = f"Unfinished: stopped after step {len(losses)} of {steps}. Queued again, the same inputs go on from there."
    return {"steps": len(losses), "loss": [losses[0], losses[-1]], "warnings": [told]}


def visual_loss(
    host: DiffusionHost, prompts: Prompts, pairs: tuple[Tensor, Tensor], batch_size: int, generator: torch.Generator
) -> Tensor:
    """The visual denoising loss on a batch of generated pairs."""
    made, without = pairs
    shown = draw(len(made), batch_size, generator)
    x_t, t = add_noise(host, made[shown], generator)
    epsilon = host.predict(x_t, t, prompts.take([i % len(prompts) for i in shown]))
    return visual_denoising_loss(x_t, epsilon, host.alphas_cumprod.to(x_t)[t], without[shown])


def draw(total: int, count: int, generator: torch.Generator) -> list[int]:
    """`count` random numbers below `total`."""
    return torch.randint(total, (count,), generator=generator).tolist()


def add_noise(host: DiffusionHost, x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x0 [B, C, h, w] noised to timesteps drawn uniformly, one for each (Ho et al., 2020, eq. 4): x_t and t."""
    return diffuse(host, x0, generator)[:2]


def diffuse(host: DiffusionHost, x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """As add_noise, and the noise itself: x_t, t and epsilon."""
    t = torch.randint(len(host.alphas_cumprod), (len(x0),), generator=generator).to(x0.device)
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    a = host.alphas_cumprod.to(x0)[t][:, None, None, None]
    return a.sqrt() * x0 + (1 - a).sqrt() * noise, t, noise


def region_of(mask: Tensor, shown: list[int], pixels: int, x_t: Tensor) -> Tensor:
    """The pictures' masks at the resolution of a layer that has this many pixels: [B, pixels]."""
    height, width = layer_size(*x_t.shape[-2:], pixels)
    chosen = mask[[i % len(mask) for i in shown], None].to(x_t)
    return rearrange(F.interpolate(chosen, (height, width), mode="area"), "b 1 h w -> b (h w)")


def make_probe(
    host: DiffusionHost, latents: Tensor, prompts: Prompts, columns: Tensor, generator: torch.Generator
) -> Callable[[], float]:
    """A measurement that is the same each time: the share of attention on the penalised columns over fixed latents."""
    shown, rows = draw(len(latents), PROBES, generator), draw(len(prompts), PROBES, generator)
    x_t, t = add_noise(host, latents[shown], generator)

    @torch.no_grad()
    def probe() -> float:
        masses = []
        for i in range(PROBES):  # one at a time: no more memory than a training step
            penalised, asked = penalised_columns(columns[[rows[i]]])
            with tapped(host.cross_attentions(), penalised) as maps:
                host.predict(x_t[i : i + 1], t[i : i + 1], prompts.take([rows[i]]))
                masses.append(concept_mass(maps, asked))
        return torch.stack(masses).mean().item()

    return probe


@torch.no_grad()
def preview(maps: dict[str, Tensor], columns: Tensor, pictures: Tensor | None, shown: list[int], x_t: Tensor) -> Tensor:
    """Where the first picture of the batch attends to the concept: a heat map over the picture, [H, W, 3] in 0..1."""
    height, width = (x * 8 for x in x_t.shape[-2:])
    heat = torch.zeros(1, 1, height, width)
    for A in maps.values():
        h, w = layer_size(*x_t.shape[-2:], A.shape[2])
        mass = rearrange((A[:1] * columns[:1, None, None, :]).sum(-1).mean(1), "1 (h w) -> 1 1 h w", h=h)
        heat += F.interpolate(mass.cpu(), (height, width), mode="bilinear") / len(maps)
    if pictures is None:
        picture = torch.zeros(height, width, 3)
    else:
        picture = F.interpolate(pictures[shown[0]].permute(2, 0, 1)[None].cpu(), (height, width))
        picture = rearrange(picture, "1 c h w -> h w c")
    return overlay(picture, heat[0, 0], opacity=0.6)
