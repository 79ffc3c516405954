"""Text from outside, made safe to encode and to show: names, descriptions and metadata are whatever their authors typed."""

from __future__ import annotations

import re
import sys

SURROGATE = re.compile("[\ud800-\udfff]")
# What a terminal obeys or shows backwards: C0, DEL and C1 but for tab and newline, Unicode's own line breaks, and the
# controls of writing direction.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


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
