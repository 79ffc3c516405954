"""Which sampling of ComfyUI's graph a recording is of, and whether a picture comes from it."""

from __future__ import annotations

import hashlib
import json

from comfy_execution.utils import get_executing_context

from ..errors import ForgetError
from ..recording import AttentionRecording, Origin


def executing() -> Origin | None:
    """The node that executes, and what leads to it; None outside a graph."""
    who = get_executing_context()
    if who is None:
        return None
    from server import PromptServer  # which is there where a graph runs

    queue = PromptServer.instance.prompt_queue
    with queue.mutex:
        prompt = next((item[2] for item in queue.currently_running.values() if item[1] == who.prompt_id), {})
    return Origin(who.prompt_id, who.node_id, digest(prompt, who.node_id))


def upstream(prompt: dict, node: str) -> set[str]:
    """The node and all whose outputs lead to it."""
    found, ahead = set(), [node]
    while ahead:
        id = ahead.pop()
        if id in prompt and id not in found:
            found.add(id)
            ahead += [str(value[0]) for value in prompt[id]["inputs"].values() if is_link(value)]
    return found


def is_link(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], int)


def digest(prompt: dict, node: str) -> str | None:
    """What leads to a node, with every value; None for a node that another one has made."""
    parts = [(id, prompt[id]["class_type"], prompt[id]["inputs"]) for id in sorted(upstream(prompt, node))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest() if parts else None


def require_source(recording: AttentionRecording, prompt: dict | None, node: str, input: str) -> None:
    """Raises ForgetError where the pictures at an input of a node are not those of the recording.

    A recording is filled by whoever sampled last; what the sampler gave before may still be there in the host's cache.
    """
    origin = recording.origin
    if origin is None or not prompt or origin.sampler not in prompt or node not in prompt:
        return
    source = prompt[node]["inputs"].get(input)
    if not is_link(source):
        return
    if origin.sampler not in upstream(prompt, str(source[0])):
        raise ForgetError(
            f"The pictures at `{input}` are not of the sampler that recorded last: use a Record Token Attention of its own "
            "for each sampler."
        )
    if origin.digest != digest(prompt, origin.sampler):
        raise ForgetError(
            f"The pictures at `{input}` come from the cache, and the recording holds a later sampling: sample again, with "
            "another seed."
        )
