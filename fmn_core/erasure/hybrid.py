"""Training on pictures under a hybrid loss: what the presets `balanced` and `robust` share.

A LoRA learns, on pictures of the concept, to draw less attention to it and to estimate the noise that the untouched model
estimates where something else stands in its place, while estimates for near words stay.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention.capture import concept_mass, tapped
from ..errors import ForgetError
from ..host import DiffusionHost, Prompts
from ..log import phase
from ..lora.layers import CrossAttentionLoRA
from ..patch.patch import Patch, make_patch
from ..text.concept import Concept, concept_columns, in_turn
from ..text.features import NEAR_TEMPLATES, fill
from ..training.images import concept_pictures
from ..training.loop import Descent
from ..training.losses import mean_attention_loss
from ..training.memory import Economy, rehearse
from ..training.noise import add_noise, draw
from ..training.preview import preview
from ..training.sampling import AT_ONCE, sample_pairs, sampling_calls
from .closed_form import Edit
from .config import ForgetSettings
from .plan import Task
from .resteering import PROBES, penalised_columns, region_of, unfinished
from .unrelated import unrelated_drift, unrelated_prompts, unrelated_warnings

ATTENTION, KEEP = 0.1, 1.0  # weights beside the noise's, which is 1
MOST = 20.0  # the largest weight of an error, where there is most noise
LITTLE = 0.5  # of the way left between the concept and its target: more is worth a warning


@dataclass(frozen=True)
class Texts:
    """Encoded prompts: `asked` of the concepts, with their columns [R, T], the concept each row calls for and the template
    it fills, by number; for every template, `places` where something else stands; `near` words that stay; the empty one; and
    `unrelated` ones to look at in the end."""

    asked: Prompts
    columns: Tensor
    concept: list[int]
    template: list[int]
    places: list[Prompts]
    near: Prompts
    empty: Prompts
    unrelated: Prompts

    @classmethod
    def of(cls, host: DiffusionHost, task: Task) -> Texts:
        named = [(c, name) for c, names in enumerate(task.names.values()) for name in names]
        rows = [(c, name, i, fill(t, name)) for i, t in enumerate(task.asked) for c, name in named]
        place = [task.other] if task.other else task.neutral
        asked = host.encode([text for *_, text in rows])
        columns = [concept_columns(host, name, text, "concept") for _, name, _, text in rows]
        return cls(
            asked=asked,
            columns=torch.stack([tiled(column, asked.embeddings.shape[1]) for column in columns]).to(host.device),
            concept=[c for c, *_ in rows],
            template=[i for _, _, i, _ in rows],
            places=[mean_prompt(host.encode([fill(template, word) for word in place])) for template in task.asked],
            near=host.encode([fill(NEAR_TEMPLATES[task.type][0], word) for word in task.near] or [""]),
            empty=host.encode([""]),
            unrelated=unrelated_prompts(host, task.forgotten),
        )

    @property
    def concepts(self) -> int:
        """How many concepts there are."""
        return max(self.concept) + 1

    def rows(self, concept: int) -> list[int]:
        """The rows that call for a concept."""
        return [row for row, own in enumerate(self.concept) if own == concept]

    def with_row(self, prompt: Prompts, columns: Tensor, concept: int, template: int) -> Texts:
        """The same with one more prompt of a concept, its columns [T]."""
        asked = join([self.asked, prompt])
        both = [tiled(own, asked.embeddings.shape[1]) for own in (*self.columns, columns.to(self.columns.device))]
        return replace(
            self,
            asked=asked,
            columns=torch.stack(both),
            concept=[*self.concept, concept],
            template=[*self.template, template],
        )


def mean_prompt(several: Prompts) -> Prompts:
    """What encoded prompts have in common, as one prompt: of those that are as long as most."""
    ends = [[token.kind for token in tokens].index("end") for tokens in several.tokens]
    common = statistics.mode(ends)
    alike = several.take([row for row, end in enumerate(ends) if end == common])
    return replace(
        alike.take([0]),
        embeddings=alike.embeddings.mean(0, keepdim=True),
        pooled=None if alike.pooled is None else alike.pooled.mean(0, keepdim=True),
    )


def join(several: list[Prompts]) -> Prompts:
    """Encoded prompts as one batch, tiled to a common length where they differ, as hosts do."""
    pooled = [p.pooled for p in several]
    length = math.lcm(*(p.embeddings.shape[1] for p in several))
    return Prompts(
        sum((p.texts for p in several), ()),
        torch.cat([p.embeddings.repeat(1, length // p.embeddings.shape[1], 1) for p in several]),
        None if pooled[0] is None else torch.cat(pooled),
        tuple(row * (length // len(row)) for p in several for row in p.tokens),
    )


def tiled(columns: Tensor, length: int) -> Tensor:
    """A mask [T] repeated to this length."""
    return columns.repeat(length // len(columns))


@dataclass(frozen=True)
class Pictures:
    """Pictures of the concepts or of their places: latents [P, C, h, w], the concept of each, by number, where in them it
    is [1 or P, H, W], and the pictures [P, H, W, 3] where they were given or may be seen; `near`: latents of the first near
    words, one each, or none."""

    latents: Tensor
    concept: list[int]
    mask: Tensor | None
    images: Tensor | None
    near: Tensor | None = None

    def of(self, concept: int) -> Tensor:
        """The latents that show a concept."""
        return self.latents[[i for i, own in enumerate(self.concept) if own == concept]]


def gather(
    host: DiffusionHost,
    texts: Texts,
    settings: ForgetSettings,
    images: Tensor | None,
    mask: Tensor | None,
    generator: torch.Generator,
    concept_of: Sequence[int] | None = None,
    of_places: bool = False,
) -> Pictures:
    """The pictures to train on: those given, or the model's own of the concepts or, with `of_places`, of what stands in
    their place. Raises ForgetError for given ones that cannot be used."""
    images, mask, shows = concept_pictures(host, images, mask, settings.flip, texts.concepts, concept_of)
    if images is not None:
        return Pictures(host.encode_images(images), shows, mask, images)
    rows = in_turn([texts.rows(concept) for concept in range(texts.concepts)], max(settings.num_pictures, texts.concepts))
    places = join([texts.places[texts.template[row]] for row in rows])
    with phase("forget.pictures", count=len(rows)):
        latents = sample(host, places if of_places else texts.asked.take(rows), texts.empty, settings, generator)
        images = host.decode(latents) if host.may_show_previews() else None
    return Pictures(latents, [texts.concept[row] for row in rows], None, images)


def gather_calls(texts: Texts, settings: ForgetSettings, images: Tensor | None) -> int:
    """How many steps `gather` tells the host of."""
    return 0 if images is not None else sampling_calls(max(settings.num_pictures, texts.concepts), settings.sampling_steps)


def sample(
    host: DiffusionHost,
    asked: Prompts,
    empty: Prompts,
    settings: ForgetSettings,
    generator: torch.Generator,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """Latents of a picture for each prompt, of a shape [C, h, w] that may be other than the model's own."""
    shape = shape or host.latent_shape()
    with host.training((AT_ONCE, *shape)):
        return sample_pairs(host, asked, empty, None, settings, generator, shape)[0]


