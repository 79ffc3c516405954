"""The values in the original's configs, read in the terms of their keys."""

from __future__ import annotations

import math
from pathlib import Path

from ..erasure.config import ResteeringConfig
from ..errors import ForgetError, brief
from ..inversion.config import InversionConfig


def whole(config: dict, key: str, settings: type[InversionConfig | ResteeringConfig], name: str) -> int:
    """A key's whole number; raises as `number`."""
    found = read_number(config, key, settings, name)
    assert isinstance(found, int)
    return found


def read_number(config: dict, key: str, settings: type[InversionConfig | ResteeringConfig], name: str) -> int | float:
    """A key's number, which becomes a field of the settings; a missing seed is 0, and YAML takes `2e-6` for a text.

    Raises ForgetError, in terms of the key, for what is not a number, and for one that the field's bounds do not allow.
    """
    kind, bounds = type(getattr(settings, name)), settings.__dataclass_fields__[name].metadata
    if config[key] is None and name == "seed":
        return 0
    found = config[key] if type(config[key]) is int else real(config, key)  # a seed may have more digits than a float
    if kind(found) != found:
        raise ForgetError(f"{key} is {found:g}: write a whole number.")
    found = kind(found)
    if not bounds["min"] <= found <= bounds["max"]:
        raise ForgetError(f"{key} is {found}: write a number from {bounds['min']} to {bounds['max']}.")
    return found


def flag(config: dict, key: str) -> bool:
    """A key that is true or false; raises ForgetError for anything else, such as a text, which would count as true."""
    if config[key] not in (True, False, None):
        raise ForgetError(f"{key} is `{brief(config[key])}`: write true or false.")
    return bool(config[key])


def real(config: dict, key: str) -> float:
    """A key's number; raises ForgetError where it has none."""
    try:
        found = float(config[key])
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ForgetError(f"{key} is `{brief(config[key])}`: write a number.")
    return found


def folder_of(config: dict, key: str, example: str) -> Path:
    """The folder that a key names; raises ForgetError where it names none."""
    name = config[key]
    if name in (None, ""):
        raise ForgetError(f"{key} is missing: write {example}.")
    if not isinstance(name, str) or "\0" in name:
        raise ForgetError(f"{key} is `{brief(name)}`: write a folder's name, in quotes where it is a number.")
    return Path(name)


def read_concepts(config: dict) -> list[tuple[str, str]]:
    """(name as folders have it, type) of every concept; raises ForgetError where the list is not one of pairs."""
    listed = config["multi_concept"]
    pairs = isinstance(listed, list) and all(isinstance(entry, list) and len(entry) == 2 for entry in listed)
    if not listed or not pairs:
        raise ForgetError(f"multi_concept is `{brief(listed)}`: write a list of pairs, such as [[elon-musk, object]].")
    return [(str(name), str(type)) for name, type in listed]
