"""Forget concepts, by any preset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from torch import Tensor

from ..errors import ForgetError
from ..host import DiffusionHost
from ..inversion.embedding import require_embeddings
from ..log import logger, phase, plain
from ..patch.patch import Patch
from ..text.concept import Concept, make_concepts
from ..training.checkpoint import Checkpoint
from ..training.memory import out_of_memory_told
from .adversarial import forget_robust
from .closed_form import forget_fast
from .config import ForgetSettings
from .refined import forget_balanced
from .resteering import forget_by_resteering


def forget(
    host: DiffusionHost,
    names: str,
    settings: ForgetSettings,
    images: Tensor | None = None,
    mask: Tensor | None = None,
    checkpoint: Checkpoint | None = None,
    concept_of: Sequence[int] | None = None,
) -> tuple[Patch, list[float]]:
    """Makes a patch that forgets the concepts in `names`, one a line; returns it and the loss of each step. Arguments and
    errors as for forget_concepts."""
    concepts = make_concepts(names, settings.concept_type, settings.template)
    return forget_concepts(host, concepts, settings, images, mask, checkpoint, concept_of)


def forget_concepts(
    host: DiffusionHost,
    concepts: tuple[Concept, ...],
    settings: ForgetSettings,
    images: Tensor | None = None,
    mask: Tensor | None = None,
    checkpoint: Checkpoint | None = None,
    concept_of: Sequence[int] | None = None,
) -> tuple[Patch, list[float]]:
    """Makes a patch that forgets concepts; returns it and the loss of each step.

    `images` [P, H, W, 3] in 0..1 and `mask` [1 or P, H, W] are for the presets that train on pictures. Each picture shows
    the concept that `concept_of` has the number of; without it each concept has an equal part of them, in order. Inside a
    `checkpoint`, which the caller has entered, the training goes on where an earlier run with the same inputs got to. Raises
    ForgetError for inputs that cannot work and, where the settings are strict, in place of a warning.
    """
    checkpoint = checkpoint or Checkpoint()
    settings = settings.resolved()
    for name, own in (("layers", "cross-attention"), ("gradient", "whole"), ("loss", "squared norms")):
        chosen = getattr(settings, name)
        if chosen != own and settings.preset != "paper":
            raise ForgetError(f"`{name}: {chosen}` is for the preset `paper`; for `{settings.preset}` choose `{own}`.")
    called = [text for concept in concepts for text in (*concept.names, *concept.templates)]
    require_embeddings(host, *called, settings.replacement, settings.keep)
    with (
        out_of_memory_told(),
        host.sized(settings.resolution),
        phase("forget", preset=settings.preset, concepts=len(concepts), seed=settings.seed) as told,
    ):
        if settings.preset == "fast":
            patch, losses = forget_fast(host, concepts, settings)
        else:
            train = {"balanced": forget_balanced, "robust": forget_robust, "paper": forget_by_resteering}[settings.preset]
            chosen = asdict(settings) | {"strict": None}  # it decides on the finished patch alone
            names = [name for concept in concepts for name in concept.names]
            texts = (*names, settings.template, settings.replacement, settings.keep)
            checkpoint.begin(host, texts, "forget", [asdict(c) for c in concepts], chosen, images, mask, concept_of)
            with host.reading_unseen():
                patch, losses = train(host, concepts, settings, images, mask, checkpoint, concept_of)
            checkpoint.done()
            told["repeatable"] = host.device.type == "cpu"  # a GPU's backward adds up in any order
        told |= {"steps": len(losses), "loss": float(losses[-1]), "modules": len(patch.modules), "rank": patch.rank}
    warnings = patch.info["report"]["warnings"]
    for warning in warnings:
        logger.warning("forget.warning %s", plain(warning))
    if settings.strict and warnings:
        raise ForgetError(" ".join(warnings))
    return patch, losses
