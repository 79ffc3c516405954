"""Forget concepts, by any preset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from torch import Tensor

from ..errors import ForgetError
from ..host import DiffusionHost
from ..inversion.embedding import require_embeddings
from ..log import logger, phase, quoted
from ..patch.patch import Patch
from ..text.concept import Concept, make_concepts
from ..training.checkpoint import Checkpoint
from ..training.loop import TrainingRun
from ..training.memory import out_of_memory_told
from .adversarial import forget_robust
from .closed_form import forget_fast
from .config import ForgetConfig, TrainingConfig
from .refined import forget_balanced
from .resteering import forget_by_resteering

TRAINED = {
    "paper": forget_by_resteering,
    "balanced": forget_balanced,
    "robust": forget_robust,
}


def forget(
    host: DiffusionHost,
    concept: str | tuple[Concept, ...],
    config: ForgetConfig,
    *,
    images: Tensor | None = None,
    mask: Tensor | None = None,
    concept_of: Sequence[int] | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[Patch, list[float]]:
    """Makes a patch that forgets concepts, given as names, one concept a line, or as they are; returns it and the loss of
    each step.

    `images` [P, H, W, 3] in 0..1 and `mask` [1 or P, H, W] are for the presets that train on pictures. Each picture shows
    the concept that `concept_of` has the number of; without it each concept has an equal part of them, in order. Inside a
    `checkpoint`, which the caller has entered, the training resumes an earlier run with the same inputs. Raises ForgetError
    for inputs that cannot work and, where the settings are strict, in place of a warning.
    """
    concepts = make_concepts(concept, config.concept_type, config.template) if isinstance(concept, str) else concept
    config = config.resolved()
    run = TrainingRun(host, config, concepts, images, mask, concept_of, checkpoint or Checkpoint())
    texts = [text for concept in concepts for text in (*concept.names, *concept.templates)]
    require_embeddings(host, *texts, config.target, config.preserve)
    seed = {"seed": config.seed} if hasattr(config, "seed") else {}
    with (
        out_of_memory_told(),
        host.sized(getattr(config, "resolution", 0)),
        phase("forget", preset=config.preset, concepts=len(concepts), **seed) as info,
    ):
        if isinstance(config, TrainingConfig):
            patch, losses = train_preset(run)
            info["repeatable"] = host.device.type == "cpu"  # a GPU's backward adds up in any order
        else:
            patch, losses = forget_fast(run)
        info |= {"steps": len(losses), "loss": float(losses[-1]), "modules": len(patch.modules), "rank": patch.rank}
    warnings = patch.info["report"]["warnings"]
    for warning in warnings:
        logger.warning("forget.warning %s", quoted(warning))
    if config.strict and warnings:
        raise ForgetError(" ".join(warnings))
    return patch, losses


def train_preset(run: TrainingRun) -> tuple[Patch, list[float]]:
    """Forgets by a preset that trains, from the state of an earlier run with the same inputs, if there is one."""
    host, config = run.host, run.config
    settings = replace(config, strict=False).plain()  # it decides on the finished patch alone
    names = [name for concept in run.concepts for name in concept.names]
    texts = (*names, config.template, config.target, config.preserve)
    concepts = [asdict(concept) for concept in run.concepts]
    run.checkpoint.begin(host, texts, "forget", concepts, settings, run.images, run.mask, run.concept_of)
    with host.reading_unseen():
        patch, losses = TRAINED[config.preset](run)
    run.checkpoint.done()
    return patch, losses
