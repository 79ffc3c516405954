"""Runs ComfyUI's main.py: `python launch_comfyui.py FOLDER ARGUMENTS...`.

Where torchvision's compiled operators do not fit the installed torch (the registry has no CPU build of torchvision),
it names the two that torchvision asks for at import; nothing that runs here calls them.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

import torch


def operators_load() -> bool:
    """Whether torchvision's compiled library loads beside this torch."""
    folder = Path(importlib.util.find_spec("torchvision").origin).parent
    try:
        torch.ops.load_library(next(folder.glob("_C.*")))
        return True
    except (OSError, StopIteration):
        return False


if importlib.util.find_spec("torchvision") and not operators_load():
    missing = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        missing.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

folder, *arguments = sys.argv[1:]
sys.path[0] = folder
sys.argv = [str(Path(folder, "main.py")), *arguments]
runpy.run_path(sys.argv[0], run_name="__main__")
