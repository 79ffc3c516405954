"""One line in the log for each phase of a work: what, how long, and its figures."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .files.clean_text import displayable

logger = logging.getLogger("forget_me_not")


@contextmanager
def phase(name: str, **figures: object) -> Iterator[dict[str, object]]:
    """Context that logs `name seconds=1.23 key=value ...` on leaving, with `failed=` and the exception's name where it ends
    so; figures may be added to the dict that it gives."""
    start = time.perf_counter()
    try:
        yield figures
    except BaseException as error:
        figures["failed"] = type(error).__name__
        raise
    finally:
        told = "".join(f" {key}={plain(value)}" for key, value in figures.items())
        logger.info("%s seconds=%.2f%s", name, time.perf_counter() - start, told)


def plain(value: object) -> str:
    """A figure in the log; text in quotes and its control characters as escapes, so that no name can look like another
    line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return displayable(json.dumps(value if isinstance(value, str | int) else str(value), ensure_ascii=False))
