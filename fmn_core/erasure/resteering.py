"""The preset `paper`: attention re-steering of a LoRA on the cross-attention (Forget-Me-Not, arXiv 2303.17591)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..attention.capture import AllTaken, concept_mass, layer_size, tapped
from ..errors import ForgetError
from ..host import DiffusionHost, Prompts
from ..log import phase
from ..lora.layers import CrossAttentionLoRA, LoRAs
from ..patch.patch import Patch, make_patch, rest_tensors
from ..text.concept import Concept, concept_columns, in_turn
from ..training.checkpoint import Checkpoint
from ..training.gradient import differentiated
from ..training.images import concept_pictures
from ..training.loop import Descent, diverged, settled
from ..training.losses import attention_resteering_loss, joint_norm_loss, visual_denoising_loss
from ..training.memory import Economy, rehearse
from ..training.noise import add_noise, draw
from ..training.preview import preview
from ..training.sampling import AT_ONCE, sample_pairs, sampling_calls
from ..training.state import State
from .closed_form import word_moments
from .config import ForgetSettings
from .unrelated import unrelated_drift, unrelated_prompts, unrelated_warnings

LITTLE = 0.9  # of the attention left: a patch that takes less away is worth a warning
PROBES = 8  # fixed noisy latents on which the attention to the concept is measured before and after


def forget_by_resteering(
    host: DiffusionHost,
    concepts: tuple[Concept, ...],
    settings: ForgetSettings,
    images: Tensor | None = None,
    mask: Tensor | None = None,
    checkpoint: Checkpoint | None = None,
    concept_of: Sequence[int] | None = None,
) -> tuple[Patch, list[float]]:
    """Trains a patch that forgets concepts; returns it and the loss of each step.

    `images` [P, H, W, 3] in 0..1 show the concepts, each the one that `concept_of` has the number of, or each concept an
    equal part of them; without them the model makes its own. `mask` [1 or P, H, W] in 0..1 limits the re-steering to a
    region of them. Raises ForgetError for inputs that cannot work.
    """
    if settings.mode != "remove":
        raise ForgetError(f"The preset `paper` removes, it cannot {settings.mode}: choose another preset.")
    if settings.gradient != "whole" and settings.layers != "cross-attention":
        raise ForgetError(f"`gradient: {settings.gradient}` leaves out what `layers: {settings.layers}` trains: choose one.")
    images, mask, shows = concept_pictures(host, images, mask, settings.flip, len(concepts), concept_of)
    layers = host.cross_attentions()
    generator = torch.Generator().manual_seed(settings.seed)

    # The text encoder and the VAE do their work outside the training context: loading them may move the UNet.
    texts = [(prompt, name, i) for i, concept in enumerate(concepts) for prompt, name in concept.prompts]
    calls_for = [[row for row, (*_, own) in enumerate(texts) if own == i] for i in range(len(concepts))]
    columns = [concept_columns(host, name, prompt, settings.tokens) for prompt, name, _ in texts]
    prompts, empty = host.encode([prompt for prompt, *_ in texts]), host.encode([""])
    moments, unknown = word_moments(host, concepts, settings)
    others = unrelated_prompts(host, [name for concept in concepts for name in concept.names])
    length = prompts.embeddings.shape[1]  # of the longest; shorter ones are tiled to it
    columns = torch.stack([column.repeat(length // len(column)) for column in columns]).to(host.device)
    makes = images is None or settings.visual_weight
    made_for = in_turn(calls_for, max(settings.num_pictures, len(concepts))) if makes else []  # prompts' rows
    calls = sampling_calls(len(made_for), settings.sampling_steps) * (2 if settings.visual_weight else 1)
    with host.one_bar(calls + settings.steps):
        pairs = None
        if made_for:
            with phase("forget.pictures", count=len(made_for)), host.training((AT_ONCE, *host.latent_shape())):
                ignored = columns[made_for] if settings.visual_weight else None
                pairs = sample_pairs(host, prompts.take(made_for), empty, ignored, settings, generator)
        latents = pairs[0] if images is None else host.encode_images(images)
        if images is None and host.may_show_previews():
            images = host.decode(latents)
        asked = [calls_for[i] for i in shows] if shows else [calls_for[texts[row][2]] for row in made_for]
        pictures = Pictures(latents, asked, mask, images, pairs, made_for)

        with host.training((settings.batch_size, *latents.shape[1:])):
            lora = CrossAttentionLoRA(layers, settings.projections, settings.rank, generator).to(host.device)
            whole = settings.layers == "whole unet"
            rest = LoRAs(host.other_layers() if whole else {}, settings.rank, generator).to(host.device)
            probe = make_probe(host, pictures, prompts, columns, generator)
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
                    losses = resteer(host, state, prompts, columns, pictures, settings, economy, checkpoint)
                    mass_with_rest, well = settled(state, probe, len(losses) == settings.steps)
                    told["steps"] = len(losses)
                mass = {"before": mass_before, "after": probe()}
            if rest:
                mass["with rest"] = mass_with_rest
            drift = unrelated_drift(host, others, lora.attached(), rest.attached())
            report = {"attention_mass": mass, "loss": [losses[0], losses[-1]], "unrelated drift": drift}
            ended = [] if well else [diverged(len(losses), settings.steps)]
            report["warnings"] = [*ended, *warnings(mass), *unrelated_warnings(drift), *unknown]
            return patch_of(report), losses


def warnings(mass: dict[str, float]) -> list[str]:
    """A sentence where the attention to the concept says that the patch does nothing."""
    after = mass.get("with rest", mass["after"])
    if after <= LITTLE * mass["before"]:
        return []
    return [
        f"Little effect: the attention to the concept went from {mass['before']:.4f} to {after:.4f}. Raise the learning "
        "rate, or take another preset."
    ]


@dataclass(frozen=True)
class Pictures:
    """What a training sees: latents [P, C, h, w], the rows of the prompts that call for what each shows, where in them it
    is [1 or P, H, W], and the pictures [P, H, W, 3] where they were given or may be seen; `pairs` for the visual denoising
    loss, and the row of the prompt that each was made for."""

    latents: Tensor
    asked: list[list[int]]
    mask: Tensor | None
    images: Tensor | None
    pairs: tuple[Tensor, Tensor | None] | None = None
    made_for: Sequence[int] = ()

    def draw(self, count: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
        """The numbers of so many pictures, and for each the row of a prompt that calls for what it shows."""
        shown = draw(len(self.latents), count, generator)
        return shown, [(own := self.asked[i])[draw(len(own), 1, generator)[0]] for i in shown]


class Step(NamedTuple):
    """What a step has seen: its loss, maps of some columns and which of them count [B, n], which pictures it drew, and the
    noisy latents."""

    loss: float
    maps: dict[str, Tensor]
    columns: Tensor
    shown: list[int]
    x_t: Tensor


def training_state(lora: nn.Module, settings: ForgetSettings, generator: torch.Generator) -> State:
    """The state of a training that has not begun."""
    parameters = [*lora.parameters()]
    return State(parameters, torch.optim.AdamW(parameters, lr=settings.learning_rate), generator)


def resteer(
    host: DiffusionHost,
    state: State,
    prompts: Prompts,
    columns: Tensor,
    pictures: Pictures,
    settings: ForgetSettings,
    economy: Economy,
    checkpoint: Checkpoint,
) -> list[float]:
    """Algorithm 1: noise a picture to a random timestep, read the attention, step the LoRA against what attends to
    the concept. Goes on from a state; returns the loss of each step, up to one that is not finite."""
    layers, generator, mask = host.cross_attentions(), state.generator, pictures.mask
    losses, descent = state.losses, Descent(economy, state)
    resteering_loss = joint_norm_loss if settings.loss == "joint norm" else attention_resteering_loss

    def step(differentiate: Callable[[Tensor], float]) -> Step:
        shown, rows = pictures.draw(settings.batch_size, generator)
        x_t, t = add_noise(host, pictures.latents[shown], generator)
        penalised, asked = penalised_columns(columns[rows])
        # What is hooked on stays until the backward is done, which may compute the forward again.
        with differentiated(host.unet, settings.gradient), tapped(layers, penalised, stop=True) as maps:
            with suppress(AllTaken):
                host.predict(x_t, t, prompts.take(rows))
            regions = None if mask is None else [region_of(mask, shown, A.shape[2], x_t) for A in maps.values()]
            loss = resteering_loss(maps.values(), asked, regions)
            if settings.visual_weight:
                loss = loss + settings.visual_weight * visual_loss(host, prompts, pictures, settings.batch_size, generator)
            return Step(differentiate(loss), maps, asked, shown, x_t)

    while len(losses) < settings.steps and (taken := descent.take(step)) is not None:
        losses.append(taken.loss)
        checkpoint.keep()
        show = partial(preview, taken.maps, taken.columns, pictures.images, taken.shown, taken.x_t)
        host.progress(len(losses), settings.steps, show)
    return losses


def penalised_columns(columns: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers [n] of the columns that a mask [B, T] has for any row, and the mask of these [B, n]."""
    numbers = columns.any(0).nonzero()[:, 0]
    return numbers, columns[:, numbers]


