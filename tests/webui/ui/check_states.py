"""Where trainings' states lie, in a webui's process: run by tests/webui/test_webui_script.py."""

from __future__ import annotations

import shutil

from fastapi import FastAPI
from modules import script_callbacks

from fmn_core.training.checkpoint import BESIDE, ENDING
from fmn_webui import webui


def test_states_of_the_command_line_in_the_lora_folder_stay_there(script, loras):
    """When the webui starts and when it is asked for its own: `--output` in the LoRA folder goes on from there."""
    state = loras / BESIDE / f"unfinished{ENDING}"
    state.parent.mkdir()
    state.write_text("of the command line")
    try:
        for callback in script_callbacks.app_started:
            callback(None, FastAPI())
        assert webui.states_folder() not in (loras, *loras.rglob("*"))
        assert state.read_text() == "of the command line" and not [*webui.states_folder().glob(f"*{ENDING}")]
    finally:
        shutil.rmtree(state.parent)
        shutil.rmtree(loras.parent / "forget-me-not", ignore_errors=True)
