"""What a node that trains leaves behind when it is stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from comfy_api.latest import io

from ..fmn_core.hosts.comfy.folders import checkpoints_folder
from ..fmn_core.training.checkpoint import Checkpoint, Result
from .schema import tell


def checkpoint_for(node: type[io.ComfyNode], save: Callable[[Result], Path]) -> Checkpoint[Result]:
    """A checkpoint in the host's folder for them. `save` writes what is unfinished, and the node, which must have
    io.Hidden.unique_id, says where."""

    def rescue(result: Result) -> Path:
        path = save(result)
        tell(node, f"Stopped. What was done so far is in {path}. Queue again with the same inputs to resume.")
        return path

    return Checkpoint(checkpoints_folder(), rescue)
