"""Which sampling of ComfyUI's graph a recording is of, and whether a picture comes from it."""

from __future__ import annotations

import hashlib
import json

from comfy_execution.utils import get_executing_context

from ...attention.frames import Origin
from ...attention.recorder import AttentionRecording
from ...errors import ForgetError


def executing() -> Origin | None:
    """The node that executes, and what leads to it; None outside a graph."""
    who = get_executing_context()
    return who and Origin(who.prompt_id, who.node_id, inputs_of(running(who.prompt_id), who.node_id))


def running(job: str) -> dict:
    """The graph of a job that runs."""
    from server import PromptServer  # which is there where a graph runs

    queue = PromptServer.instance.prompt_queue
    with queue.mutex:
        return next((item[2] for item in queue.currently_running.values() if item[1] == job), {})


def drop_stale(recording: AttentionRecording, prompt: dict) -> None:
    """Drops what was recorded in earlier jobs by samplers that the graph has no more, or that would sample something else
    now."""
    assert recording.origin is not None
    for sampler, earlier in [*recording.earlier.items()]:
        assert earlier.origin is not None
        same = sampler in prompt and earlier.origin.digest == inputs_of(prompt, sampler)
        if earlier.origin.job != recording.origin.job and not same:
            del recording.earlier[sampler]


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


def inputs_of(prompt: dict, node: str) -> str | None:
    """What leads to a node, with every value; None for a node that another one has made."""
    parts = [(id, prompt[id]["class_type"], prompt[id]["inputs"]) for id in sorted(upstream(prompt, node))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest() if parts else None


def samples(prompt: dict, node: str) -> bool:
    """Whether a node samples, as far as can be seen from outside: it gets a model, and gives pictures or latents."""
    from nodes import NODE_CLASS_MAPPINGS  # which are there where a graph runs

    types = NODE_CLASS_MAPPINGS.get(prompt[node]["class_type"])
    if types is None or prompt[node]["class_type"].startswith("FMN_"):
        return False
    links = [value for value in prompt[node]["inputs"].values() if is_link(value) and str(value[0]) in prompt]
    given = [(NODE_CLASS_MAPPINGS.get(prompt[str(source)]["class_type"]), place) for source, place in links]
    kinds = {kind.RETURN_TYPES[place] for kind, place in given if kind and place < len(kind.RETURN_TYPES)}
    return bool(kinds & {"MODEL", "GUIDER"} and {*types.RETURN_TYPES} & {"LATENT", "IMAGE"})


def title(prompt: dict, node: str) -> str:
    """What a node is called in a sentence."""
    return f"{prompt[node]['class_type']} #{node}"


def recording_of(
    recording: AttentionRecording, prompt: dict | None, node: str, input: str
) -> tuple[AttentionRecording, str]:
    """Of what several samplers have recorded, that of the last one before the pictures at an input of a node, and a sentence
    that says which one it is; an empty one where nobody can say.

    Raises ForgetError where they are pictures of none of them, or of several, or from the host's cache while the sampler
    has recorded something else since.
    """
    prompt = prompt or {}
    origins = [(one, one.origin) for one in (recording, *recording.earlier.values()) if one.origin]
    recorded = {origin.sampler: (one, origin.digest) for one, origin in origins if origin.sampler in prompt}
    source = prompt[node]["inputs"].get(input) if recorded and node in prompt else None
    if source is None or not is_link(source):
        return recording, ""
    before = {id: upstream(prompt, id) for id in upstream(prompt, str(source[0]))}
    samplers = [id for id in recorded if id in before]
    last = [id for id in samplers if not any(id in before[other] for other in samplers if other != id)]
    if not last:
        raise ForgetError(
            f"The pictures at `{input}` are not of a sampler that recorded: connect the MODEL of this recording's Record "
            "Token Attention to the sampler whose pictures they are."
        )
    if len(last) > 1:
        several = " and ".join(sorted(title(prompt, id) for id in last))
        raise ForgetError(f"The pictures at `{input}` come from {several}: connect those of one.")
    sampler = last[0]
    found, made_of = recorded[sampler]
    if made_of != inputs_of(prompt, sampler):
        raise ForgetError(
            f"The pictures at `{input}` come from the cache, and the recording holds a later sampling: sample again, with "
            "another seed."
        )
    text = f"Recorded in {title(prompt, sampler)}."
    later = [title(prompt, id) for id in before if id != sampler and sampler in before[id] and samples(prompt, id)]
    if later:
        text += (
            f" After that the picture was sampled again in {' and '.join(sorted(later))}, which was not recorded; to see "
            "that pass, connect the MODEL of Record Token Attention there too."
        )
    return found, text
