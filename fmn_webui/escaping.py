"""Texts of anybody's on their way into a page or an answer: names of concepts and files, what files say, errors."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable

from fmn_core.log import replace_surrogates


class Markup(str):
    """HTML in which every text is escaped: only the functions below make it."""


def markup(template: str, *values) -> Markup:
    """The template, HTML of ours, with values for its `{}`: Markup as it is, everything else as escaped text."""
    return Markup(template.format(*(value if isinstance(value, Markup) else escaped(str(value)) for value in values)))


def joined(parts: Iterable[Markup]) -> Markup:
    """Pieces of HTML one after the other; what is no Markup is text."""
    return Markup("".join(markup("{}", part) for part in parts))


def escaped(text: str) -> Markup:
    return Markup(html.escape(replace_surrogates(text)))


def sentence(text: str) -> Markup:
    """A sentence as HTML, with what stands between backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", escaped(text)))


def json_values(value):
    """The value as JSON can hold it: texts that can be encoded, and null for a number that is none."""
    if isinstance(value, dict):
        return {replace_surrogates(str(key)): json_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int) else replace_surrogates(str(value))
