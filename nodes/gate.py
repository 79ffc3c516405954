"""Gate Forget Patch."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..fmn_core.errors import ForgetError
from ..fmn_core.hosts.comfy.hooks import gated
from ..fmn_core.patch.gate import OPEN
from .patch import changed_at, choose, patch_input
from .schema import LoraModel, schema


class GatePatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        part = {"min": 0.0, "max": 1.0, "step": 0.01}
        return schema(
            node_id="FMN_GatePatch",
            display_name="Gate Forget Patch",
            description="Puts a patch on a prompt, and only where the prompt calls for the concept: any other gives the "
            "model's own picture, bit for bit. In place of Apply FMN Patch; the MODEL stays as it is.",
            search_aliases=["conditional lora", "prompt gate", "forget patch hook"],
            inputs=[
                io.Conditioning.Input(
                    "conditioning", tooltip="The encoded prompt; each part of a combined one has its own gate."
                ),
                patch_input(),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How much of the patch acts where it starts: 1 as it was made.",
                ),
                io.Float.Input(
                    "end_strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How much of it acts where it ends; in between it changes evenly.",
                ),
                io.Float.Input(
                    "start_percent", default=0.0, **part, tooltip="Where in the sampling the patch starts to act: 0 at once."
                ),
                io.Float.Input("end_percent", default=1.0, **part, tooltip="Where in the sampling it stops: 1 at the end."),
                io.Float.Input(
                    "threshold",
                    default=OPEN,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="How strongly a prompt has to call for the concept; the concept's own words do so by about 1. "
                    "0: always on.",
                ),
                LoraModel.Input(
                    "lora", optional=True, tooltip="A patch straight from Forget Concept or Stack Forget Patches."
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="CONDITIONING", tooltip="The prompt, with the patch on it or as it was."
                ),
                io.Float.Output(
                    display_name="gate", tooltip="How strongly the prompt calls for the concept, the strongest part."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, patch, **kwargs):
        return changed_at(patch)

    @classmethod
    def execute(
        cls, conditioning, patch, *, strength, end_strength, start_percent, end_percent, threshold, lora=None
    ) -> io.NodeOutput:
        if not start_percent < end_percent:
            raise ForgetError(f"The patch would end at {end_percent}, before it starts at {start_percent}: swap the two.")
        chosen = choose(patch, lora)[0]
        span = start_percent, end_percent
        hooked, values, acts = gated(conditioning, chosen, (strength, end_strength), span, threshold)
        lines = [
            f"{value:.2f}: the patch of `{chosen.info['concept']}` {'acts' if on else 'stays off'}"
            for value, on in zip(values, acts, strict=True)
        ]
        text = "\n".join(lines)
        return io.NodeOutput(hooked, max(values), ui=ui.PreviewText(text))
