"""Import Forget Patch and Export Forget Patch in a real ComfyUI server."""

from __future__ import annotations

import pytest
from conftest import ROOT
from safetensors.torch import load_file

from demo.server import ServerError
from fmn_core.patch.file import read_patch
from fmn_core.patch.patch import DOWN, UP

FILE = ROOT / "demo/loras/forget-cat.safetensors"


def graph(file, last, base="the connected model", **more):
    """Loader, import and a node at the end that takes the patch, whose values are `last`."""
    kind, values = last
    wired = {"model": ["1", 0], "clip": ["1", 1]}
    settings = {"concept_type": "object", "rank": 0, "energy": 0.99, "concept": "cat", **more}
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "emoji-sd-128.safetensors"}},
        "2": {"class_type": "FMN_ImportPatch", "inputs": {**wired, "file": file, "base": base, **settings}},
        "3": {"class_type": kind, "inputs": {"lora": ["2", 0], **values}},
    }


@pytest.mark.parametrize("format", ["peft", "diff"])
def test_an_exported_patch_comes_back_the_same(server, format):
    export = ("FMN_ExportPatch", {"format": format, "filename_prefix": "test/%concept%-%format%"})
    outputs = server.run(graph(FILE.name, export))
    assert f"cat-{format}_00001_.safetensors" in outputs["3"]["text"][0]
    assert "20 projections at rank 4" in outputs["2"]["text"][0]
    exported = server.output / f"loras/test/cat-{format}_00001_.safetensors"
    assert ("unet." in next(iter(load_file(exported)))) == (format == "peft")

    save = ("FMN_SavePatch", {"filename_prefix": f"test/back-{format}"})
    server.run(graph(f"test/{exported.name}", save, rank=4))
    back, own = read_patch(server.output / f"loras/test/back-{format}_00001_.safetensors"), read_patch(FILE)
    assert back.info["concept"] == "cat" and back.info["settings"]["preset"] == "imported" and back.info["statistics"]
    for name in own.modules:
        one, other = (patch[name + UP].float() @ patch[name + DOWN].float() for patch in (back, own))
        assert (one - other).norm() < 2e-3 * other.norm()


def test_what_cannot_be_imported_gets_a_sentence(server):
    save = ("FMN_SavePatch", {"filename_prefix": "x"})
    checkpoint = "checkpoint: emoji-sd-128.safetensors"
    with pytest.raises(ServerError, match="is that of the model"):
        server.run(graph(checkpoint, save))
    with pytest.raises(ServerError, match="is that of emoji-sd-128"):
        server.run(graph(checkpoint, save, base=checkpoint))
