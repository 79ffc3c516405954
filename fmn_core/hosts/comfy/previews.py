"""Whether ComfyUI shows previews, and to anybody."""

from __future__ import annotations

import sys

import comfy.utils
from comfy.cli_args import LatentPreviewMethod, args


def previews_seen() -> bool:
    """Whether `--preview-method`, or the page's own choice for this job, has previews, and the page that asked for the job,
    or any where none is named, is there to get them."""
    if args.preview_method == LatentPreviewMethod.NoPreviews or comfy.utils.PROGRESS_BAR_HOOK is None:
        return False
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None:  # another program's hook
        return True
    return bool(server.sockets) if server.client_id is None else server.client_id in server.sockets
