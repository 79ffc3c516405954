"""Names and texts that are HTML, on nodes in the real page: text there, and never script."""

from __future__ import annotations

import json
import time

from comfyui_page import browser, open_page, page  # noqa: F401
from graphs import Graphs
from hostile_files import renamed, write

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
    done = len(server.get("history"))
    page.evaluate("app.queuePrompt(0)")
    deadline = time.monotonic() + 180
    while len(server.get("history")) == done and time.monotonic() < deadline:
        page.wait_for_timeout(300)
    page.wait_for_timeout(1000)  # for what a picture that is not there would run
    entry = [*server.get("history").values()][-1]
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    assert page.evaluate("window.scripts || 0") == 0
