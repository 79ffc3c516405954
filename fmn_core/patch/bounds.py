"""How much a patch may hold and say: bounds that no real patch comes near, and no work on a hostile one outgrows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..config import MOST_TEXT
from ..text.concept import MOST_LETTERS, require_few, require_names

MOST_MODULES = 1024  # all projections of SDXL's cross-attention are 280
MOST_RANK = 2048  # a hundred concepts of rank 4 have 400; whole numbers up to here are exact in half precision, as alpha is
MOST_SIDE = 4096  # of a projection: SDXL's largest reads 2,048 and gives 1,280
MOST_WEIGHTS = 1 << 30  # of all projections together, which an export in full writes out: SDXL has 545 million
MOST_SETTINGS = 256  # of a patch: two dozen
MOST_PARTS = 256  # of a stacked patch: a hundred
MOST_SAID = (
    1 << 22
)  # of all texts of a patch, less those of its parts: a stack of a hundred, with its pairs, has 600 thousand
UNCOUNTED = ("members", "moments")  # parts are counted by themselves, moments by their shape


def require_room(shapes: Mapping[str, tuple[int, int]], rank: int) -> None:
    """Raises ValueError for more or larger projections, name -> (out, in), than a patch may change, or a higher rank."""
    for what, number, most in (
        ("changes {} layers", len(shapes), MOST_MODULES),
        ("has a rank of {}", rank, MOST_RANK),
        ("has a layer with a side of {}", max(map(max, shapes.values()), default=0), MOST_SIDE),
        ("changes {} weights", sum(out * inner for out, inner in shapes.values()), MOST_WEIGHTS),
    ):
        if number > most:
            raise ValueError(f"it {what.format(f'{number:,}')}, and {most:,} is the most")


def require_brief(info: dict) -> None:
    """Raises ValueError where a patch, or one that it was stacked of, says more of itself than any does, or has a name that
    is not on one line."""
    for own in (info, *parts_of(info)):
        require_brief_part(own)


def parts_of(info: dict) -> list[dict]:
    """What a stacked patch remembers of those that it was made of; raises ValueError for too many."""
    members = info.get("members")
    members = members if isinstance(members, list) else []
    if len(members) > MOST_PARTS:
        raise ValueError(f"it was stacked of {len(members):,} patches, and {MOST_PARTS} are the most")
    return [member["info"] for member in members if isinstance(member, dict) and isinstance(member.get("info"), dict)]


def require_brief_part(info: dict) -> None:
    """Raises ValueError where a patch says too much of itself, its parts and moments left out."""
    concepts, base, settings = (info.get(key) for key in ("concepts", "base", "settings"))
    if isinstance(settings, dict) and len(settings) > MOST_SETTINGS:
        raise ValueError(f"it has {len(settings):,} settings, and {MOST_SETTINGS} are the most")
    require_few(concepts if isinstance(concepts, list) else [])
    require_names([info.get("concept")], MOST_TEXT)
    require_names([base.get("name")] if isinstance(base, dict) else [], MOST_LETTERS)
    said = 0
    for text in texts_in({key: value for key, value in info.items() if key not in UNCOUNTED}):
        said += len(text)
        if len(text) > MOST_TEXT:
            raise ValueError(f"it holds a text of {len(text):,} letters, and {MOST_TEXT:,} are the most")
    if said > MOST_SAID:
        raise ValueError(f"it holds texts of {said:,} letters together, and {MOST_SAID:,} are the most")


def texts_in(value: object) -> Iterable[str]:
    """Every text in a JSON value, keys among them."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            yield from one
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
