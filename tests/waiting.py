"""Waits that last as long as something changes: on a loaded machine too, and not for ever where all stands still."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

STALLED = 300  # seconds in which nothing changes, after which a wait is given up


def while_changing(look: Callable[[], object], stalled: float = STALLED) -> Iterator[object]:
    """What `look` gives, ten times a second, as long as it has changed within `stalled` seconds."""
    seen, since = None, time.monotonic()
    while time.monotonic() - since < stalled:
        if (now := look()) != seen:
            seen, since = now, time.monotonic()
        yield now
        time.sleep(0.1)
