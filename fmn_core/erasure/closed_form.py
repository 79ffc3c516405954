"""The preset `fast`: a concept forgotten in closed form, from the text encoder and the weights of K and V; the UNet is
only asked in the end how unrelated prompts fare."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ForgetError
from ..host import DiffusionHost
from ..log import logger, quoted
from ..lora.decompose import LayerFactors
from ..lora.layers import CrossAttentionLoRA
from ..patch.patch import Patch, make_patch
from ..patch.report import PatchReport
from ..patch.statistics import TextStatistics
from ..text.concept import Concept
from ..text.features import VocabularyIndex
from ..training.loop import TrainingRun
from .advice import LITTLE, edit_warnings
from .config import ClosedFormConfig, ForgetConfig, projection_names
from .plan import ErasurePlan, plan_erasure
from .solve import EditObjective, leading_directions, solve
from .targets import PlanFeatures, concept_targets
from .unrelated import NotFinite, latents_shape, unrelated_drift, unrelated_prompts, unrelated_warnings

EXACT = 0.02  # of the largest singular value of the start and empty embeddings: directions above it do not move at all
ERASED = 0.8  # how much of the way from the concept to its target an edit is scaled to go
MOST_SCALE = 2.0


@dataclass(frozen=True)
class LinearEdit:
    """x -> x + up (down x) on the text embeddings: up [D, r], down [r, D]; what it was made for, and its own measures."""

    up: Tensor
    down: Tensor
    plan: ErasurePlan
    report: PatchReport
    statistics: TextStatistics

    def __call__(self, x: Tensor) -> Tensor:
        """What is added to embeddings [..., D]."""
        return x @ self.down.T @ self.up.T


def forget_fast(run: TrainingRun) -> tuple[Patch, list[float]]:
    """A patch in closed form; beside it, how far the concepts are from forgotten before and after, in place of a loss."""
    host, config = run.host, run.config
    edit = make_edit(host, run.concepts, config)
    left = min(1 - min(edit.report.erasure.values()), 0.9999)  # the host's plot divides by the fall
    factors = edit_factors(host, edit, projection_names(config))
    report = with_unrelated_drift(host, edit, factors)
    return make_patch(host, factors, run.concepts, config.plain(), report, statistics=edit.statistics), [1.0, left]


def with_unrelated_drift(host: DiffusionHost, edit: LinearEdit, factors: LayerFactors) -> PatchReport:
    """The report with a look at unrelated prompts: without it where the UNet cannot be asked, which an edit does not
    need."""
    try:
        prompts = unrelated_prompts(host, edit.plan.forgotten)
        with host.training(latents_shape(host)):
            lora = CrossAttentionLoRA.of(host, factors).requires_grad_(False)
            drift = unrelated_drift(host, prompts, lora.attached())
    except NotFinite:
        raise
    except (ForgetError, RuntimeError) as error:  # no memory, a UNet elsewhere or in parts: the edit did not need it
        logger.warning("forget.unseen why=%s", quoted(str(error)))
        return edit.report
    warnings = edit.report.warnings + unrelated_warnings(drift, trained=False)
    return edit.report.updated(unrelated_drift=drift, warnings=warnings)


def edit_factors(host: DiffusionHost, edit: LinearEdit, matrices: tuple[str, ...]) -> LayerFactors:
    """Every K and V reads the edited context, W (x + M x) = W x + (W up) (down x)."""
    return {
        (layer, matrix): (host.weight(layer, matrix).detach().cpu().double() @ edit.up, edit.down)
        for layer in host.cross_attentions()
        for matrix in matrices
    }


def make_edit(host: DiffusionHost, concepts: tuple[Concept, ...], config: ForgetConfig) -> LinearEdit:
    """The edit of the context that forgets all concepts at once and leaves the rest; raises ForgetError where the
    settings contradict one another.

    Words inside a name stay, but for those that mean the same, and the likest ones with which it cannot be forgotten.
    """
    vocabulary = VocabularyIndex(host)
    freed: dict[str, str] = {}
    while True:
        edit = solve_plan(vocabulary, plan_erasure(vocabulary, concepts, config, freed), config)
        erasure, inside = edit.report.erasure, edit.plan.inside
        more = {words[0]: name for name, words in inside.items() if words and erasure[name] < LITTLE}
        if not more:
            return edit
        freed = freed | more


def solve_plan(vocabulary: VocabularyIndex, plan: ErasurePlan, config: ForgetConfig) -> LinearEdit:
    """The edit that does a plan, with its report."""
    features = PlanFeatures.of(vocabulary, plan)
    concepts, kept, empty = features.concepts, features.kept, features.empty
    objective = EditObjective.of(list(concepts.values()))
    fixed = leading_directions(torch.cat([empty[:1] * len(empty), empty]), EXACT)
    up, down = solve(objective, kept, fixed, min(config.rank * len(concepts), len(kept) - fixed.shape[1]))
    edit = LinearEdit(up, down, plan, PatchReport(synonyms=plan.synonyms), features.statistics)
    done = sum(progress(edit, x, y) for x, y in concepts.values()) / len(concepts)
    edit = replace(edit, up=up * min(ERASED / done, MOST_SCALE)) if done > 0 else edit
    probes = {name: concept_targets(vocabulary, plan, name, plan.probes) for name in plan.names}
    return measured(edit, probes, features, config)


def word_statistics(
    host: DiffusionHost, concepts: tuple[Concept, ...], config: ForgetConfig
) -> tuple[TextStatistics | None, list[str]]:
    """What an edit knows of the concepts' words, for a patch that is made without one; or none, and a sentence that says
    why."""
    vocabulary = VocabularyIndex(host)
    plain_config = ClosedFormConfig(concept_type=config.concept_type, template=config.template)
    try:
        plan = plan_erasure(vocabulary, concepts, plain_config)
        return PlanFeatures.of(vocabulary, plan).statistics, edit_warnings(plan, config, PatchReport())
    except ForgetError as error:
        return None, [f"The patch can be applied, and neither gated nor stacked better than added: {error}"]


def progress(edit: LinearEdit, x: Tensor, y: Tensor) -> float:
    """How far an edit brings embeddings x [N, D] on the way to their targets y: 0 not at all, 1 there."""
    way = y - x
    return ((edit(x) * way).sum() / way.square().sum().clamp(min=1e-12)).item()


def measured(
    edit: LinearEdit, probes: dict[str, tuple[Tensor, Tensor]], features: PlanFeatures, config: ForgetConfig
) -> LinearEdit:
    """The edit with its report: how far it brings each concept, and how far it moves what is near, on one scale, on
    prompts that it was neither made nor scaled from."""
    near = features.near | features.preserved | features.inside | features.freed
    scale = torch.stack([(y - x).square().sum(1).mean().sqrt() for x, y in probes.values()]).mean().clamp(min=1e-12)

    def moved(embeds: Tensor) -> float:
        return (edit(embeds).square().sum(1).mean().sqrt() / scale).item()

    drift = {word: round(moved(embeds), 4) for word, embeds in near.items()}
    report = edit.report.updated(
        erasure={name: round(progress(edit, x, y), 4) for name, (x, y) in probes.items()},
        preserve_drift=dict(sorted(drift.items(), key=lambda item: -item[1])),
        empty_prompt_drift=round(moved(features.empty), 6),
    )
    return replace(edit, report=report.updated(warnings=edit_warnings(edit.plan, config, report)))
