"""What this host's node schema knows, asked in one place, and inputs made from the core's settings."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection

from comfy_api.latest import io
from server import PromptServer

CATEGORY = "Forget-Me-Not"
LoraModel = io.Custom("LORA_MODEL")
LossMap = io.Custom("LOSS_MAP")
ForgetSettings = io.Custom("FMN_FORGET_SETTINGS")
Recording = io.Custom("FMN_RECORDING")


def schema(**kwargs) -> io.Schema:
    """io.Schema with the fields that this host knows (`search_aliases` came after 0.3.75), and help that reads well whether
    the page takes it for Markdown or for text."""
    known = {f.name for f in dataclasses.fields(io.Schema)}
    made = io.Schema(category=CATEGORY, **{key: value for key, value in kwargs.items() if key in known})
    made.description = without_marks(made.description)
    for slot in (*made.inputs, *made.outputs):
        slot.tooltip = slot.tooltip and without_marks(slot.tooltip)
    return made


def without_marks(text: str) -> str:
    """A text without its marks of code: the newest page draws code dark on dark."""
    return text.replace("`", "")


def tell(node: type[io.ComfyNode], text: str) -> None:
    """Shows a text on a node, which must have io.Hidden.unique_id, in the page that queued it: for one that ends without
    an output. What has an output gives its text as `ui.PreviewText`; web/forget_me_not.js puts either on the node."""
    server = PromptServer.instance
    if server.client_id is not None:  # without one the host tells every page
        server.send_sync("forget-me-not.text", {"node": node.hidden.unique_id, "text": text}, server.client_id)


def widget(kind, id: str, *, advanced: bool = False, **kwargs):
    """An input of `kind` (io.Int ...), marked advanced where the host knows that."""
    if advanced and "advanced" in inspect.signature(kind.Input.__init__).parameters:
        kwargs["advanced"] = True
    return kind.Input(id, **{key: value for key, value in kwargs.items() if value is not None})


def settings_inputs(settings: type, only: Collection[str] | None = None, without: Collection[str] = ()) -> list:
    """One widget for each field of a settings dataclass, or for `only` some or all `without` some, with its help, default
    and bounds; advanced ones last."""
    inputs, every = [], dataclasses.fields(settings)
    fields = [f for f in every if f.name not in without] if only is None else [f for f in every if f.name in only]
    for f in sorted(fields, key=lambda f: f.metadata["advanced"]):
        common = {"default": f.default, "tooltip": f.metadata["help"], "advanced": f.metadata["advanced"]}
        common["display_name"] = f"{f.name} (0: auto)" if f.metadata["auto"] else None
        if f.metadata["choices"]:
            inputs.append(widget(io.Combo, f.name, options=list(f.metadata["choices"]), **common))
        elif isinstance(f.default, bool):
            inputs.append(widget(io.Boolean, f.name, **common))
        elif isinstance(f.default, str):
            inputs.append(widget(io.String, f.name, multiline=f.metadata["multiline"], **common))
        else:
            kind = io.Int if isinstance(f.default, int) else io.Float
            bounds = {key: f.metadata[key] for key in ("min", "max", "step")}
            # The page gives a `seed` a control that randomises it, and so trains again at each queueing, unless told not to.
            control = False if f.name == "seed" else None
            inputs.append(widget(kind, f.name, control_after_generate=control, **bounds, **common))
    return inputs
