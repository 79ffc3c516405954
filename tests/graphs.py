"""Small graphs for a real server, and what came of them."""

from __future__ import annotations

import io
import json
import urllib.request

import numpy as np
from PIL import Image
from waiting import while_changing

from demo.server import ComfyServer, ServerError
from fmn_core.erasure.config import MAIN_FIELDS


class Graphs:
    """Makes API-format prompts for a server, whose widgets keep their defaults where nothing else is said."""

    def __init__(self, server: ComfyServer):
        self.server, self.info = server, server.get("object_info")

    def node(self, kind: str, **inputs) -> dict:
        """A node with these inputs and defaults for the rest."""
        defaults = {}
        for group in ("required", "optional"):
            for name, (type, *options) in self.info[kind]["input"].get(group, {}).items():
                options = options[0] if options else {}
                if "default" in options:
                    defaults[name] = options["default"]
                elif isinstance(type, list) and group == "required":
                    defaults[name] = type[0]
                elif options.get("options") and group == "required":
                    defaults[name] = options["options"][0]
        return {"class_type": kind, "inputs": defaults | inputs}

    def set_preset(self, graph: dict, forget: str, preset: str, **settings) -> None:
        """Has the node `forget` of a graph use this preset, with a Forget Settings node for what it does not show."""
        main = {name: settings.pop(name) for name in MAIN_FIELDS if name in settings}
        graph[forget]["inputs"] |= {"preset": preset, **main}
        if settings:
            name = f"{forget} settings"
            graph[name] = self.node(f"FMN_ForgetSettings_{preset}", **settings) | {"_meta": {"title": name}}
            graph[forget]["inputs"]["settings"] = [name, 0]

    def forget(self, concept: str, seed: int = 0, record: bool = False, preset: str = "fast", **settings) -> dict[str, dict]:
        """Forgets a concept, puts the patch on the model, and draws a small picture; with `record`, recording attention."""
        model = ["record", 0] if record else ["apply", 0]
        graph = {
            "load": self.node("CheckpointLoaderSimple", ckpt_name="emoji-sd-128.safetensors"),
            "forget": self.node("FMN_ForgetConcept", model=["load", 0], clip=["load", 1], concept=concept),
            "apply": self.node("FMN_ApplyPatch", model=["load", 0], clip=["load", 1], lora=["forget", 0]),
            "asked": self.node("CLIPTextEncode", clip=["load", 1], text=f"a photo of a {concept}"),
            "empty": self.node("CLIPTextEncode", clip=["load", 1], text=""),
            "latent": self.node("EmptyLatentImage", width=64, height=64, batch_size=1),
            "sample": self.node(
                "KSampler", model=model, positive=["asked", 0], negative=["empty", 0], latent_image=["latent", 0],
                seed=seed, steps=2, cfg=3.0, sampler_name="euler", scheduler="normal", denoise=1.0,
            ),
            "decode": self.node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
            "show": self.node("PreviewImage", images=["decode", 0]),
        }  # fmt: skip
        self.set_preset(graph, "forget", preset, **settings)
        if record:
            graph["record"] = self.node(
                "FMN_RecordAttention", model=["apply", 0], clip=["load", 1], text=f"a photo of a {concept}"
            )
            seen = {"recording": ["record", 1], "image": ["decode", 0], "words": concept}
            graph["look"] = self.node("FMN_VisualizeTokenAttention", **seen)
            graph["map"] = self.node("PreviewImage", images=["look", 0])
        return graph

    def queue(self, graph: dict, client: str) -> str:
        """Queues a graph; returns its id."""
        return self.post("prompt", {"prompt": graph, "client_id": client})["prompt_id"]

    def post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(
            f"{self.server.url}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.loads(response.read() or b"{}")

    def wait(self, id: str) -> dict:
        """A finished graph's history; raises ServerError where it fails, or the server says no more for long."""

        def look():
            try:
                found = self.server.get(f"history/{id}").get(id)
            except TimeoutError:  # a busy machine
                found = None
            return found, self.server.log.stat().st_size

        for found, _ in while_changing(look, stalled=600):
            if found and found["status"]["completed"]:
                return found
            if found and found["status"]["status_str"] == "error":
                raise ServerError(json.dumps(found["status"]["messages"][-1])[:2000])
        raise ServerError(f"{id} does not end: {self.server.log.read_text()[-2000:]}")

    def seen(self, history: dict) -> tuple[str, bytes]:
        """What the node said and the pixels of the picture."""
        outputs = history["outputs"]
        said = outputs.get("forget", {}).get("text", [""])[0]
        (image,) = outputs["show"]["images"]
        return said, np.asarray(Image.open(io.BytesIO(self.server.picture(image)))).tobytes()
