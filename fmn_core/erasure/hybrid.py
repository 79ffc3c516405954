"""Training on pictures under a hybrid loss: what the presets `balanced` and `robust` share.

A LoRA learns, on pictures of the concept, to draw less attention to it and to estimate the noise that the unpatched model
estimates where something else takes its place, while estimates for near words stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention.capture import capture_attention_maps, concept_mass, used_tokens
from ..errors import ForgetError
from ..host import Prompts
from ..lora.layers import CrossAttentionLoRA
from ..patch.patch import Patch, make_patch
from ..patch.report import PatchReport
from ..training.images import region_of
from ..training.loop import Differentiate, Preview, Step, TrainingRun, unfinished
from ..training.losses import mean_attention_loss, noise_weight
from ..training.memory import AdaptiveCheckpointing, estimate_memory
from ..training.noise import add_noise, draw
from ..training.preview import preview
from .closed_form import LinearEdit
from .training_data import PromptSet, TrainingImages
from .unrelated import unrelated_drift, unrelated_warnings

ATTENTION, PRESERVE = 0.1, 1.0  # weights beside the noise's, which is 1
PROBES = 8  # fixed noisy latents on which a training is measured
LARGE_DISTANCE = 0.5  # of the way left between the concept and its target: more is worth a warning


@dataclass(frozen=True)
class Batch:
    """Noisy latents x_t [B, C, h, w] at t [B] with prompts of the concept that they show, and y_t at u with prompts of
    near words; what the patched model should say to the first, and to the second what the unpatched model says."""

    x_t: Tensor
    t: Tensor
    indices: list[int]  # of the pictures
    rows: list[int]  # of the prompts
    prompts: Prompts
    target: Tensor
    y_t: Tensor
    u: Tensor
    near: Prompts
    near_target: Tensor


class ProbeResult(NamedTuple):
    """Mean |estimate - target|^2 for the concept and |change|^2 for what is near, both over the unpatched model's for the
    concept; and the share of attention that the concept draws."""

    target_error: float
    preserve_error: float
    attention_mass: float

    @property
    def total(self) -> float:
        return self.target_error + self.preserve_error


@dataclass
class HybridTraining:
    """A training under the hybrid loss: what it is given, the closed-form edit that it starts from, the LoRA, what it trains
    on, and `eta`, how far beyond its target the concept's estimate should go."""

    run: TrainingRun
    edit: LinearEdit
    lora: CrossAttentionLoRA
    prompts: PromptSet
    images: TrainingImages
    generator: torch.Generator
    eta: float = 0.0

    @torch.no_grad()
    def make_batch(self, size: int) -> Batch:
        """Drawn pictures, noised, with drawn prompts; call it without the LoRA attached.

        The target is the noise estimate where something else takes the concept's place (Kumari et al., arXiv 2303.13516,
        eq. 4), and `eta` times as far beyond it (Gandikota et al., arXiv 2303.07345, eq. 7). In the mode `correct` the
        other thing is the dominant concept, and what it adds to the empty prompt is taken away from the word's own.
        """
        host, images, generator = self.run.host, self.images, self.generator
        indices = draw(len(images.latents), size, generator)
        x_t, t, _ = add_noise(host, images.latents[indices], generator)
        rows = images.draw_rows(indices, self.prompts.rows, generator)
        prompts = self.prompts.prompts[rows]
        target = host.predict(x_t, t, self.prompts.targets(rows))
        if self.run.config.mode == "correct":
            target = host.predict(x_t, t, prompts) - (target - host.predict(x_t, t, self.prompts.empty[[0] * size]))
        elif self.eta:
            target = target + self.eta * (target - host.predict(x_t, t, prompts))
        y_t, u, words = x_t, t, draw(len(self.prompts.near), size, generator)
        if images.near is not None:  # these words' own pictures too
            own = draw(len(images.near), size, generator)
            own_t, own_u, _ = add_noise(host, images.near[own], generator)
            y_t, u, words = torch.cat([own_t, x_t]), torch.cat([own_u, t]), own + words
        near = self.prompts.near[words]
        return Batch(x_t, t, indices, rows, prompts, target, y_t, u, near, host.predict(y_t, u, near))

    def next_step(self) -> Step:
        """A step down the hybrid loss: |estimate - target|^2 for the concept, plus its attention, plus |change|^2 for what
        is near. Errors of noise are weighted as errors of x0, since what a picture will show is decided where there is most
        noise."""
        host, images, batch = self.run.host, self.images, self.make_batch(self.run.config.batch_size)
        indices, token_mask = used_tokens(self.prompts.token_mask[batch.rows])

        def step(differentiate: Differentiate) -> tuple[float, Preview]:
            # What is hooked on stays until the backward is done, which may compute the forwards again.
            with self.lora.attached(), capture_attention_maps(host.cross_attentions(), indices) as maps:
                error = host.predict(batch.x_t, batch.t, batch.prompts) - batch.target
                change = host.predict(batch.y_t, batch.u, batch.near) - batch.near_target
                regions = None
                if images.mask is not None:
                    regions = [region_of(images.mask, batch.indices, A.shape[2], batch.x_t) for A in maps.values()]
                attention = mean_attention_loss(maps.values(), token_mask, regions)
                weight, near_weight = (noise_weight(host.alphas_cumprod.to(batch.x_t)[t]) for t in (batch.t, batch.u))
                noise, drift = (weight * error.square()).mean(), (near_weight * change.square()).mean()
                loss = differentiate(noise + ATTENTION * attention + PRESERVE * drift)
            return loss, lambda: preview(maps, token_mask, images.images, batch.indices, batch.x_t)

        return step

    def make_probe(self) -> Callable[[float], ProbeResult]:
        """A measurement of the LoRA at a strength, the same each time: on fixed latents, one at a time, which takes no more
        memory than training."""
        host, prompts = self.run.host, self.prompts
        batches = [self.make_batch(1) for _ in range(PROBES)]
        with torch.no_grad():
            unpatched = [host.predict(batch.x_t, batch.t, batch.prompts) - batch.target for batch in batches]
        scale = max(sum(error.square().mean().item() for error in unpatched), 1e-12)

        @torch.no_grad()
        def probe(strength: float) -> ProbeResult:
            target_error = preserve_error = mass = 0.0
            for batch in batches:
                host.check_interrupt()
                indices, token_mask = used_tokens(prompts.token_mask[batch.rows])
                with self.lora.attached(strength):
                    with capture_attention_maps(host.cross_attentions(), indices) as maps:
                        epsilon = host.predict(batch.x_t, batch.t, batch.prompts)
                    near = host.predict(batch.y_t, batch.u, batch.near)
                preserve_error += (near - batch.near_target).square().mean().item()
                target_error += (epsilon - batch.target).square().mean().item()
                mass += concept_mass(maps, token_mask).item() / PROBES
            return ProbeResult(target_error / scale, preserve_error / scale, mass)

        return probe

    def checkpointing(self, rows: int, steps: int) -> AdaptiveCheckpointing:
        """For so many steps, each on this many rows of a picture and a prompt, all of which the unpatched model predicts
        first."""
        host = self.run.host
        x_t, t, _ = add_noise(host, self.images.latents[:1], torch.Generator().manual_seed(0))
        return AdaptiveCheckpointing.of(
            host, estimate_memory(host, x_t, t, self.prompts.prompts[[0]]), rows, 1.5 * rows * steps
        )

    def finish(
        self, results: dict[str, ProbeResult], strength: float, losses: list[float], warnings: list[str], **more: object
    ) -> Patch:
        """The patch of the trained LoRA at a strength, with its report; `results` are of the model `before`, of the `fast`
        edit and `after`, `warnings` of the training, `more` goes into the report. Raises ForgetError where `after` is not
        finite."""
        after = results["after"]
        if not all(map(math.isfinite, after)):
            raise ForgetError("The trained patch gives no finite estimates: lower the learning rate.")
        drift = unrelated_drift(self.run.host, self.prompts.unrelated, self.lora.attached(strength))
        stopped_early = len(losses) < self.run.config.steps and not warnings
        report = self.edit.report.updated(
            steps=len(losses),
            loss=[losses[0], losses[-1]],
            strength=strength,
            attention_mass={when: results[when].attention_mass for when in ("before", "after")},
            target_error={when: result.target_error for when, result in results.items()},
            noise_drift=after.preserve_error,
            unrelated_drift=drift,
            warnings=[
                *warnings,
                *self.edit.report.warnings,
                *hybrid_warnings(after, stopped_early, len(self.edit.plan.names)),
                *unrelated_warnings(drift),
            ],
            **more,
        )
        return self.patch_of(report, strength)

    def unfinished_patch(self, losses: list[float], steps: int) -> Patch:
        """The patch of a training that was stopped; nothing is measured, since whoever stops it wants to resume."""
        warnings = [unfinished(len(losses), steps), *self.edit.report.warnings]
        report = self.edit.report.updated(steps=len(losses), loss=[losses[0], losses[-1]], warnings=warnings)
        return self.patch_of(report, 1.0)

    def patch_of(self, report: PatchReport, strength: float) -> Patch:
        factors = {target: (up * strength, down) for target, (up, down) in self.lora.factors().items()}
        settings, statistics = self.run.config.plain(), self.edit.statistics
        return make_patch(self.run.host, factors, self.run.concepts, settings, report, statistics=statistics)


def hybrid_warnings(after: ProbeResult, stopped_early: bool, concepts: int) -> list[str]:
    """A sentence for each figure that says the training of so many concepts did little, or harms; `stopped_early`: it ended
    before its steps were up, since they no longer helped."""
    found = []
    if after.target_error > LARGE_DISTANCE:
        found.append(
            f"Little effect: the noise estimate for the concept is still {after.target_error:.0%} as far from its target as "
            f"without the patch. {'Raise `learning_rate` or `rank`.' if stopped_early else 'Give it more `steps`.'}"
        )
    if after.preserve_error > LARGE_DISTANCE:
        found.append(
            f"Near words suffer: their noise estimates move by {after.preserve_error:.0%} of what the concept's has to. Put "
            f"what matters into `preserve`{', or forget fewer concepts at once' if concepts > 1 else ''}."
        )
    return found
