"""ComfyUI's door. Outside a host (under pytest, in the webui) there is no comfy_api, and importing this does nothing."""

from importlib.util import find_spec

WEB_DIRECTORY = "./web"

if __package__ and find_spec("comfy_api") is not None:
    from .nodes import comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
