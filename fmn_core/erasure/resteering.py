"""The preset `paper`: attention re-steering of a LoRA on the cross-attention (Forget-Me-Not, arXiv 2303.17591)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attention.capture import StopForward, capture_attention_maps, concept_mass, used_tokens
from ..host import DiffusionHost, Prompts
from ..log import phase
from ..lora.layers import CrossAttentionLoRA, LoRAs
from ..patch.patch import Patch, lora_tensors, make_patch
from ..patch.report import PatchReport
from ..patch.statistics import TextStatistics
from ..text.concept import Concept, round_robin
from ..text.tokens import concept_masks
from ..training.gradient import gradient_path
from ..training.images import region_of
from ..training.loop import Descent, Differentiate, Preview, Step, TrainingLoop, TrainingRun, diverged, settled, unfinished
from ..training.losses import attention_resteering_loss, joint_norm_loss, visual_denoising_loss
from ..training.memory import AdaptiveCheckpointing, estimate_memory
from ..training.noise import add_noise, draw
from ..training.preview import preview
from ..training.sampling import AT_ONCE, sample_pairs, sampling_calls
from ..training.state import State
from .closed_form import word_statistics
from .config import ResteeringConfig, projection_names
from .hybrid import PROBES
from .training_data import TrainingImages, given_images
from .unrelated import unrelated_drift, unrelated_prompts, unrelated_warnings

LARGE_ATTENTION = 0.9  # of the attention left: a patch that takes less away is worth a warning


@dataclass(frozen=True)
class Calls:
    """Encoded prompts that call for the concepts, the masks [R, T] of the tokens that are penalized, the number of each
    row's concept, and the empty prompt."""

    prompts: Prompts
    token_mask: Tensor
    concept: list[int]
    empty: Prompts

    @classmethod
    def of(cls, host: DiffusionHost, concepts: tuple[Concept, ...], penalized_tokens: str) -> Calls:
        rows = [(name, prompt, i) for i, concept in enumerate(concepts) for prompt, name in concept.prompts]
        prompts = host.encode([prompt for _, prompt, _ in rows])
        masks = concept_masks(host, [(name, prompt) for name, prompt, _ in rows], penalized_tokens, prompts)
        return cls(prompts, masks, [i for *_, i in rows], host.encode([""]))

    def rows(self, concept: int) -> list[int]:
        """The rows that call for a concept."""
        return [row for row, own in enumerate(self.concept) if own == concept]


@dataclass(frozen=True)
class Pairs:
    """For the visual denoising loss: latents of made pictures, of the same noise without attention to the concept, and the
    row of the prompt that each was made for."""

    made: Tensor
    without: Tensor | None
    rows: list[int]


def forget_by_resteering(run: TrainingRun) -> tuple[Patch, list[float]]:
    """Trains a patch that forgets concepts; returns it and the loss of each step. Raises ForgetError for inputs that cannot
    work."""
    host, config = run.host, run.config
    given = given_images(run, len(run.concepts))
    generator = torch.Generator().manual_seed(config.seed)
    # The text encoder and the VAE do their work outside the training context: loading them may move the UNet.
    calls = Calls.of(host, run.concepts, config.penalized_tokens)
    statistics, unknown = word_statistics(host, run.concepts, config)
    unrelated = unrelated_prompts(host, [name for concept in run.concepts for name in concept.names])
    made_for = rows_to_draw(calls, config, len(run.concepts)) if given[0] is None or config.visual_loss_weight else []
    sampling = sampling_calls(len(made_for), config.num_inference_steps) * (2 if config.visual_loss_weight else 1)
    with host.progress(sampling + config.steps):
        pairs = make_pairs(host, calls, config, made_for, generator) if made_for else None
        images = training_images(host, given, calls, pairs)
        with host.training((config.batch_size, *images.latents.shape[1:])):
            lora = CrossAttentionLoRA(host.cross_attentions(), projection_names(config), config.rank, generator).to(
                host.device
            )
            outside = host.other_layers() if config.train_layers == "whole_unet" else {}
            unet_lora = LoRAs(outside, config.rank, generator).to(host.device)
            training = Resteering(run, calls, images, pairs, lora, unet_lora, statistics, generator)
            report, losses = training.train(unrelated, unknown)
            return training.patch_of(report), losses


