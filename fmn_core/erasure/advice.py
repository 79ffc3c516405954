"""What to do about a closed-form edit that forgets little or harms, in sentences that fit the inputs."""

from __future__ import annotations

from .config import ForgetSettings
from .plan import Task

LITTLE, MUCH = 0.5, 0.3  # less of the way for the concept, or more of it for what is near, is worth a warning


def warnings(task: Task, settings: ForgetSettings, report: dict) -> list[str]:
    """A sentence for each name that the text encoder does not know, and for each figure that says the patch does nothing, or
    harms; a report without figures has the first alone."""
    unknown = [
        f"The text encoder does not know `{name}`: it reads it as it reads signs that mean nothing, and so no word was "
        "looked for that means the same or is near. Use a name by which the model draws it."
        for name in task.unknown
    ]
    little = [
        f"Little effect: prompts of `{name}` go {way:.0%} of the way to what stands in its place. {more(task, settings)}"
        for name, way in report.get("erased", {}).items()
        if way < LITTLE and name not in task.unknown
    ]
    much = [harmed(task, settings, word, way) for word, way in report.get("drift", {}).items() if way > MUCH]
    return unknown + little + much


def more(task: Task, settings: ForgetSettings) -> str:
    """What lets an edit forget more."""
    ways = []
    if settings.mode == "replace":
        ways.append("Choose a `replacement` that is less like it.")
    if settings.keep.strip():
        ways.append("Take off `keep` what is nearly the same.")
    if len(task.names) > 1:
        ways.append("Forget fewer concepts at once.")
    if not ways:
        ways.append("Raise `rank`." if settings.preset != "fast" else "Raise `rank`, or take the preset `balanced`.")
    return " ".join(ways)


def harmed(task: Task, settings: ForgetSettings, word: str, way: float) -> str:
    """That a word suffers, and what prevents it."""
    if word in task.along:
        name = task.along[word]
        return (
            f"`{word}` goes along with `{name}`, by {way:.0%} of its way: the text encoder hardly tells the two apart, and "
            f"with `{word}` kept `{name}` would hardly be forgotten. Put `{word}` in `keep` if it matters more."
        )
    ways = [] if word in task.keep else ["Put it in `keep`."]
    if len(task.names) > 1:
        ways.append("Forget fewer concepts at once.")
    if word in task.keep and len(task.keep) > 1:
        ways.append("Keep fewer words.")
    return " ".join([f"`{word}` suffers: it moves by {way:.0%} of the way that the concept goes.", *ways])
