"""Runs ComfyUI's main.py: `python launch_comfyui.py FOLDER ARGUMENTS...`."""

import importlib.util
import runpy
import sys
from pathlib import Path

import torch


def name_missing_operators() -> None:
    """Where torchvision's compiled operators do not fit the installed torch (the registry has no CPU build of
    torchvision), names the two that torchvision asks for at import; nothing that runs here calls them."""
    torchvision = importlib.util.find_spec("torchvision")
    if torchvision is None or hasattr(name_missing_operators, "library"):
        return
    try:
        torch.ops.load_library(next(Path(torchvision.origin).parent.glob("_C.*")))
    except (OSError, StopIteration):
        missing = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            missing.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        name_missing_operators.library = missing  # it goes when nobody holds it


if __name__ == "__main__":
    name_missing_operators()
    folder, *arguments = sys.argv[1:]
    sys.path[0] = folder
    # torch is imported, and has chosen how it allocates a GPU's memory: ComfyUI must not choose another way
    sys.argv = [str(Path(folder, "main.py")), "--disable-cuda-malloc", *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")
