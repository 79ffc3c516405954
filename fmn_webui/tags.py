"""LoRA tags of a prompt: each patch once, at its sum."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence


def with_tags(prompt: str, rows: Sequence[tuple[str, float]]) -> str:
    """The prompt with a LoRA tag for each row. Where the prompt has that tag already there is one in the end, with the
    sum: hosts take the last weight of a name that comes twice, or apply it twice."""
    for name, strength in rows:
        own = re.compile(rf"<lora:{re.escape(name)}((?::[^<>:]*)*)>")
        total = strength + sum(unet_weight(found[1][1:].split(":")) for found in own.finditer(prompt))
        prompt = f"{own.sub('', prompt)}<lora:{name}:{total:g}>"
    return prompt


def unet_weight(parts: Sequence[str]) -> float:
    """The UNet's weight in what follows a LoRA's name: `te`, `te:unet`, `unet=...`; 1 where there is none."""
    named = dict(part.split("=", 1) for part in parts if "=" in part)
    placed = [part for part in parts if part and "=" not in part]
    try:
        te = float(named.get("te", placed[0] if placed else 1.0))
        return float(named.get("unet", placed[1] if len(placed) > 1 else te))
    except ValueError:
        return 1.0


def with_params(params: list, rows: Sequence[tuple[str, float]], make: Callable) -> list:
    """The same for tags that the host has taken apart already; `make(items)` makes one."""
    for name, strength in rows:
        own = [each for each in params if each.items and each.items[0] == name]
        total = strength + sum(unet_weight(each.items[1:]) for each in own)
        params = [each for each in params if each not in own] + [make([name, f"{total:g}"])]
    return params
