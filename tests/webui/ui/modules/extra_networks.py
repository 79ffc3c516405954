"""LoRA tags of prompts, as the webui takes them apart."""

import re
from collections import defaultdict

TAG = re.compile(r"<(\w+):([^>]+)>")


class ExtraNetworkParams:
    def __init__(self, items=None):
        self.items = items or []
        self.positional = [item for item in self.items if "=" not in item]
        self.named = dict(item.split("=", 1) for item in self.items if "=" in item)


def parse_prompt(prompt):
    found = defaultdict(list)

    def take(match):
        found[match[1]].append(ExtraNetworkParams(items=match[2].split(":")))
        return ""

    return TAG.sub(take, prompt), found


def parse_prompts(prompts):
    """The prompts without tags, and the tags of the first."""
    parsed = [parse_prompt(prompt) for prompt in prompts]
    return [text for text, _ in parsed], parsed[0][1]
