"""Stack Forget Patches."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
import comfy.utils
import folder_paths
from comfy_api.latest import io, ui

from ..fmn_core.errors import ForgetError
from ..fmn_core.forget import summary
from ..fmn_core.hosts.comfy import apply_patch
from ..fmn_core.members import Member
from ..fmn_core.patch import is_patch, read_patch
from ..fmn_core.stack import stack
from .patch import FROM_INPUT, as_patch, changed_at
from .schema import LoraModel, schema

ROWS = 6
NONE = "none"
LoraStack = io.Custom("LORA_STACK")  # [(name, strength of the model, strength of the text encoder)]: what many packs share


class StackPatches(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        files = [name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors")]
        rows = []
        for row in range(1, ROWS + 1):
            rows += [
                io.Combo.Input(
                    f"patch_{row}",
                    options=[NONE, FROM_INPUT, *files],
                    tooltip=f"A saved patch, the one connected to `lora_{row}`, or none. Press R after saving to refresh.",
                ),
                io.Float.Input(
                    f"strength_{row}",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How much of this patch: 1 as it was made, 0 not at all.",
                ),
                io.Boolean.Input(f"on_{row}", default=True, tooltip="Off leaves this patch out."),
            ]
        return schema(
            node_id="FMN_StackPatches",
            display_name="Stack Forget Patches",
            description="Several patches that act together as each does alone: solved jointly, in any order, and savable as "
            "one. Chain several of these nodes by their lora_stack for any number.",
            search_aliases=["lora stack", "merge forget patches", "combine patches"],
            inputs=[
                *rows,
                io.Model.Input("model", optional=True, tooltip="The model to patch; a patched copy comes out."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder, for ordinary LoRAs in the list; patches leave it alone.",
                ),
                LoraStack.Input(
                    "lora_stack",
                    optional=True,
                    tooltip="A list from another stacker: its forget patches are solved together with these, its "
                    "ordinary LoRAs applied as always.",
                ),
                *(
                    LoraModel.Input(
                        f"lora_{row}", optional=True, tooltip=f"A patch for `patch_{row}`, straight from its node."
                    )
                    for row in range(1, ROWS + 1)
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with all of them on it."),
                io.Clip.Output(display_name="CLIP", tooltip="The text encoder, with the ordinary LoRAs of the list on it."),
                LoraModel.Output(
                    display_name="lora", tooltip="The patches as one, for Save Forget Patch and wherever a patch goes."
                ),
                LoraStack.Output(
                    display_name="lora_stack",
                    tooltip="The incoming list and the files chosen here, for the next stacker. Applied by another "
                    "pack's node, patches are simply added.",
                ),
                io.String.Output(
                    display_name="report", tooltip="Which patches get in each other's way, how much, and what to do."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return [changed_at(inputs.get(f"patch_{row}")) for row in range(1, ROWS + 1) if inputs.get(f"patch_{row}") != NONE]

    @classmethod
    def execute(cls, model=None, clip=None, lora_stack=None, **inputs) -> io.NodeOutput:
        members, chosen = [], []
        for row in range(1, ROWS + 1):
            name, strength, on = (inputs[f"{key}_{row}"] for key in ("patch", "strength", "on"))
            if name == NONE or not on:
                continue
            if name == FROM_INPUT:
                if inputs.get(f"lora_{row}") is None:
                    raise ForgetError(f"Row {row} takes the patch of `lora_{row}`, and nothing is connected there.")
                members.append(Member(as_patch(inputs[f"lora_{row}"]), strength))
            else:
                chosen.append((name, strength, 0.0))
        listed = [*(lora_stack or []), *chosen]
        for name, strength, strength_clip in listed:
            path = find(name)
            if is_patch(path):
                members.append(Member(read_patch(path), strength))
            elif (name, strength, strength_clip) in chosen:
                read_patch(path)  # raises: a row is for patches
            elif model is not None:
                lora = comfy.utils.load_torch_file(str(path), safe_load=True)
                model, clip = comfy.sd.load_lora_for_models(model, clip, lora, strength, strength_clip)
        if not any(strength for _, strength in members):
            return io.NodeOutput(
                model, clip, None, listed, "No forget patch is on.", ui=ui.PreviewText("No forget patch is on.")
            )
        joint = stack(members)
        text = "\n".join(
            [f"{len(members)} {'patches' if len(members) > 1 else 'patch'}: {joint.info['concept']}", summary(joint)]
        )
        model = None if model is None else apply_patch(model, joint, 1.0)
        return io.NodeOutput(model, clip, joint, listed, text, ui=ui.PreviewText(text))


def find(name: str) -> Path:
    """The file of a name in a list; raises ForgetError where there is none."""
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise ForgetError(f"{name} is in none of the host's LoRA folders: press R to refresh, and choose again.")
    return Path(path)
