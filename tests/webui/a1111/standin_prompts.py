"""The webui's prompts: emphasis, schedules, composable ones."""

from __future__ import annotations

import re

WEIGHTED = re.compile(r"\(([^():]+):([\d.]+)\)|(\bBREAK\b)")
WEIGHT = re.compile(r"(?s)(.*?)(?:\s*:\s*([-+]?\d*\.?\d+))?\s*")
EDITED = re.compile(r"\[([^\[\]]*)\]")


def parse_prompt_attention(text: str) -> list[list]:
    """Pieces of a prompt with their weights, a BREAK with -1; of the webui's syntax only `(words:1.2)`."""
    pieces, end = [], 0
    for found in WEIGHTED.finditer(text):
        pieces.append([text[end : found.start()], 1.0])
        pieces.append(["BREAK", -1] if found[3] else [found[1], float(found[2])])
        end = found.end()
    pieces.append([text[end:], 1.0])
    return [piece for piece in pieces if piece[0]] or [["", 1.0]]


def get_multicond_prompt_list(prompts):
    """Of each prompt (number of a text, weight) for its parts between AND; the texts; their numbers."""
    numbers, parts = {}, []
    for prompt in prompts:
        found = [WEIGHT.fullmatch(part) for part in re.split(r"\bAND\b", prompt)]
        parts.append([(numbers.setdefault(each[1], len(numbers)), float(each[2] or 1)) for each in found])
    return parts, [*numbers], numbers


def get_learned_conditioning_prompt_schedules(prompts, base_steps, hires_steps=None, use_old_scheduling=False):
    """Of each prompt [[last step, text], ...], for `[before:after:when]` and `[one|other]` that are not nested."""
    offset, steps = (base_steps, hires_steps) if hires_steps is not None else (0, base_steps)

    def text_at(step, prompt):
        def chosen(found):
            if "|" in found[1]:
                return found[1].split("|")[(step - 1) % len(found[1].split("|"))]
            *words, when = found[1].rsplit(":", 2)
            if not words:
                return found[0]
            last = (float(when) - (offset > 0)) * steps if "." in when else int(when) - offset
            before, after = words if len(words) == 2 else ("", words[0])
            return before if step <= int(last) else after

        return EDITED.sub(chosen, prompt)

    def schedule(prompt):
        every = [[step, text_at(step, prompt)] for step in range(1, steps + 1)]
        return [one for one, after in zip(every, [*every[1:], None], strict=True) if not after or after[1] != one[1]]

    return [schedule(prompt) for prompt in prompts]
