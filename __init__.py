"""ComfyUI's door. Outside a host (under pytest, in the webui) there is no folder_paths, and importing this does nothing."""

import logging
from importlib.util import find_spec

WEB_DIRECTORY = "./web"

if __package__ and find_spec("folder_paths") is not None:
    from .fmn_core.hosts.comfy.needs import refusal

    if why := refusal():
        logging.error(why)
        NODE_CLASS_MAPPINGS: dict[str, type] = {}  # of hosts of any age: a pack that is whole and has no nodes
    else:
        from .nodes import comfy_entrypoint

        __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
