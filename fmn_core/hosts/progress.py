"""How far a host's work has come, and previews of it for those who look."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

PREVIEW_EVERY = 0.5  # seconds, at least, from the end of a preview to the next


class Progress(ABC):
    """The bar of a host's work, whose parts may share one, and a preview on it now and then."""

    bar_steps: tuple[int, int] | None = None  # done and all, inside `one_bar`
    previewed = -math.inf  # when the last preview was made, by the monotonic clock

    @abstractmethod
    def show_progress(self, step: int, total: int, preview: Tensor | None) -> None:
        """Shows `step` of `total` and, where given, a picture [H, W, 3] in 0..1."""

    def shows_previews(self) -> bool:
        """Whether anybody sees previews now."""
        return False

    def progress(self, step: int, total: int, preview: Callable[[], Tensor] | None = None) -> None:
        """Shows a part's `step` of `total`, or inside `one_bar` one more step of all.

        `preview` makes a picture [H, W, 3] in 0..1. It is asked only where that is seen, and no more often than every
        PREVIEW_EVERY seconds, but for the first and the last step: a preview may take as long as a step.
        """
        if self.bar_steps:
            done, total = self.bar_steps
            step = done + 1
            self.bar_steps = (step, total)
        picture = None
        if preview and self.shows_previews() and (step >= total or time.monotonic() - self.previewed >= PREVIEW_EVERY):
            picture = preview()
            self.previewed = time.monotonic()
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
            self.bar_steps, self.previewed = (0, total), -math.inf
        try:
            yield
        finally:
            self.bar_steps = outer and self.bar_steps