@dataclass(frozen=True)
class Batch:
    """Noisy latents x_t [B, C, h, w] at t [B] with prompts of the concept that they show, and y_t at u with prompts of
    near words; what the patched model should say to the first, and to the second what the untouched model says."""

    x_t: Tensor
    t: Tensor
    shown: list[int]
    rows: list[int]
    asked: Prompts
    target: Tensor
    y_t: Tensor
    u: Tensor
    near: Prompts
    kept: Tensor


@torch.no_grad()
def make_batch(
    host: DiffusionHost,
    texts: Texts,
    pictures: Pictures,
    settings: ForgetSettings,
    size: int,
    eta: float,
    generator: torch.Generator,
) -> Batch:
    """Drawn pictures, noised, with drawn prompts; call it without a patch.

    The target is the noise estimate where something else stands in the concept's place (Kumari et al., arXiv
    2303.13516, eq. 4), and `eta` times as far beyond it (Gandikota et al., arXiv 2303.07345, eq. 7). In the mode `correct`
    the other thing is the dominant concept, and what it adds to the empty prompt is taken away from the word's own.
    """
    shown = draw(len(pictures.latents), size, generator)
    x_t, t = add_noise(host, pictures.latents[shown], generator)
    rows = [(own := texts.rows(pictures.concept[i]))[draw(len(own), 1, generator)[0]] for i in shown]
    asked = texts.asked.take(rows)
    target = host.predict(x_t, t, join([texts.places[texts.template[row]] for row in rows]))
    if settings.mode == "correct":
        target = host.predict(x_t, t, asked) - (target - host.predict(x_t, t, texts.empty.take([0] * size)))
    elif eta:
        target = target + eta * (target - host.predict(x_t, t, asked))
    y_t, u, near = x_t, t, draw(len(texts.near), size, generator)
    if pictures.near is not None:  # these words' own pictures too
        own = draw(len(pictures.near), size, generator)
        own_t, own_u = add_noise(host, pictures.near[own], generator)
        y_t, u, near = torch.cat([own_t, x_t]), torch.cat([own_u, t]), own + near
    near = texts.near.take(near)
    return Batch(x_t, t, shown, rows, asked, target, y_t, u, near, host.predict(y_t, u, near))


