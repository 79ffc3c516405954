"""Record Token Attention, Visualize Token Attention."""

from __future__ import annotations

from comfy_api.latest import io

from ..fmn_core.heatmap import COLOR_MAPS, visualize
from ..fmn_core.hosts.comfy_attention import record_attention
from .schema import Recording, schema, widget


class RecordTokenAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FMN_RecordAttention",
            display_name="Record Token Attention",
            description="Records where each word of the prompt attends while any sampler runs. The picture stays the same.",
            search_aliases=["attention map", "heat map", "daam"],
            inputs=[
                io.Model.Input("model", tooltip="The model to watch; connect the MODEL output to the sampler."),
                io.Clip.Input("clip", tooltip="The text encoder that encodes the prompt."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    tooltip="The positive prompt, word for word as the sampler gets it. Best wired from the same text.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model that records; connect it to the sampler."),
                Recording.Output(display_name="recording", tooltip="For Visualize Token Attention; filled while sampling."),
            ],
        )

    @classmethod
    def execute(cls, model, clip, text) -> io.NodeOutput:
        return io.NodeOutput(*record_attention(model, clip, text))


class VisualizeTokenAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FMN_VisualizeTokenAttention",
            display_name="Visualize Token Attention",
            description="Shows where words of the prompt attended, as a heat map over the picture and as a mask.",
            search_aliases=["attention map", "heat map", "daam"],
            inputs=[
                Recording.Input("recording", tooltip="From Record Token Attention."),
                io.Image.Input("image", tooltip="The picture that was sampled with the recording model."),
                io.String.Input(
                    "words",
                    default="",
                    multiline=True,
                    tooltip="Words or phrases of the prompt, separated by commas or lines. Empty: every word.",
                ),
                io.Float.Input(
                    "maximum",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="The share of attention that gets the brightest colour. 0: the highest found. "
                    "Wire another one's maximum here to compare two pictures on one scale.",
                ),
                io.Float.Input(
                    "opacity", default=0.6, min=0.0, max=1.0, step=0.05, tooltip="How much the heat map covers the picture."
                ),
                widget(
                    io.Combo,
                    "color_map",
                    options=list(COLOR_MAPS),
                    default="inferno",
                    tooltip="Colours from low to high; all of them read in grey and to the colour-blind.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="IMAGE",
                    tooltip="Heat maps over the pictures: all pictures for the first word, then the next.",
                ),
                io.Mask.Output(display_name="MASK", tooltip="The same heat maps as masks, 0 to 1."),
                io.Float.Output(
                    display_name="maximum", tooltip="The share of attention that the brightest colour stands for."
                ),
            ],
        )

    @classmethod
    def execute(cls, recording, image, words, maximum, opacity, color_map) -> io.NodeOutput:
        return io.NodeOutput(*visualize(recording, image, words, maximum, opacity, color_map))
