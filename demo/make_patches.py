"""Makes the patches in demo/loras that the example workflows use: `python -m demo.make_patches COMFYUI_FOLDER`.

Runs the pack's own nodes in a real server, at their defaults.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from .server import PACK, ComfyServer
from .workflow import by_title, load_workflow

CONCEPTS = ("cat", "car")


def main(comfyui: Path) -> None:
    with tempfile.TemporaryDirectory() as work, ComfyServer(comfyui, Path(work)) as server:
        workflow = load_workflow(PACK / "workflows/forget-a-concept.json", server.get("object_info"))
        ids = by_title(workflow)
        needed = [ids[title] for title in ("Load Checkpoint", "Forget Concept", "Save Forget Patch")]
        for concept in CONCEPTS:
            workflow[ids["Forget Concept"]]["inputs"]["concept"] = concept
            server.run({id: workflow[id] for id in needed})
            saved = next((server.output / "loras").glob(f"forget-{concept}_*.safetensors"))
            shutil.copyfile(saved, PACK / f"demo/loras/forget-{concept}.safetensors")
            print(f"demo/loras/forget-{concept}.safetensors  {saved.stat().st_size:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m demo.make_patches", description=__doc__)
    parser.add_argument("comfyui", type=Path, metavar="COMFYUI_FOLDER")
    main(parser.parse_args().comfyui.resolve())
