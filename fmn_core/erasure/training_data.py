"""What the presets train on: encoded prompts, and pictures of the concepts or of what takes their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..host import DiffusionHost, Prompts, tile
from ..log import phase
from ..text.concept import round_robin
from ..text.templates import NEAR_TEMPLATES, fill
from ..text.tokens import concept_masks
from ..training.images import concept_pictures
from ..training.loop import TrainingRun
from ..training.noise import draw
from ..training.sampling import AT_ONCE, sample_pairs, sampling_calls
from .config import TrainingConfig
from .plan import ErasurePlan
from .unrelated import unrelated_prompts


@dataclass(frozen=True)
class PromptSet:
    """Encoded prompts: `prompts` of the concepts, with the masks [R, T] of the concepts' tokens, and for each row the number
    of its concept and of its template; for every template the `target_prompts`, where something else takes the concept's
    place; `near` words that stay; the empty prompt; and `unrelated` ones for the last check."""

    prompts: Prompts
    token_mask: Tensor
    concept: list[int]
    template: list[int]
    target_prompts: list[Prompts]
    near: Prompts
    empty: Prompts
    unrelated: Prompts

    @classmethod
    def of(cls, host: DiffusionHost, plan: ErasurePlan) -> PromptSet:
        names = [(c, name) for c, names in enumerate(plan.names.values()) for name in names]
        rows = [(c, name, i, fill(template, name)) for i, template in enumerate(plan.prompts) for c, name in names]
        prompts = host.encode([text for *_, text in rows])
        targets = [plan.target] if plan.target else plan.neutral
        return cls(
            prompts=prompts,
            token_mask=concept_masks(host, [(name, text) for _, name, _, text in rows], "concept", prompts),
            concept=[c for c, *_ in rows],
            template=[i for _, _, i, _ in rows],
            target_prompts=[host.encode([fill(template, word) for word in targets]).mean() for template in plan.prompts],
            near=host.encode([fill(NEAR_TEMPLATES[plan.type][0], word) for word in plan.near] or [""]),
            empty=host.encode([""]),
            unrelated=unrelated_prompts(host, plan.forgotten),
        )

    @property
    def concepts(self) -> int:
        """How many concepts there are."""
        return max(self.concept) + 1

    def rows(self, concept: int) -> list[int]:
        """The rows that call for a concept."""
        return [row for row, own in enumerate(self.concept) if own == concept]

    def targets(self, rows: Sequence[int]) -> Prompts:
        """The target prompts of these rows."""
        return Prompts.cat([self.target_prompts[self.template[row]] for row in rows])

    def with_row(self, prompt: Prompts, token_mask: Tensor, concept: int, template: int) -> PromptSet:
        """The same with one more prompt of a concept, its mask [T]."""
        prompts = Prompts.cat([self.prompts, prompt])
        masks = (*self.token_mask, token_mask.to(self.token_mask.device))
        return replace(
            self,
            prompts=prompts,
            token_mask=torch.stack([tile(mask, prompts.prompt_embeds.shape[1]) for mask in masks]),
            concept=[*self.concept, concept],
            template=[*self.template, template],
        )


@dataclass(frozen=True)
class TrainingImages:
    """Pictures of the concepts or of their targets: latents [P, C, h, w], the number of each one's concept, where in them it
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

    def draw_rows(self, indices: Sequence[int], rows: Callable[[int], list[int]], generator: torch.Generator) -> list[int]:
        """For each of these pictures a random row of `rows(concept)`, those of the prompts that call for what it shows."""
        options = [rows(self.concept[i]) for i in indices]
        return [own[draw(len(own), 1, generator)[0]] for own in options]


def images_steps(run: TrainingRun, concepts: int) -> int:
    """How many steps of the progress bar making the pictures takes: none where they are given."""
    if run.images is not None:
        return 0
    return sampling_calls(max(run.config.num_images, concepts), run.config.num_inference_steps)


def make_images(
    run: TrainingRun, prompts: PromptSet, generator: torch.Generator, of_targets: bool = False
) -> TrainingImages:
    """The pictures to train on: those given, or the model's own of the concepts or, with `of_targets`, of what takes their
    place. Raises ForgetError for given ones that cannot be used."""
    host, config = run.host, run.config
    images, mask, shows = given_images(run, prompts.concepts)
    if images is not None:
        return TrainingImages(host.encode_images(images), shows, mask, images)
    rows = round_robin([prompts.rows(c) for c in range(prompts.concepts)], max(config.num_images, prompts.concepts))
    with phase("forget.pictures", count=len(rows)):
        of = prompts.targets(rows) if of_targets else prompts.prompts[rows]
        latents = sample(host, of, prompts.empty, config, generator)
        images = host.decode(latents) if host.may_show_previews() else None
    return TrainingImages(latents, [prompts.concept[row] for row in rows], None, images)


def given_images(run: TrainingRun, concepts: int) -> tuple[Tensor | None, Tensor | None, list[int]]:
    """The given pictures and masks at the host's size, and the number of each picture's concept; None where none are given.
    Raises ForgetError for those that cannot be used."""
    return concept_pictures(
        run.host, run.images, run.mask, flip=run.config.horizontal_flip, concepts=concepts, concept_of=run.concept_of
    )


def sample(
    host: DiffusionHost,
    prompts: Prompts,
    empty: Prompts,
    config: TrainingConfig,
    generator: torch.Generator,
    *,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """Latents of a picture for each prompt, of a shape [C, h, w] that may be other than the model's own."""
    shape = shape or host.latent_shape()
    with host.training((AT_ONCE, *shape)):
        return sample_pairs(host, prompts, empty, config=config, generator=generator, shape=shape)[0]
