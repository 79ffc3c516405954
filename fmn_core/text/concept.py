"""A concept as prompts and as columns of the cross-attention."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..config import require_text
from ..errors import ForgetError
from .bounds import require_brief_texts

# The original's templates (configs/attn.yaml, `concept_type`); identities used the object's there.
PROMPT_TEMPLATES = {
    "object": "a photo of {}",
    "style": "a photo in the style of {}",
    "identity": "a photo of {}",
    "custom": "",
}
MOST_PROMPTS = 10_000  # of all names in all templates


@dataclass(frozen=True)
class Concept:
    """What is to be forgotten: its names, the first of which it goes by, and templates of prompts that call for it."""

    names: tuple[str, ...]
    type: str
    templates: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def prompts(self) -> tuple[tuple[str, str], ...]:
        """(prompt, the name in it), every template with every name."""
        return tuple((template.replace("{}", name), name) for name in self.names for template in self.templates)


def make_concepts(text: str, type: str = "object", template: str = "") -> tuple[Concept, ...]:
    """Concepts from a text, one a line, other names of the same after commas, and a type (a key of TEMPLATES).

    For `custom`, `template` has one prompt a line with `{}` for the name. Raises ForgetError for an empty text, an
    unknown type, a template without `{}`, a name that comes twice, and more or longer ones than a patch can remember.
    """
    if type not in PROMPT_TEMPLATES:
        raise ForgetError(f"The concept type `{type}` is unknown: choose one of {', '.join(PROMPT_TEMPLATES)}.")
    templates = (
        [line.strip() for line in template.splitlines() if line.strip()] if type == "custom" else [PROMPT_TEMPLATES[type]]
    )
    if not templates:
        raise ForgetError("The type `custom` needs a template: one prompt a line, with {} where the concept stands.")
    for line in templates:
        if "{}" not in line:
            raise ForgetError(f"The template `{line}` has no {{}}: put {{}} where the concept's name belongs.")
    concepts = tuple(Concept(names, type, tuple(templates)) for names in map(split_names, text.splitlines()) if names)
    if not concepts:
        raise ForgetError("The concept is empty: type the name of what the model should forget, for example `cat`.")
    require_text(text, *templates)
    try:
        require_brief_texts(concept_metadata(concepts))
    except ValueError as error:
        raise ForgetError(f"The concept cannot be forgotten: {error}. Use fewer and shorter names.") from None
    for name, count in Counter(name.lower() for concept in concepts for name in concept.names).items():
        if count > 1:
            raise ForgetError(f"`{name}` is named twice: give each concept a line of its own, and each name once.")
    count = sum(len(concept.names) for concept in concepts) * len(templates)
    if count > MOST_PROMPTS:
        raise ForgetError(
            f"{count} prompts would have to be read, each name in each template: use at most {MOST_PROMPTS}, of fewer names "
            "or templates."
        )
    return concepts


def concept_metadata(concepts: tuple[Concept, ...]) -> dict:
    """What a patch remembers of its concepts, for JSON: what they are called together, and each one's own."""
    return {
        "concept": joint_name(concepts),
        "concepts": [{"names": [*c.names], "type": c.type, "templates": [*c.templates]} for c in concepts],
    }


def joint_name(concepts: tuple[Concept, ...]) -> str:
    """What several concepts are called together."""
    return ", ".join(concept.name for concept in concepts)


def split_names(line: str) -> tuple[str, ...]:
    """The names in a line, between commas, without superfluous spaces."""
    return tuple(" ".join(name.split()) for name in line.split(",") if name.strip())


def round_robin(lists: list[list[int]], count: int) -> list[int]:
    """`count` members of lists, one of each list before a second of any, each list from its start again where it ends."""
    found = []
    for i in range(count):
        turn, which = divmod(i, len(lists))
        found.append(lists[which][turn % len(lists[which])])
    return found
