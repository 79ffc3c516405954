"""Long work that tells how far it has come, and can be stopped between its units."""

from __future__ import annotations

from collections.abc import Callable

Tell = Callable[[int, int], None]  # how many units are done, and how many there are; it may raise to stop the work


class Work:
    """Counts the units of a work, and tells before each of them how many of `total` are done."""

    def __init__(self, total: int, tell: Tell | None = None):
        self.done, self.total, self.tell = 0, total, tell

    def step(self) -> None:
        """A unit begins; raises what `tell` raises."""
        if self.tell:
            self.tell(self.done, self.total)
        self.done += 1
