"""Stack Forget Patches."""

from __future__ import annotations

import comfy.sd
import comfy.utils
from comfy_api.latest import io, ui

from ..fmn_core.errors import ForgetError
from ..fmn_core.hosts.comfy.apply import apply_patch
from ..fmn_core.patch.file import is_patch, read_patch
from ..fmn_core.patch.stack import stack
from ..fmn_core.patch.summary import summary
from ..fmn_core.patch.weighted import WeightedPatch
from .patch import FROM_INPUT, as_patch, changed_at, listed_files, require_file
from .schema import LoraModel, schema

ROWS = 6
LoraStack = io.Custom("LORA_STACK")  # [(name, strength of the model, strength of the text encoder)]: what many packs share


def row_inputs(row: int, files: list[str]) -> list:
    """The widgets of one patch: its file, its strength, and whether it acts."""
    return [
        io.Combo.Input(
            f"patch_{row}",
            options=[FROM_INPUT, *files],
            tooltip=f"A saved patch, or the one connected to `lora_{row}`; with nothing there the row is empty. "
            "Press R after saving to refresh the list.",
        ),
        io.Float.Input(
            f"strength_{row}",
            default=1.0,
            min=-10.0,
            max=10.0,
            step=0.01,
            tooltip="How much of this patch: 1 as it was made, 0 not at all.",
        ),
        io.Boolean.Input(f"enabled_{row}", default=True, tooltip="Off leaves this patch out."),
    ]


class StackPatches(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        files = listed_files()
        rows = [widget for row in range(1, ROWS + 1) for widget in row_inputs(row, files)]
        return schema(
            node_id="FMN_StackPatches",
            display_name="Stack Forget Patches",
            description="Several patches that act together as each does alone: solved jointly, in any order, and savable as "
            "one. Chain several of these nodes, lora to lora_1, for any number.",
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
    def fingerprint_inputs(cls, lora_stack=None, **inputs):
        stacked = [name for name, *_ in entries(lora_stack)]
        return [changed_at(name) for name in (*(inputs.get(f"patch_{row}") for row in range(1, ROWS + 1)), *stacked)]

    @classmethod
    def execute(cls, model=None, clip=None, lora_stack=None, **inputs) -> io.NodeOutput:
        rows = [
            (inputs[f"patch_{row}"], inputs[f"strength_{row}"], inputs.get(f"lora_{row}"))
            for row in range(1, ROWS + 1)
            if inputs.get(f"enabled_{row}")
        ]
        patches = [WeightedPatch(as_patch(lora), s) for name, s, lora in rows if name == FROM_INPUT and lora is not None]
        chosen = [(name, strength, 0.0) for name, strength, _ in rows if name != FROM_INPUT]
        patches += [WeightedPatch(read_patch(require_file(name)), strength) for name, strength, _ in chosen]
        given = entries(lora_stack)
        for name, strength, strength_clip in given:
            path = require_file(name)
            if is_patch(path):
                patches.append(WeightedPatch(read_patch(path), strength))
            elif model is not None or clip is not None:
                lora = comfy.utils.load_torch_file(str(path), safe_load=True)
                model, clip = comfy.sd.load_lora_for_models(model, clip, lora, strength, strength_clip)
        joint, text = None, "No forget patch is on."
        if any(weighted.strength for weighted in patches):
            joint = stack(patches)
            count = len(joint.info["patches"])
            text = f"{count} {'patches' if count > 1 else 'patch'}: {joint.info['concept']}\n{summary(joint)}"
            model = None if model is None else apply_patch(model, joint, 1.0)
        return io.NodeOutput(model, clip, joint, [*given, *chosen], text, ui=ui.PreviewText(text))


def entries(lora_stack) -> list[tuple[str, float, float]]:
    """The list of a stacker without its empty rows; raises ForgetError for what is no such list."""
    try:
        rows = [(name, float(model), float(clip)) for name, model, clip in filter(None, lora_stack or [])]
    except (TypeError, ValueError):
        raise ForgetError(
            "`lora_stack` is not a list of (name, strength of the model, strength of the text encoder): connect the "
            "LORA_STACK of a stacker."
        ) from None
    return [row for row in rows if isinstance(row[0], str) and row[0] not in ("", "None", "none")]
