"""How much a patch may say of what it forgets, and of itself: bounds that no real one comes near."""

from __future__ import annotations

from collections.abc import Iterable

from ..config import MOST_TEXT
from ..files.header import UNPRINTABLE

MOST_CONCEPTS, MOST_NAMES = 1024, 256  # in a patch, and of a concept with its templates: a hundred, and a dozen
MOST_LETTERS = 1000  # of a name; tokenizers read some 300
MOST_SETTINGS = 256  # of a patch: two dozen
MOST_SAID = 1 << 22  # letters of all texts of a patch, less those of its parts: a stack of a hundred has 600 thousand
UNCOUNTED = ("patches", "statistics")  # parts are counted by themselves, statistics by their shape


def require_few(concepts: list) -> None:
    """Raises ValueError for more concepts, names or templates than a patch remembers, or such that are no names."""
    if len(concepts) > MOST_CONCEPTS:
        raise ValueError(f"it forgets {len(concepts):,} concepts, and {MOST_CONCEPTS:,} are the most")
    for concept in (concept for concept in concepts if isinstance(concept, dict)):
        for key in ("names", "templates"):
            texts = concept.get(key)
            texts = texts if isinstance(texts, list | tuple) else []
            if len(texts) > MOST_NAMES:
                raise ValueError(f"it has a concept of {len(texts):,} {key}, and {MOST_NAMES} are the most")
            require_names(texts, MOST_LETTERS)


def require_names(names: Iterable[object], most: int) -> None:
    """Raises ValueError for a name that is too long, or has control characters."""
    for name in (name for name in names if isinstance(name, str)):
        if len(name) > most:
            raise ValueError(f"it holds a name of {len(name):,} characters, and {most:,} are the most")
        if UNPRINTABLE.search(name):
            raise ValueError(f"it holds a name with control characters, {ascii(name[:60])}")


def require_brief_texts(info: dict) -> None:
    """Raises ValueError where a patch says too much of itself, its parts and statistics left out."""
    concepts, base, settings = (info.get(key) for key in ("concepts", "base", "settings"))
    if isinstance(settings, dict) and len(settings) > MOST_SETTINGS:
        raise ValueError(f"it has {len(settings):,} settings, and {MOST_SETTINGS} are the most")
    require_few(concepts if isinstance(concepts, list) else [])
    require_names([info.get("concept")], MOST_TEXT)
    require_names([base.get("name")] if isinstance(base, dict) else [], MOST_LETTERS)
    total = 0
    for text in texts_in({key: value for key, value in info.items() if key not in UNCOUNTED}):
        total += len(text)
        if len(text) > MOST_TEXT:
            raise ValueError(f"it holds a text of {len(text):,} characters, and {MOST_TEXT:,} are the most")
    if total > MOST_SAID:
        raise ValueError(f"it holds texts of {total:,} characters together, and {MOST_SAID:,} are the most")


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
