"""Inspect Patch in a real ComfyUI server."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from demo.run import load_pictures
from demo.server import ServerError
from fmn_core.errors import ForgetError
from fmn_core.inspection.describe import text_of
from fmn_core.inspection.inspect import inspect_patch
from fmn_core.patch.file import read_patch


def test_the_node_says_and_draws_in_a_real_server(server):
    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}

    forgetting = server.get("object_info")["FMN_ForgetConcept"]["input"]["required"]
    settings = {name: spec[1]["default"] for name, spec in forgetting.items() if "default" in spec[1]}
    workflow = {
        "1": node("CheckpointLoaderSimple", ckpt_name="emoji-sd-128.safetensors"),
        "2": node("FMN_ForgetConcept", model=["1", 0], clip=["1", 1], **settings),
        "3": node("FMN_SavePatch", lora=["2", 0], filename_prefix="inspected"),
        "4": node("FMN_InspectPatch", patch="from the lora input", lora=["2", 0], model=["1", 0]),
        "5": node("PreviewImage", images=["4", 1]),
        "6": node("PreviewAny", source=["4", 0]),
    }  # fmt: skip
    outputs = server.run(workflow)
    (text,) = outputs["4"]["text"]
    assert outputs["6"]["text"][0] == text and "This patch forgets cat." in text and "Made for this very model" in text
    assert "not saved yet" in text
    assert load_pictures(server, outputs["5"]["images"]).shape[2:] == (1024, 3)
    file = Path(outputs["3"]["text"][0].split()[-1])
    alone = {"4": node("FMN_InspectPatch", patch=file.name)}
    (text,) = server.run(alone)["4"]["text"]
    assert text == text_of(inspect_patch(read_patch(file), file=file)) and f"{file.name} forgets cat." in text
    save_file({"lora_unet_x.alpha": torch.ones(())}, file.with_name("ordinary.safetensors"))
    for patch, message in (
        ("ordinary.safetensors", "ordinary.safetensors is not a forget patch"),
        ("from the lora input", "There is no patch: choose a file"),
    ):
        with pytest.raises((ServerError, ForgetError), match=message):
            server.run({"4": node("FMN_InspectPatch", patch=patch)})