def rows_to_draw(calls: Calls, config: ResteeringConfig, concepts: int) -> list[int]:
    """The rows of the prompts that the model makes pictures of, the concepts in turn."""
    return round_robin([calls.rows(i) for i in range(concepts)], max(config.num_images, concepts))


def make_pairs(
    host: DiffusionHost, calls: Calls, config: ResteeringConfig, rows: list[int], generator: torch.Generator
) -> Pairs:
    """The model's own pictures of these rows and, for the visual denoising loss, the same without the concept."""
    with phase("forget.pictures", count=len(rows)), host.training((AT_ONCE, *host.latent_shape())):
        ignored = calls.token_mask[rows] if config.visual_loss_weight else None
        made, without = sample_pairs(
            host, calls.prompts[rows], calls.empty, ignored=ignored, config=config, generator=generator
        )
    return Pairs(made, without, rows)


def training_images(
    host: DiffusionHost, given: tuple[Tensor | None, Tensor | None, list[int]], calls: Calls, pairs: Pairs | None
) -> TrainingImages:
    """The given pictures or the made ones, as a training sees them."""
    images, mask, shows = given
    if images is not None:
        return TrainingImages(host.encode_images(images), shows, mask, images)
    assert pairs is not None  # of what is not given the model makes its own
    images = host.decode(pairs.made) if host.may_show_previews() else None
    return TrainingImages(pairs.made, [calls.concept[row] for row in pairs.rows], mask, images)


