"""What the pack needs of ComfyUI, asked once, before any node is there to fail for the want of it."""

from __future__ import annotations

import importlib

VERSION = "0.3.75"  # the first that has all of it
NEEDED = {
    "comfy_api.latest": (
        "ComfyExtension", "ui.PreviewText", "io.ComfyNode", "io.Custom", "io.Hidden.prompt", "io.Hidden.unique_id",
        "io.NodeOutput", "io.Schema", "io.Boolean", "io.Clip", "io.ClipVision", "io.Combo", "io.Conditioning", "io.Float",
        "io.Image", "io.Int", "io.Mask", "io.Model", "io.String", "io.Vae",
    ),
    "comfy.hooks": ("HookKeyframe", "HookKeyframeGroup", "create_hook_lora", "set_hooks_for_conditioning"),
    "comfy.ldm.modules.attention": ("attention_pytorch", "wrap_attn"),  # the second with `optimized_attention_override`
    "comfy.model_management": ("get_free_memory", "loaded_models", "throw_exception_if_processing_interrupted"),
    "comfy.model_patcher": tuple(
        f"ModelPatcher.{method}"
        for method in ("add_callback_with_key", "add_wrapper_with_key", "clone", "get_model_object", "is_clone")
    ),
    "comfy.patcher_extension": (
        "CallbacksMP.ON_PRE_RUN", "CallbacksMP.ON_CLEANUP", "WrappersMP.OUTER_SAMPLE", "WrappersMP.CALC_COND_BATCH",
    ),
    "comfy_execution.utils": ("get_executing_context",),
    "folder_paths": ("get_save_image_path", "get_system_user_directory"),
    "server": ("PromptServer.send_progress_text",),
}  # fmt: skip


def refusal() -> str:
    """Why the pack cannot work in this ComfyUI, in a sentence for its log, or nothing where it can."""
    lacking = [f"{module}.{name}" for module, names in NEEDED.items() for name in names if not has(module, name)]
    if not lacking:
        return ""
    few = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
    return (
        f"Forget-Me-Not needs ComfyUI {VERSION} or later and adds no nodes to this one: it is {host_version()} and has no "
        f"{few}: update ComfyUI."
    )


def has(module: str, name: str) -> bool:
    """Whether a module is there and has a name, which may have dots in it."""
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return False
    return True


def host_version() -> str:
    """What ComfyUI says that it is, or that it does not say so."""
    try:
        return importlib.import_module("comfyui_version").__version__
    except (ImportError, AttributeError):
        return "of no known version"
