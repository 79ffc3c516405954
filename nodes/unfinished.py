"""What a node that trains leaves behind when it is stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..fmn_core.checkpoint import Checkpoint
from .schema import shown


def checkpoint_for(node: type[io.ComfyNode], save: Callable[[object], Path]) -> Checkpoint:
    """A checkpoint among the host's own files of users, which are neither served nor cleared at its start. `save` writes
    what is unfinished, and the node, which must have io.Hidden.unique_id, says where."""

    def rescue(result: object) -> Path:
        path = save(result)
        shown(node, f"Stopped. What was done so far is in {path}. Queue again with the same inputs to go on from there.")
        return path

    return Checkpoint(Path(folder_paths.get_system_user_directory("forget_me_not"), "checkpoints"), rescue)
