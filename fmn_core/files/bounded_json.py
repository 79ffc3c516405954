"""JSON out of a file, bounded before it is parsed: a byte of it can take a hundred in memory."""

from __future__ import annotations

import json
import re
from itertools import accumulate

from ..log import replace_surrogates

MOST_VALUES = 3 << 17  # items and keys: a hundred stacked patches have 49 thousand, an SDXL checkpoint's header 20 thousand
MOST_ESCAPES = 1 << 20  # backslashes: JSON inside of metadata has two for each text, 119 thousand for a hundred patches
MOST_DEPTH = 32  # lists in lists: a stacked patch has 7
MOST_DIGITS = 64  # of a number: a double has 17, an offset in a file 12
BRACKETS = re.compile(rb"[^\[\]{}]+")


def parse_json(raw: bytes | str) -> object:
    """The value that a JSON text of a file holds, in UTF-8 where it is bytes, with U+FFFD for surrogates.

    Raises ValueError for what is no JSON, and for more of it than any real file has.
    """
    require_bounded_json(raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw)
    text = raw if isinstance(raw, str) else raw.decode()
    value = json.loads(
        text, parse_int=lambda digits: parse_number(int, digits), parse_float=lambda digits: parse_number(float, digits)
    )
    return replace_surrogates(value) if "\\u" in text else value


def require_bounded_json(raw: bytes) -> None:
    """Raises ValueError unless a JSON text is inside the bounds, which are counted in its letters."""
    if raw.count(b"\\") > MOST_ESCAPES:
        raise ValueError(f"it holds more than {MOST_ESCAPES:,} backslashes")
    quoted = raw.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in raw else raw
    if quoted.count(b'"') > 4 * MOST_VALUES:
        raise ValueError(f"it holds more than {2 * MOST_VALUES:,} texts")
    outside = b"".join(quoted.split(b'"')[::2])
    values = sum(map(outside.count, (b",", b"[", b"{")))
    if values > MOST_VALUES:
        raise ValueError(f"it holds {values:,} values, and {MOST_VALUES:,} are the most")
    steps = (1 if bracket in b"[{" else -1 for bracket in BRACKETS.sub(b"", outside))
    if max(accumulate(steps), default=0) > MOST_DEPTH:
        raise ValueError(f"its lists and objects are nested more than {MOST_DEPTH} deep")


def parse_number(kind: type, digits: str) -> int | float:
    """A number; raises ValueError for one of more digits than any has."""
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"it holds a number of {len(digits):,} digits")
    return kind(digits)