def batch_preview(maps: dict[str, Tensor], texts: Texts, pictures: Pictures, batch: Batch) -> Tensor:
    """Where the first picture of a batch attends to its concept, by the maps of a step: [H, W, 3] in 0..1."""
    _, columns = penalised_columns(texts.columns[batch.rows])
    return preview(maps, columns, pictures.images, batch.shown, batch.x_t)


def make_economy(host: DiffusionHost, texts: Texts, pictures: Pictures, rows: int, steps: int) -> Economy:
    """An Economy for so many steps, each on this many rows of a picture and a prompt, of all of which the untouched model
    is asked first."""
    x_t, t = add_noise(host, pictures.latents[:1], torch.Generator().manual_seed(0))
    return Economy.of(host, rehearse(host, x_t, t, texts.asked.take([0])), rows, 1.5 * rows * steps)


def train_step(
    host: DiffusionHost,
    lora: CrossAttentionLoRA,
    descent: Descent,
    texts: Texts,
    pictures: Pictures,
    batch: Batch,
) -> tuple[float, dict[str, Tensor]] | None:
    """A step down the hybrid loss: |estimate - target|^2 for the concept, plus its attention, plus |change|^2 for what is
    near. Returns the loss and the attention maps; takes no step, and returns None, where they or the gradient are not
    finite.

    Errors of noise are weighted as errors of x0, by min((1 - a) / a, MOST) (after min-SNR, Hang et al., arXiv 2303.09556),
    since what a picture will show is decided where there is most noise.
    """

    def weight(t: Tensor) -> Tensor:
        a = host.alphas_cumprod.to(batch.x_t)[t][:, None, None, None]
        return ((1 - a) / a).clamp(max=MOST)

    penalised, asked = penalised_columns(texts.columns[batch.rows])

    def step(differentiate: Callable[[Tensor], float]) -> tuple[float, dict[str, Tensor]]:
        # What is hooked on stays until the backward is done, which may compute the forwards again.
        with lora.attached(), tapped(host.cross_attentions(), penalised) as maps:
            error = host.predict(batch.x_t, batch.t, batch.asked) - batch.target
            change = host.predict(batch.y_t, batch.u, batch.near) - batch.kept
            regions = None
            if pictures.mask is not None:
                regions = [region_of(pictures.mask, batch.shown, A.shape[2], batch.x_t) for A in maps.values()]
            attention = mean_attention_loss(maps.values(), asked, regions)
            noise, drift = (weight(batch.t) * error.square()).mean(), (weight(batch.u) * change.square()).mean()
            return differentiate(noise + ATTENTION * attention + KEEP * drift), maps

    return descent.take(step)


class Reading(NamedTuple):
    """What a probe measures: mean |estimate - target|^2 for the concept and |change|^2 for what is near, both over the
    untouched model's for the concept; and the share of attention that the concept draws."""

    distance: float
    drift: float
    mass: float

    @property
    def total(self) -> float:
        return self.distance + self.drift


