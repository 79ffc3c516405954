"""The preset `balanced`: the closed form, refined by attention re-steering under a hybrid loss.

The closed form starts a LoRA on K and V. Its downs stay as they are, so what the solution leaves alone (the start token,
the empty prompt, what is kept) stays left alone. Its ups are trained on pictures of the concept: to draw less attention
to it, and to estimate the noise that the untouched model estimates where something else stands in its place.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import concept_mass, tapped
from .concept import Concept, concept_columns
from .errors import ForgetError
from .fast import Edit, Task, edit_factors, make_edit
from .hosts.base import DiffusionHost, Prompts
from .lora import CrossAttentionLoRA
from .losses import mean_attention_loss
from .paraphrases import NEAR_TEMPLATES, fill
from .patch import Patch, make_patch
from .pictures import prepare_pictures
from .resteering import (
    MAX_GRAD_NORM,
    PROBES,
    SAMPLED_AT_ONCE,
    add_noise,
    draw,
    preview,
    region_of,
    sample_pairs,
)
from .settings import ForgetSettings

ATTENTION, KEEP = 0.1, 1.0  # weights beside the noise's, which is 1
CHECK, PATIENCE = 5, 3  # steps between measurements, and how many without progress end the training
STRENGTHS = (0.6, 0.8, 1.0, 1.2)  # tried in the end
LITTLE = 0.5  # of the way left between the concept and its target: more is worth a warning


@dataclass(frozen=True)
class Texts:
    """Encoded prompts: `asked` of the concepts, with their columns [R, T], the concept each row calls for and the template
    it fills, by number; for every template, `places` where something else stands; `near` words that stay; the empty one."""

    asked: Prompts
    columns: Tensor
    concept: list[int]
    template: list[int]
    places: list[Prompts]
    near: Prompts
    empty: Prompts

    @classmethod
    def of(cls, host: DiffusionHost, task: Task) -> Texts:
        templates = NEAR_TEMPLATES[task.type]
        named = [(c, name) for c, names in enumerate(task.names.values()) for name in names]
        rows = [(c, name, i, fill(t, name)) for i, t in enumerate(templates) for c, name in named]
        place = [task.other] if task.other else task.neutral
        return cls(
            asked=host.encode([text for *_, text in rows]),
            columns=torch.stack([concept_columns(host, name, text, "concept") for _, name, _, text in rows]).to(host.device),
            concept=[c for c, *_ in rows],
            template=[i for _, _, i, _ in rows],
            places=[mean_prompt(host.encode([fill(template, word) for word in place])) for template in templates],
            near=host.encode([fill(templates[0], word) for word in (*task.neighbours, *task.keep)] or [""]),
            empty=host.encode([""]),
        )

    def rows(self, concept: int | None) -> list[int]:
        """The rows that call for a concept; all of them for None."""
        return [row for row, own in enumerate(self.concept) if concept in (own, None)]


@dataclass(frozen=True)
class Batch:
    """Noisy latents x_t [B, C, h, w] at t [B] with prompts of the concept and near it, and what the untouched model
    should say to both: [B, C, h, w] each."""

    x_t: Tensor
    t: Tensor
    rows: list[int]
    asked: Prompts
    near: Prompts
    target: Tensor
    kept: Tensor


@torch.no_grad()
def make_batch(
    host: DiffusionHost,
    texts: Texts,
    mode: str,
    noisy: tuple[Tensor, Tensor],
    concept: list[int | None],
    generator: torch.Generator,
) -> Batch:
    """A batch at `noisy` (x_t, t) with drawn prompts, each for the `concept` that the latent shows; call it without a patch.

    The target is the noise estimate where something else stands in the concept's place (Kumari et al., arXiv
    2303.13516, eq. 4). In the mode `correct` that is the dominant concept, and what it adds is taken away (Gandikota et
    al., arXiv 2303.07345, eq. 7, with eta 1).
    """
    x_t, t = noisy
    rows = [(own := texts.rows(c))[draw(len(own), 1, generator)[0]] for c in concept]
    asked, near = texts.asked.take(rows), texts.near.take(draw(len(texts.near), len(x_t), generator))
    target = host.predict(x_t, t, join([texts.places[texts.template[row]] for row in rows]))
    if mode == "correct":
        target = host.predict(x_t, t, asked) - (target - host.predict(x_t, t, texts.empty.take([0] * len(x_t))))
    return Batch(x_t, t, rows, asked, near, target, host.predict(x_t, t, near))


def mean_prompt(several: Prompts) -> Prompts:
    """What encoded prompts have in common, as one prompt: of those that are as long as most."""
    ends = [[token.kind for token in tokens].index("end") for tokens in several.tokens]
    alike = several.take([row for row, end in enumerate(ends) if end == statistics.mode(ends)])
    return replace(
        alike.take([0]),
        embeddings=alike.embeddings.mean(0, keepdim=True),
        pooled=None if alike.pooled is None else alike.pooled.mean(0, keepdim=True),
    )


def join(several: list[Prompts]) -> Prompts:
    """Encoded prompts of one length as one batch."""
    pooled = [p.pooled for p in several]
    return Prompts(
        sum((p.texts for p in several), ()),
        torch.cat([p.embeddings for p in several]),
        None if pooled[0] is None else torch.cat(pooled),
        sum((p.tokens for p in several), ()),
    )


def forget_balanced(
    host: DiffusionHost,
    concepts: tuple[Concept, ...],
    settings: ForgetSettings,
    images: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Patch, list[float]]:
    """A patch in closed form, refined on pictures; returns it and the loss of each step. Arguments as for `forget`."""
    edit = make_edit(host, concepts, settings)
    return refine(host, concepts, settings, edit, gather(host, edit.task, settings, images, mask))


@dataclass(frozen=True)
class Pictures:
    """Pictures of the concepts: latents [P, C, h, w], the concept that each shows, by number, or None for given ones,
    where in them it is [1 or P, H, W], and the pictures [P, H, W, 3] where the host can decode them; prompts for them, and
    the generator of what is drawn next."""

    latents: Tensor
    concept: list[int | None]
    mask: Tensor | None
    images: Tensor | None
    texts: Texts
    generator: torch.Generator

    def of(self, concept: int) -> Tensor:
        """The latents that show a concept."""
        return self.latents[[i for i, own in enumerate(self.concept) if own in (concept, None)]]


def gather(
    host: DiffusionHost, task: Task, settings: ForgetSettings, images: Tensor | None, mask: Tensor | None
) -> Pictures:
    """The pictures and prompts to train on; raises ForgetError for pictures or masks that cannot be used."""
    images, mask = prepare_pictures(host, images, mask, settings.flip)
    texts, generator = Texts.of(host, task), torch.Generator().manual_seed(settings.seed)
    if images is None:
        rows = [i % len(texts.asked) for i in range(max(settings.num_pictures, len(task.names)))]
        with host.training((SAMPLED_AT_ONCE, *host.latent_shape())):
            latents, _ = sample_pairs(host, texts.asked.take(rows), texts.empty, None, settings, generator)
        return Pictures(latents, [texts.concept[row] for row in rows], None, host.decode(latents), texts, generator)
    return Pictures(host.encode_images(images), [None] * len(images), mask, images, texts, generator)


def refine(
    host: DiffusionHost, concepts: tuple[Concept, ...], settings: ForgetSettings, edit: Edit, pictures: Pictures
) -> tuple[Patch, list[float]]:
    """A patch that starts as the edit and is trained on pictures, at the strength that measures best."""
    with host.training((settings.batch_size, *pictures.latents.shape[1:])):
        lora = CrossAttentionLoRA.of(host, edit_factors(host, edit, settings))
        probe = make_probe(host, lora, settings.mode, pictures)
        before = probe(0.0)
        losses, checks, diverged = train(host, lora, settings, pictures, probe)
        readings = {strength: probe(strength) for strength in STRENGTHS}
        strength = min(readings, key=lambda s: readings[s].total)
        after = readings[strength]
    report = edit.report | {
        "steps": len(losses),
        "loss": [losses[0], losses[-1]],
        "strength": strength,
        "attention_mass": {"before": before.mass, "after": after.mass},
        "distance": {"before": before.distance, "fast": checks[0].distance, "after": after.distance},
        "noise drift": after.drift,
    }
    report["warnings"] = [*edit.report["warnings"], *warnings(after, len(losses) if diverged else None, settings)]
    factors = {target: (up * strength, down) for target, (up, down) in lora.factors().items()}
    return make_patch(host, factors, concepts, asdict(settings), report), losses


def train(
    host: DiffusionHost,
    lora: CrossAttentionLoRA,
    settings: ForgetSettings,
    pictures: Pictures,
    probe: Callable[[float], Reading],
) -> tuple[list[float], list[Reading], bool]:
    """Trains the ups until the steps are up or the probe has not fallen for a while, and leaves the best of them.

    Returns the loss of each step, the probe's readings, the first before any step, and whether a loss was not finite,
    which ends it.
    """
    texts, latents, mask, generator = pictures.texts, pictures.latents, pictures.mask, pictures.generator
    layers, ups = host.cross_attentions(), [adapter.up for adapter in lora.values()]
    optimizer = torch.optim.AdamW(ups, lr=settings.learning_rate, weight_decay=0)
    losses, checks, best = [], [probe(1.0)], [up.detach().clone() for up in ups]
    diverged = False
    for step in range(settings.steps):
        host.check_interrupt()
        shown = draw(len(latents), settings.batch_size, generator)
        batch = make_batch(
            host,
            texts,
            settings.mode,
            add_noise(host, latents[shown], generator),
            [pictures.concept[i] for i in shown],
            generator,
        )
        columns = texts.columns[batch.rows]
        with lora.attached():
            with tapped(layers) as maps:
                noise = (host.predict(batch.x_t, batch.t, batch.asked) - batch.target).square().mean()
            regions = None if mask is None else [region_of(mask, shown, A.shape[2], batch.x_t) for A in maps.values()]
            attention = mean_attention_loss(maps.values(), columns, regions)
            drift = (host.predict(batch.x_t, batch.t, batch.near) - batch.kept).square().mean()
        loss = noise + ATTENTION * attention + KEEP * drift
        diverged = not torch.isfinite(loss)
        if diverged:
            break
        gradients = torch.autograd.grad(loss, ups)
        for up, gradient in zip(ups, gradients, strict=True):
            up.grad = gradient
        torch.nn.utils.clip_grad_norm_(ups, MAX_GRAD_NORM)
        optimizer.step()
        losses.append(loss.item())
        host.progress(step + 1, settings.steps, preview(maps, columns, pictures.images, shown, batch.x_t))
        if (step + 1) % CHECK == 0 or step + 1 == settings.steps:
            checks.append(probe(1.0))
            totals = [check.total for check in checks]
            if totals[-1] == min(totals):
                best = [up.detach().clone() for up in ups]
            elif min(totals) not in totals[-PATIENCE:]:
                break
    if not losses:
        raise ForgetError("The loss is not finite at step 1: look for broken pictures.")
    with torch.no_grad():
        for up, value in zip(ups, best, strict=True):
            up.copy_(value)
    return losses, checks, diverged


class Reading(NamedTuple):
    """What a probe measures: mean |estimate - target|^2 for the concept and |change|^2 for what is near, both over the
    untouched model's for the concept; and the share of attention that the concept draws."""

    distance: float
    drift: float
    mass: float

    @property
    def total(self) -> float:
        return self.distance + self.drift


