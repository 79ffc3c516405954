"""What is wrong in a graph gets a sentence from a real ComfyUI server."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import ROOT
from graphs import Graphs
from titles import node_id, titled

from demo.server import ServerError
from demo.workflow import load_workflow


@pytest.fixture(scope="module")
def info(server):
    return server.get("object_info")


@pytest.fixture
def bad(info):
    """The workflow of the whole job in few steps, for a test to make wrong."""
    workflow = load_workflow(ROOT / "workflows/forget-a-concept.json", info)
    for title in ("Before", "After"):
        titled(workflow)[title]["steps"] = 2
    return workflow


@pytest.mark.parametrize(
    ("title", "change", "message"),
    [
        ("Forget Concept", {"concept": "  "}, "The concept is empty"),
        ("Forget Concept", {"concept_type": "custom"}, "needs a template"),
        ("Forget Concept", {"target": "dog"}, "The mode `remove` has no `target`"),
        ("Forget Concept", {"preset": "paper", "preserve": "dog"}, "`paper` preserves nothing"),
        ("Save Forget Patch", {"filename_prefix": "../../outside"}, "leads out of"),
        ("Save Forget Patch", {"filename_prefix": "/tmp/outside"}, "leads out of"),
        ("Save Forget Patch", {"filename_prefix": "a\0b"}, "holds characters that no file name should"),
        ("Save Forget Patch", {"filename_prefix": "x" * 300}, "File name too long. Choose another name"),
        ("Attention before", {"words": "dog"}, "`dog` is not in the recorded prompt"),
    ],
)
def test_bad_input_gets_a_sentence(server, bad, title, change, message):
    titled(bad)[title] |= change
    with pytest.raises(ServerError, match=re.escape(message)):
        server.run(bad)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "fast", "concept_type": "custom", "template": "a cat"}, "has no {}"),
        ({"preset": "paper", "resolution": 8}, "use 0 for the model's own"),
    ],
)
def test_bad_settings_get_a_sentence(server, bad, settings, message):
    Graphs(server).set_preset(bad, node_id(bad, "Forget Concept"), **settings)
    with pytest.raises(ServerError, match=re.escape(message)):
        server.run(bad)


def test_settings_of_another_preset_get_a_sentence(server, bad):
    Graphs(server).set_preset(bad, node_id(bad, "Forget Concept"), "paper", steps=2)
    titled(bad)["Forget Concept"]["preset"] = "balanced"
    with pytest.raises(ServerError, match="the settings are for `paper`: connect Forget Settings \\(balanced\\)"):
        server.run(bad)


def test_a_file_that_is_no_patch_gets_a_sentence(server, bad):
    from safetensors.torch import save_file

    (server.output / "loras").mkdir(exist_ok=True)
    save_file({"lora_unet_x.alpha": torch.ones(())}, server.output / "loras/plain.safetensors")
    titled(bad)["Apply FMN Patch"]["patch"] = "plain.safetensors"
    with pytest.raises(ServerError, match="plain.safetensors is not a forget patch"):
        server.run(bad)
