"""What a setting is: a dataclass field with its own help and bounds."""

from __future__ import annotations

from dataclasses import field, fields

from .errors import ForgetError

MOST_TEXT = 1 << 16  # letters of a text: the words of a long `preserve` have 10 thousand


def setting(default, help: str, *, choices=None, min=None, max=None, step=None, auto=False, advanced=False, multiline=False):
    """A dataclass field that carries its own help, bounds, whether 0 means automatic, and whether it is for everyday use."""
    metadata = {
        "help": help,
        "choices": choices,
        "min": min,
        "max": max,
        "step": step,
        "auto": auto,
        "advanced": advanced,
        "multiline": multiline,
    }
    return field(default=default, metadata=metadata)


def check(settings) -> None:
    """Raises ForgetError for a value that is not among its field's choices or is out of its bounds."""
    for f in fields(settings):
        value, limits = getattr(settings, f.name), f.metadata
        if isinstance(value, str):
            require_text(value)
            if len(value) > MOST_TEXT:
                raise ForgetError(f"{f.name} has {len(value):,} characters: use {MOST_TEXT:,} at most.")
        if limits["choices"] and value not in limits["choices"]:
            raise ForgetError(f"`{value}` is not a valid {f.name}: choose one of {', '.join(limits['choices'])}.")
        if limits["min"] is not None and not limits["min"] <= value <= limits["max"]:
            raise ForgetError(f"{f.name} is {value}: use a value from {limits['min']} to {limits['max']}.")
    if 0 < getattr(settings, "resolution", 0) < 64:
        raise ForgetError(f"resolution is {settings.resolution}: use 0 for the model's own, or 64 and more.")


def require_text(*texts: str) -> None:
    """Raises ForgetError for a text that is none: half of a character, which JSON can hold and no tokenizer reads."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ForgetError(f"{ascii(text[:60])} has invalid Unicode at character {error.start + 1}: retype it.") from None