def unfinished(losses: list[float], steps: int) -> dict:
    """The report of a patch whose training was stopped."""
    told = (
        f"Unfinished: stopped after step {len(losses)} of {steps}. Queued again, the same inputs go on from the last saved "
        "step."
    )
    return {"steps": len(losses), "loss": [losses[0], losses[-1]], "warnings": [told]}


def visual_loss(
    host: DiffusionHost, prompts: Prompts, pictures: Pictures, batch_size: int, generator: torch.Generator
) -> Tensor:
    """The visual denoising loss on a batch of generated pairs."""
    made, without = pictures.pairs
    shown = draw(len(made), batch_size, generator)
    x_t, t = add_noise(host, made[shown], generator)
    epsilon = host.predict(x_t, t, prompts.take([pictures.made_for[i] for i in shown]))
    return visual_denoising_loss(x_t, epsilon, host.alphas_cumprod.to(x_t)[t], without[shown])


def region_of(mask: Tensor, shown: list[int], pixels: int, x_t: Tensor) -> Tensor:
    """The pictures' masks at the resolution of a layer that has this many pixels: [B, pixels]."""
    height, width = layer_size(*x_t.shape[-2:], pixels)
    chosen = mask[[i % len(mask) for i in shown], None].to(x_t)
    return rearrange(F.interpolate(chosen, (height, width), mode="area"), "b 1 h w -> b (h w)")


def make_probe(
    host: DiffusionHost, pictures: Pictures, prompts: Prompts, columns: Tensor, generator: torch.Generator
) -> Callable[[], float]:
    """A measurement that is the same each time: the share of attention on the penalised columns over fixed latents."""
    shown, rows = pictures.draw(PROBES, generator)
    x_t, t = add_noise(host, pictures.latents[shown], generator)

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
