"""How much a patch may hold and say: bounds that no real patch comes near, and no work on a hostile one outgrows."""

from __future__ import annotations

from collections.abc import Mapping

from ..text.bounds import require_brief_texts

MOST_MODULES = 1024  # all projections of SDXL's cross-attention are 280
MOST_RANK = 2048  # a hundred concepts of rank 4 have 400; whole numbers up to here are exact in half precision, as alpha is
MOST_SIDE = 4096  # of a projection: SDXL's largest reads 2,048 and gives 1,280
MOST_WEIGHTS = 1 << 30  # of all projections together, which an export in full writes out: SDXL has 545 million
MOST_PARTS = 256  # of a stacked patch: a hundred


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
        require_brief_texts(own)


def parts_of(info: dict) -> list[dict]:
    """What a stacked patch remembers of those that it was made of; raises ValueError for too many."""
    parts = info.get("patches")
    parts = parts if isinstance(parts, list) else []
    if len(parts) > MOST_PARTS:
        raise ValueError(f"it was stacked of {len(parts):,} patches, and {MOST_PARTS} are the most")
    return [part["info"] for part in parts if isinstance(part, dict) and isinstance(part.get("info"), dict)]