@dataclass(frozen=True)
class Resteering:
    """A training by attention re-steering: what it is given, the prompts and pictures that it trains on, the LoRA, an
    ordinary one outside the cross-attention, and what the patch remembers of its words."""

    run: TrainingRun
    calls: Calls
    images: TrainingImages
    pairs: Pairs | None
    lora: CrossAttentionLoRA
    unet_lora: LoRAs
    statistics: TextStatistics | None
    generator: torch.Generator

    def train(self, unrelated: Prompts, unknown: list[str]) -> tuple[PatchReport, list[float]]:
        """Trains the LoRAs; returns the report, with the warnings `unknown` of the text encoder, and the loss of each
        step."""
        host, config = self.run.host, self.run.config
        probe = self.make_probe()
        before = probe()
        x_t, t, _ = add_noise(host, self.images.latents[:1], torch.Generator().manual_seed(0))
        estimate = estimate_memory(host, x_t, t, self.calls.prompts[[0]])
        rows = config.batch_size * (2 if config.visual_loss_weight else 1)
        with self.lora.attached(), host.progress(config.steps) as bar:
            with self.unet_lora.attached(), phase("forget.train", preset="paper") as info:
                parameters = [*nn.ModuleList([self.lora, self.unet_lora]).parameters()]
                optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate)
                state = State(parameters, optimizer, self.generator)
                losses = state.losses
                bar.skip(self.run.checkpoint.resume(state, lambda: self.patch_of(self.unfinished(losses))))
                checkpointing = AdaptiveCheckpointing.of(host, estimate, rows, rows * config.steps, config.backprop)
                loop = TrainingLoop(self.run, Descent(checkpointing, state), config.steps)
                finite = loop.take_steps(config.steps, self.next_step)
                with_unet_lora, finite = settled(state, probe, finite)
                info["steps"] = len(losses)
            mass = {"before": before, "after": probe()}
        if self.unet_lora:
            mass["with_unet_lora"] = with_unet_lora
        drift = unrelated_drift(host, unrelated, self.lora.attached(), self.unet_lora.attached())
        ended = [] if finite else [diverged(len(losses), config.steps)]
        warnings = [*ended, *mass_warnings(mass), *unrelated_warnings(drift), *unknown]
        ends = [losses[0], losses[-1]]
        return PatchReport(attention_mass=mass, loss=ends, unrelated_drift=drift, warnings=warnings), losses

    def next_step(self) -> Step:
        """A step of Algorithm 1: noise a picture to a random timestep, read the attention, and lower what attends to the
        concept."""
        host, config, generator, mask = self.run.host, self.run.config, self.generator, self.images.mask
        resteering_loss = joint_norm_loss if config.loss == "joint_norm" else attention_resteering_loss

        def step(differentiate: Differentiate) -> tuple[float, Preview]:
            pictures = draw(len(self.images.latents), config.batch_size, generator)
            rows = self.images.draw_rows(pictures, self.calls.rows, generator)
            x_t, t, _ = add_noise(host, self.images.latents[pictures], generator)
            indices, token_mask = used_tokens(self.calls.token_mask[rows])
            # What is hooked on stays until the backward is done, which may compute the forward again.
            with (
                gradient_path(host.unet, config.backprop),
                capture_attention_maps(host.cross_attentions(), indices, stop=True) as maps,
            ):
                with suppress(StopForward):
                    host.predict(x_t, t, self.calls.prompts[rows])
                regions = None if mask is None else [region_of(mask, pictures, A.shape[2], x_t) for A in maps.values()]
                loss = resteering_loss(maps.values(), token_mask, regions)
                if config.visual_loss_weight:
                    loss = loss + config.visual_loss_weight * self.visual_loss()
                value = differentiate(loss)
            return value, lambda: preview(maps, token_mask, self.images.images, pictures, x_t)

        return step

    def visual_loss(self) -> Tensor:
        """The visual denoising loss on a batch of generated pairs."""
        host, pairs = self.run.host, self.pairs
        assert pairs is not None and pairs.without is not None  # they are made where the loss has a weight
        pictures = draw(len(pairs.made), self.run.config.batch_size, self.generator)
        x_t, t, _ = add_noise(host, pairs.made[pictures], self.generator)
        epsilon = host.predict(x_t, t, self.calls.prompts[[pairs.rows[i] for i in pictures]])
        return visual_denoising_loss(x_t, epsilon, host.alphas_cumprod.to(x_t)[t], pairs.without[pictures])

    def make_probe(self) -> Callable[[], float]:
        """A measurement that is the same each time: the share of attention on the penalized tokens over fixed latents."""
        host, calls = self.run.host, self.calls
        pictures = draw(len(self.images.latents), PROBES, self.generator)
        rows = self.images.draw_rows(pictures, calls.rows, self.generator)
        x_t, t, _ = add_noise(host, self.images.latents[pictures], self.generator)

        @torch.no_grad()
        def probe() -> float:
            masses = []
            for i in range(PROBES):  # one at a time: no more memory than a training step
                indices, token_mask = used_tokens(calls.token_mask[[rows[i]]])
                with capture_attention_maps(host.cross_attentions(), indices) as maps:
                    host.predict(x_t[i : i + 1], t[i : i + 1], calls.prompts[[rows[i]]])
                    masses.append(concept_mass(maps, token_mask))
            return torch.stack(masses).mean().item()

        return probe

    def unfinished(self, losses: list[float]) -> PatchReport:
        """The report of a training that was stopped."""
        done = len(losses)
        return PatchReport(steps=done, loss=[losses[0], losses[-1]], warnings=[unfinished(done, self.run.config.steps)])

    def patch_of(self, report: PatchReport) -> Patch:
        host, settings, factors = self.run.host, self.run.config.plain(), self.lora.factors()
        patch = make_patch(host, factors, self.run.concepts, settings, report, statistics=self.statistics)
        patch.unet_lora = lora_tensors(self.unet_lora)
        return patch


def mass_warnings(mass: dict[str, float]) -> list[str]:
    """A sentence where the attention to the concept says that the patch does nothing."""
    after = mass.get("with_unet_lora", mass["after"])
    if after <= LARGE_ATTENTION * mass["before"]:
        return []
    return [
        f"Little effect: the attention to the concept went from {mass['before']:.4f} to {after:.4f}. Raise the learning "
        "rate, or choose another preset."
    ]
