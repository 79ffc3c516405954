"""Log lines, progress, and text from outside made safe to show."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    from torch import Tensor

SURROGATE = re.compile("[\ud800-\udfff]")
# What a terminal obeys or shows backwards: C0, DEL and C1 but for tab and newline, Unicode's own line breaks, and the
# controls of writing direction.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
Tell = Callable[[int, int], None]  # how many units are done, and how many there are; it may raise to stop the work
ENCODED_AT_ONCE = 64  # prompts
PREVIEW_EVERY = 0.5  # seconds, at least, from the end of a preview to the next
PREVIEW_SHARE = 0.1  # of the time, at most, that previews may take

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
        text = "".join(f" {key}={quoted(value)}" for key, value in figures.items())
        logger.info("%s seconds=%.2f%s", name, time.perf_counter() - start, text)


def quoted(value: object) -> str:
    """A figure in the log; text in quotes and its control characters as escapes, so that no name can look like another
    line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return displayable(json.dumps(value if isinstance(value, str | int) else str(value), ensure_ascii=False))


@overload
def replace_surrogates(value: dict[str, str]) -> dict[str, str]: ...
@overload
def replace_surrogates(value: object) -> object: ...
def replace_surrogates(value: object) -> object:
    """JSON with U+FFFD for every surrogate, which Python reads from `\\ud800` and no encoding can write."""
    if isinstance(value, str):
        return SURROGATE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {replace_surrogates(key): replace_surrogates(each) for key, each in value.items()}
    if isinstance(value, list):
        return [replace_surrogates(each) for each in value]
    return value


def displayable(text: object) -> str:
    """A text without surrogates, its control characters but tab and newline as escapes: `\\x1b`, `\\u202e`."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], SURROGATE.sub("\ufffd", str(text)))


def say(*texts: object, file=None) -> None:
    """Prints texts, each on a line of its own, as `displayable` makes them; to stdout unless a file is given."""
    print(*map(displayable, texts), sep="\n", file=file or sys.stdout, flush=True)


class Work:
    """Counts the units of a work, and tells before each of them how many of `total` are done."""

    def __init__(self, total: int, tell: Tell | None = None):
        self.done, self.total, self.tell = 0, total, tell

    def step(self) -> None:
        """A unit begins; raises what `tell` raises."""
        if self.tell:
            self.tell(self.done, self.total)
        self.done += 1


class ProgressBar:
    """A bar of `total` steps that a host shows, with a preview on it now and then."""

    def __init__(self, host: Progress, total: int):
        self.host, self.done, self.total = host, 0, total
        self.preview_due = -math.inf  # when the next preview may be made, by the monotonic clock

    def update(self, preview: Callable[[], Tensor] | None = None) -> None:
        """Shows one more step.

        `preview` makes a picture [H, W, 3] in 0..1. It is called only where that is seen, and but for the first and the last
        step no more often than every PREVIEW_EVERY seconds, nor for more than PREVIEW_SHARE of the time: a preview may take
        as long as a step.
        """
        self.done += 1
        picture = None
        start = time.monotonic()
        if preview and self.host.shows_previews() and (self.done >= self.total or start >= self.preview_due):
            picture = preview()
            end = time.monotonic()
            self.preview_due = end + max(PREVIEW_EVERY, (end - start) * (1 / PREVIEW_SHARE - 1))
        self.host.show_progress(self.done, self.total, picture)

    def skip(self, steps: int) -> None:
        """Counts steps that an earlier run has done."""
        self.done += steps


class Progress(ABC):
    """What a host shows of a work: a bar, which its parts share, and previews."""

    shared_bar: ProgressBar | None = None  # inside `progress`
    prompts_read: tuple[int, int] | None = None  # and all, inside `reading`
    shows_reading = True  # whether `reading` has a bar; not before a training, whose bar it would be taken for

    @abstractmethod
    def show_progress(self, step: int, total: int, preview: Tensor | None) -> None:
        """Shows `step` of `total` and, where given, a picture [H, W, 3] in 0..1."""

    def shows_previews(self) -> bool:
        """Whether anybody sees previews now."""
        return False

    def may_show_previews(self) -> bool:
        """Whether anybody sees previews now or may come to see them: what they are made of is made before the work."""
        return self.shows_previews()

    @contextmanager
    def progress(self, total: int) -> Iterator[ProgressBar]:
        """Context with a bar of `total` steps; inside another it is that one, whose `total` counts these steps too."""
        outer = self.shared_bar
        self.shared_bar = outer or ProgressBar(self, total)
        try:
            yield self.shared_bar
        finally:
            self.shared_bar = outer

    @contextmanager
    def reading_unseen(self) -> Iterator[None]:
        """Context in which `reading` has no bar."""
        outer, self.shows_reading = self.shows_reading, False
        try:
            yield
        finally:
            self.shows_reading = outer

    @contextmanager
    def reading(self, total: int) -> Iterator[None]:
        """Context in which a bar shows how many of `total` prompts are read; none where they are few, nor inside `progress`,
        whose steps are others."""
        visible = total > ENCODED_AT_ONCE and self.shows_reading and not self.shared_bar
        outer, self.prompts_read = self.prompts_read, (0, total) if visible else None
        try:
            if visible:
                self.show_progress(0, total, None)
            yield
        finally:
            self.prompts_read = outer
