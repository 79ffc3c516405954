"""Whether anybody sees the previews that are sent to ComfyUI's page."""

from __future__ import annotations

import sys

import comfy.utils


def previews_seen() -> bool:
    """Whether the page that asked for the job, or any where none is named, is there to get them.

    `--preview-method` says what samplers show of their latents, which by default is nothing; the page shows what nodes send.
    """
    if comfy.utils.PROGRESS_BAR_HOOK is None:
        return False
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None:  # another program's hook
        return True
    return bool(server.sockets) if server.client_id is None else server.client_id in server.sockets
