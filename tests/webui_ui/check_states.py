"""Where trainings' states lie, in a webui's process: run by tests/test_webui_script.py."""

from __future__ import annotations

import os
import shutil

from fastapi import FastAPI
from modules import script_callbacks

from fmn_core.training.checkpoint import BESIDE, ENDING


def test_states_in_the_lora_folder_move_out_of_it(script, loras):
    """When the webui starts; of two of one training the later stays."""
    old, new = loras / BESIDE, loras.parent / "forget-me-not"
    written = [(old, "only", 1), (old, "later", 3), (new, "later", 2), (old, "earlier", 1), (new, "earlier", 2)]
    for folder, name, time in written:
        file = folder / f"{name}{ENDING}"
        file.parent.mkdir(exist_ok=True)
        file.write_text(str(time))
        os.utime(file, (time, time))
    try:
        for callback in script_callbacks.app_started:
            callback(None, FastAPI())
        assert {file.stem: file.read_text() for file in new.iterdir()} == {"only": "1", "later": "3", "earlier": "2"}
        assert not old.exists()
    finally:
        shutil.rmtree(new)