def make_probe(host: DiffusionHost, lora: CrossAttentionLoRA, mode: str, pictures: Pictures) -> Callable[[float], Reading]:
    """A measurement of the LoRA at a strength, the same each time: on fixed latents, one at a time, which takes no more
    memory than training."""
    texts, latents, generator = pictures.texts, pictures.latents, pictures.generator
    shown = draw(len(latents), PROBES, generator)
    x_t, t = add_noise(host, latents[shown], generator)
    batches = [
        make_batch(host, texts, mode, (x_t[i : i + 1], t[i : i + 1]), [pictures.concept[shown[i]]], generator)
        for i in range(PROBES)
    ]

    @torch.no_grad()
    def probe(strength: float) -> Reading:
        distance = drift = scale = mass = 0.0
        for batch in batches:
            with lora.attached(strength):
                with tapped(host.cross_attentions()) as maps:
                    epsilon = host.predict(batch.x_t, batch.t, batch.asked)
                drift += (host.predict(batch.x_t, batch.t, batch.near) - batch.kept).square().mean().item()
            distance += (epsilon - batch.target).square().mean().item()
            mass += concept_mass(maps, texts.columns[batch.rows]).item() / PROBES
            scale += (host.predict(batch.x_t, batch.t, batch.asked) - batch.target).square().mean().item()
        return Reading(distance / max(scale, 1e-12), drift / max(scale, 1e-12), mass)

    return probe


def warnings(after: Reading, diverged: int | None, settings: ForgetSettings) -> list[str]:
    """A sentence for each figure that says the training diverged, after so many steps, did little, or harms."""
    found = []
    if diverged is not None:
        found.append(
            f"The training diverged after step {diverged} of {settings.steps}, and the best state was kept: lower the "
            "learning rate."
        )
    if after.distance > LITTLE:
        found.append(
            f"Little effect: the noise estimate for the concept is still {after.distance:.0%} as far from its target as "
            "without the patch. Give it more `steps`."
        )
    if after.drift > LITTLE:
        found.append(
            f"What is near suffers: its noise estimate moves by {after.drift:.0%} of what the concept's has to. Put what "
            "matters into `keep`, or forget fewer concepts at once."
        )
    return found
