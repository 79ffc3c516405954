"""Forget concepts, by any preset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from torch import Tensor

from ..convert.importer import import_summary
from ..errors import ForgetError
from ..host import DiffusionHost
from ..inspection.inspect import readable
from ..inversion.embedding import require_embeddings
from ..log import logger, phase, plain
from ..patch.conflicts import conflict_lines
from ..patch.patch import Patch
from ..text.concept import Concept, make_concepts
from ..training.checkpoint import Checkpoint
from ..training.memory import out_of_memory_told
from .adversarial import forget_robust
from .closed_form import forget_fast
from .config import ForgetSettings
from .refined import forget_balanced
from .resteering import forget_by_resteering

MOST_TOLD = 200  # concepts, other names or warnings in a text


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


def few(texts: list[str]) -> str:
    """The texts between commas, and how many there are beyond what anybody reads."""
    more = f" and {len(texts) - MOST_TOLD:,} more" if len(texts) > MOST_TOLD else ""
    return ", ".join(texts[:MOST_TOLD]) + more


def summary(patch: Patch) -> str:
    """What a patch's own report says, in a line or two, its warnings first."""
    report = readable(patch.info["report"])
    lines = report["warnings"][:MOST_TOLD]
    if "imported" in report:
        lines += import_summary(report["imported"])
    if "erased" in report:
        erased = [f"`{name}` goes {share:.0%}" for name, share in report["erased"].items()]
        lines.append(f"{few(erased)} of the way to what stands in its place.")
        if report["also"]:
            lines.append(f"Forgotten as other names of the same: {few(report['also'])}. `keep` prevents it.")
        if report["drift"]:
            word, share = max(report["drift"].items(), key=lambda one: one[1])  # a file sorts them by name
            lines.append(f"Of the near words `{word}` moves most, by {share:.1%} of that way.")
    if "distance" in report:
        distance, drift = report["distance"]["after"], report["noise drift"]
        lines.append(
            f"Noise estimates of the concept are {distance:.0%} as far from what stands in its place as before, those of "
            f"near words move by {drift:.1%} of that; {report['steps']} steps, at strength {report['strength']}."
        )
    if "attention_mass" in report:
        mass = report["attention_mass"]
        with_rest = f", {mass['with rest']:.4f} with the rest" if "with rest" in mass else ""
        lines.append(f"Attention to the concept: {mass['before']:.4f} before, {mass['after']:.4f} after{with_rest}.")
    if "unrelated drift" in report:
        lines.append(f"Noise estimates of unrelated prompts change by {report['unrelated drift']:.2%}.")
    if "conflicts" in report:
        lines += conflict_lines(report)
    if "evaluation" in report:
        lines += ["Measured on the model:", report["evaluation"]["summary"]]
    return "\n".join(lines)
