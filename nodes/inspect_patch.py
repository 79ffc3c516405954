"""Inspect Forget Patch."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..fmn_core.hosts.comfy.model import ComfyHost
from ..fmn_core.inspection.describe import text_of
from ..fmn_core.inspection.inspect import inspect_patch
from ..fmn_core.inspection.plot import draw_inspection
from .patch import changed_at, choose, patch_input
from .schema import LoraModel, schema


class InspectPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FMN_InspectPatch",
            display_name="Inspect Forget Patch",
            description="Says what a patch forgets, how and for which model it was made, what it measured of itself, and "
            "how strongly it changes each layer.",
            search_aliases=["patch info", "lora metadata", "read patch"],
            is_output_node=True,
            inputs=[
                patch_input(),
                LoraModel.Input("lora", optional=True, tooltip="A patch straight from Forget Concept."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="To see whether the patch fits it, and the changes beside its weights. It is not changed.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The report in short lines."),
                io.Image.Output(display_name="picture", tooltip="The same as a picture, with bars."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, patch, **kwargs):
        return changed_at(patch)

    @classmethod
    def execute(cls, patch, lora=None, model=None) -> io.NodeOutput:
        chosen, file = choose(patch, lora)
        inspection = inspect_patch(chosen, None if model is None else ComfyHost(model, None), file)
        text = text_of(inspection)
        return io.NodeOutput(text, draw_inspection(inspection)[None], ui=ui.PreviewText(text))