def make_probe(
    host: DiffusionHost,
    lora: CrossAttentionLoRA,
    texts: Texts,
    pictures: Pictures,
    settings: ForgetSettings,
    eta: float,
    generator: torch.Generator,
) -> Callable[[float], Reading]:
    """A measurement of the LoRA at a strength, the same each time: on fixed latents, one at a time, which takes no more
    memory than training."""
    batches = [make_batch(host, texts, pictures, settings, 1, eta, generator) for _ in range(PROBES)]
    with torch.no_grad():
        untouched = [host.predict(batch.x_t, batch.t, batch.asked) - batch.target for batch in batches]
    scale = max(sum(error.square().mean().item() for error in untouched), 1e-12)

    @torch.no_grad()
    def probe(strength: float) -> Reading:
        distance = drift = mass = 0.0
        for batch in batches:
            host.check_interrupt()
            penalised, asked = penalised_columns(texts.columns[batch.rows])
            with lora.attached(strength):
                with tapped(host.cross_attentions(), penalised) as maps:
                    epsilon = host.predict(batch.x_t, batch.t, batch.asked)
                drift += (host.predict(batch.y_t, batch.u, batch.near) - batch.kept).square().mean().item()
            distance += (epsilon - batch.target).square().mean().item()
            mass += concept_mass(maps, asked).item() / PROBES
        return Reading(distance / scale, drift / scale, mass)

    return probe


def finish(
    host: DiffusionHost,
    lora: CrossAttentionLoRA,
    concepts: tuple[Concept, ...],
    settings: ForgetSettings,
    edit: Edit,
    texts: Texts,
    readings: dict[str, Reading],
    strength: float,
    losses: list[float],
    found: list[str],
) -> Patch:
    """The patch of a trained LoRA at a strength, with its report; `readings` are of the model `before`, of the `fast`
    edit and `after`, `found` what there is to say of the training. Raises ForgetError where `after` is not finite."""
    if not all(map(math.isfinite, readings["after"])):
        raise ForgetError("The trained patch gives no finite estimates: lower the learning rate.")
    drift = unrelated_drift(host, texts.unrelated, lora.attached(strength))
    report = edit.report | {
        "steps": len(losses),
        "loss": [losses[0], losses[-1]],
        "strength": strength,
        "attention_mass": {when: readings[when].mass for when in ("before", "after")},
        "distance": {when: reading.distance for when, reading in readings.items()},
        "noise drift": readings["after"].drift,
        "unrelated drift": drift,
    }
    settled = len(losses) < settings.steps and not found
    report["warnings"] = [*found, *edit.report["warnings"]]
    report["warnings"] += warnings(readings["after"], settled, len(edit.task.names)) + unrelated_warnings(drift)
    factors = {target: (up * strength, down) for target, (up, down) in lora.factors().items()}
    return make_patch(host, factors, concepts, asdict(settings), report, edit.moments)


def unfinished_patch(
    host: DiffusionHost,
    lora: CrossAttentionLoRA,
    concepts: tuple[Concept, ...],
    settings: ForgetSettings,
    edit: Edit,
    losses: list[float],
    steps: int,
) -> Patch:
    """The patch of a LoRA whose training was stopped; nothing is measured, since whoever stops it wants to go on."""
    told = unfinished(losses, steps)
    report = edit.report | told | {"warnings": [*told["warnings"], *edit.report["warnings"]]}
    return make_patch(host, lora.factors(), concepts, asdict(settings), report, edit.moments)


def warnings(after: Reading, settled: bool, concepts: int) -> list[str]:
    """A sentence for each figure that says the training of so many concepts did little, or harms; `settled`: it ended before
    its steps were up, since they no longer helped."""
    found = []
    if after.distance > LITTLE:
        found.append(
            f"Little effect: the noise estimate for the concept is still {after.distance:.0%} as far from its target as "
            f"without the patch. {'Raise `learning_rate` or `rank`.' if settled else 'Give it more `steps`.'}"
        )
    if after.drift > LITTLE:
        found.append(
            f"What is near suffers: its noise estimate moves by {after.drift:.0%} of what the concept's has to. Put what "
            f"matters into `keep`{', or forget fewer concepts at once' if concepts > 1 else ''}."
        )
    return found
