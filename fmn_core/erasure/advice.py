"""What to do about a closed-form edit that forgets little or harms, in sentences that fit the inputs."""

from __future__ import annotations

from ..patch.report import PatchReport
from .config import ForgetConfig
from .plan import ErasurePlan

LITTLE, MUCH = 0.5, 0.3  # less of the way for the concept, or more of it for what is near, is worth a warning


def edit_warnings(plan: ErasurePlan, config: ForgetConfig, report: PatchReport) -> list[str]:
    """A sentence for each name that the text encoder does not know, and for each figure that says the patch does nothing, or
    harms; a report without figures has the first alone."""
    unknown = [
        f"The text encoder does not know `{name}`: it reads it like random letters, so no synonyms or near words were "
        "looked for. Use a name by which the model draws it."
        for name in plan.unknown
    ]
    little = [
        f"Little effect: prompts of `{name}` go {way:.0%} of the way to what takes its place. {more(plan, config)}"
        for name, way in report.erasure.items()
        if way < LITTLE and name not in plan.unknown
    ]
    much = [harmed(plan, word, way) for word, way in report.preserve_drift.items() if way > MUCH]
    return unknown + little + much


def more(plan: ErasurePlan, config: ForgetConfig) -> str:
    """What lets an edit forget more."""
    ways = []
    if config.mode == "replace":
        ways.append("Choose a `target` that is less like it.")
    if config.preserve.strip():
        ways.append("Remove near-synonyms from `preserve`.")
    if len(plan.names) > 1:
        ways.append("Forget fewer concepts at once.")
    if not ways:
        ways.append("Raise `rank`." if config.preset != "fast" else "Raise `rank`, or choose the preset `balanced`.")
    return " ".join(ways)


def harmed(plan: ErasurePlan, word: str, way: float) -> str:
    """That a word suffers, and what prevents it."""
    if word in plan.freed:
        name = plan.freed[word]
        return (
            f"`{word}` goes along with `{name}`, by {way:.0%} of its way: the text encoder hardly tells the two apart, and "
            f"with `{word}` preserved `{name}` would hardly be forgotten. Put `{word}` in `preserve` if it matters more."
        )
    ways = [] if word in plan.preserve else ["Put it in `preserve`."]
    if len(plan.names) > 1:
        ways.append("Forget fewer concepts at once.")
    if word in plan.preserve and len(plan.preserve) > 1:
        ways.append("Preserve fewer words.")
    return " ".join([f"`{word}` suffers: it moves by {way:.0%} of the way that the concept goes.", *ways])
