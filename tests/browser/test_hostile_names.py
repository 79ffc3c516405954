"""Names and texts that are HTML, on nodes in the real page: text there, and never script."""

from __future__ import annotations

import json

from comfyui_page import browser, open_page, page, run, wait_for_frames  # noqa: F401
from graphs import Graphs
from hostile_files import renamed, write

# Resolves when a picture that is not there has failed: by then those before it have.
MISSING = """new Promise(done => {
    const picture = new Image()
    picture.onerror = done
    picture.src = 'y'
})"""
SCRIPT = "cat<img src=x onerror='window.scripts = (window.scripts || 0) + 1'>"


def test_no_text_on_a_node_runs_as_script_in_the_page(page, server):  # noqa: F811
    """Every node that shows text, on names, descriptions and tensor names that are HTML, each in a real run."""
    folder = server.output / "loras"
    write(renamed(SCRIPT), folder / "hostile.safetensors")
    write(renamed("dog"), folder / "harmless.safetensors")
    graphs = Graphs(server)
    load = graphs.node("CheckpointLoaderSimple", ckpt_name="emoji-sd-128.safetensors")
    asked = graphs.node("CLIPTextEncode", clip=["load", 1], text="a photo of a cat")
    hostile = {"patch": "hostile.safetensors"}
    forget = graphs.node("FMN_ForgetConcept", model=["load", 0], clip=["load", 1], concept=SCRIPT)
    stack_both = graphs.node(
        "FMN_StackPatches", model=["load", 0], patch_1="hostile.safetensors", patch_2="harmless.safetensors"
    )
    nodes = {
        "1": load,
        "2": asked,
        "3": graphs.node("FMN_InspectPatch", **hostile),
        "4": stack_both,
        "5": graphs.node("FMN_GatePatch", conditioning=["2", 0], **hostile),
        "6": forget,
        "7": graphs.node("PreviewAny", source=["4", 4]),
        "8": graphs.node("PreviewAny", source=["5", 1]),
        "9": graphs.node("FMN_SavePatch", lora=["6", 0]),
    }
    prompt = json.loads(json.dumps(nodes).replace('"load"', '"1"'))
    open_page(page, server, "?template=apply-a-saved-patch&source=forget-me-not")  # without the page's first greeting
    page.evaluate("prompt => app.loadApiJson(prompt, 'hostile')", prompt)
    entry = run(page, server)
    page.evaluate(MISSING)
    wait_for_frames(page)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    assert page.evaluate("window.scripts || 0") == 0
