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
from typing import TYPE_CHECKING

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
        text = "".join(f" {key}={plain(value)}" for key, value in figures.items())
        logger.info("%s seconds=%.2f%s", name, time.perf_counter() - start, text)


def plain(value: object) -> str:
    """A figure in the log; text in quotes and its control characters as escapes, so that no name can look like another
    line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return displayable(json.dumps(value if isinstance(value, str | int) else str(value), ensure_ascii=False))


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


class Progress(ABC):
    """The bar of a host's work, whose parts may share one, and a preview on it now and then."""

    bar_steps: tuple[int, int] | None = None  # done and all, inside `one_bar`
    prompts_read: tuple[int, int] | None = None  # and all, inside `reading`
    shows_reading = True  # whether `reading` has a bar; not before a training, whose bar it would be taken for
    preview_due = -math.inf  # when the next preview may be made, by the monotonic clock

    @abstractmethod
    def show_progress(self, step: int, total: int, preview: Tensor | None) -> None:
        """Shows `step` of `total` and, where given, a picture [H, W, 3] in 0..1."""

    def shows_previews(self) -> bool:
        """Whether anybody sees previews now."""
        return False

    def may_show_previews(self) -> bool:
        """Whether anybody sees previews now or may come to see them: what they are made of is made before the work."""
        return self.shows_previews()

    def progress(self, step: int, total: int, preview: Callable[[], Tensor] | None = None) -> None:
        """Shows a part's `step` of `total`, or inside `one_bar` one more step of all.

        `preview` makes a picture [H, W, 3] in 0..1. It is asked only where that is seen, and but for the first and the last
        step no more often than every PREVIEW_EVERY seconds, nor for more than PREVIEW_SHARE of the time: a preview may take
        as long as a step.
        """
        if self.bar_steps:
            done, total = self.bar_steps
            step = done + 1
            self.bar_steps = (step, total)
        picture = None
        start = time.monotonic()
        if preview and self.shows_previews() and (step >= total or start >= self.preview_due):
            picture = preview()
            end = time.monotonic()
            self.preview_due = end + max(PREVIEW_EVERY, (end - start) * (1 / PREVIEW_SHARE - 1))
        self.show_progress(step, total, picture)

    def skip(self, steps: int) -> None:
        """Counts steps of `one_bar` that an earlier run has done."""
        if self.bar_steps:
            done, total = self.bar_steps
            self.bar_steps = (done + steps, total)

    @contextmanager
    def one_bar(self, total: int) -> Iterator[None]:
        """Context in which the parts of a work tell `total` steps together; another inside it changes nothing."""
        outer = self.bar_steps
        if not outer:
            self.bar_steps, self.preview_due = (0, total), -math.inf
        try:
            yield
        finally:
            self.bar_steps = outer and self.bar_steps

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
        """Context in which a bar shows how many of `total` prompts are read; none where they are few, nor inside `one_bar`,
        whose steps are others."""
        visible = total > ENCODED_AT_ONCE and self.shows_reading and not self.bar_steps
        outer, self.prompts_read = self.prompts_read, (0, total) if visible else None
        try:
            if visible:
                self.show_progress(0, total, None)
            yield
        finally:
            self.prompts_read = outer
