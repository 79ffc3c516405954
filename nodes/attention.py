"""Record, look at, compare and save token attention."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..fmn_core.attention.compare import CompareConfig, compare, draw_comparison
from ..fmn_core.attention.export import as_json, as_npz
from ..fmn_core.attention.from_image import FromImageConfig, record_pictures
from ..fmn_core.attention.heatmap import told_of_others
from ..fmn_core.attention.recorder import AttentionRecording, RecordingConfig
from ..fmn_core.attention.visualize import ViewConfig, visualize
from ..fmn_core.files.atomic import describe, save_under_next, write_new
from ..fmn_core.hosts.comfy.attention import record_attention
from ..fmn_core.hosts.comfy.graph import recording_of
from ..fmn_core.hosts.comfy.model import ComfyHost, progress_bar
from .patch import numbered
from .schema import Recording, schema, settings_inputs

OWN_PICTURE = "The picture sampled with the recording model: of several passes, the last recorded one before it counts."
ALIASES = ["attention map", "heat map", "daam"]


def own(node: type[io.ComfyNode], recording: AttentionRecording, input: str) -> tuple[AttentionRecording, str]:
    """What was recorded of the pictures at a node's input, and a sentence that says by which sampler."""
    return recording_of(recording, node.hidden.prompt, node.hidden.unique_id, input)


class RecordTokenAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FMN_RecordAttention",
            display_name="Record Token Attention",
            description="Records where each word of the prompt attends while any sampler runs, or several, each for itself. "
            "The picture stays the same.",
            search_aliases=ALIASES,
            inputs=[
                io.Model.Input("model", tooltip="The model to watch; connect the MODEL output to the sampler."),
                io.Clip.Input("clip", tooltip="The text encoder that encodes the prompt."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    tooltip="The positive prompt, word for word as the sampler gets it. Best wired from the same text.",
                ),
                *settings_inputs(RecordingConfig),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="The prompt as the sampler gets it, where more than CLIP Text Encode has made it (concatenated, "
                    "averaged, SDXL's two texts). Its tokens are named by `text`, which comes first in it.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model that records; connect it to the sampler."),
                Recording.Output(
                    display_name="recording",
                    tooltip="For Visualize, Compare and Save Token Attention.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, clip, text, conditioning=None, **settings) -> io.NodeOutput:
        return io.NodeOutput(*record_attention(model, clip, text, RecordingConfig(**settings), conditioning))


class RecordPictureAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FMN_RecordPictureAttention",
            display_name="Record Token Attention (Image)",
            description="Where each word of a text attends in pictures that are there already: they are noised and pass "
            "through the model once for each noise, without sampling.",
            search_aliases=ALIASES,
            inputs=[
                io.Model.Input("model", tooltip="The model to look with. It is not changed."),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Image.Input("image", tooltip="The pictures to look at."),
                io.String.Input("text", multiline=True, default="", tooltip="What to look for: a prompt for the pictures."),
                *settings_inputs(FromImageConfig),
                *(i for i in settings_inputs(RecordingConfig) if not i.id.endswith("_percent")),
            ],
            outputs=[
                Recording.Output(display_name="recording", tooltip="For Visualize, Compare and Save Token Attention."),
                io.Image.Output(display_name="IMAGE", tooltip="The same pictures, for Visualize Token Attention."),
            ],
        )

    @classmethod
    def execute(cls, model, clip, vae, image, text, *, granularity, layers, max_memory_mb, **look) -> io.NodeOutput:
        with torch.inference_mode(False):
            host = ComfyHost(model, clip, vae)
            recording = RecordingConfig(granularity=granularity, layers=layers, max_memory_mb=max_memory_mb)
            recorded = record_pictures(host, image[..., :3].clone(), text, FromImageConfig(**look), recording)
            return io.NodeOutput(recorded, image)


class VisualizeTokenAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FMN_VisualizeTokenAttention",
            display_name="Visualize Token Attention",
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            description="Shows where words of the prompt attended: as heat maps over the picture, sheets of words, steps, "
            "layers or heads, and as masks.",
            search_aliases=ALIASES,
            inputs=[
                Recording.Input("recording", tooltip="From Record Token Attention."),
                io.Image.Input("image", tooltip=OWN_PICTURE),
                *settings_inputs(ViewConfig),
            ],
            outputs=[
                io.Image.Output(
                    display_name="IMAGE",
                    tooltip="The view: for `overlay` all pictures for the first word, then for the next; for `over_steps` "
                    "the frames of an animation.",
                ),
                io.Mask.Output(
                    display_name="MASK",
                    tooltip="The heat maps as masks, all pictures for the first word, then for the next: for inpainting, or "
                    "for the `mask` of Forget Concept.",
                ),
                io.Float.Output(display_name="vmax", tooltip="The share of attention that the brightest colour stands for."),
            ],
        )

    @classmethod
    def execute(cls, recording, image, **settings) -> io.NodeOutput:
        recording, note = own(cls, recording, "image")
        seen = visualize(recording, image, ViewConfig(**settings), progress_bar())
        return io.NodeOutput(*seen, ui=ui.PreviewText(f"{note} {told_of_others(recording)}".strip()))


class CompareTokenAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FMN_CompareTokenAttention",
            display_name="Compare Token Attention",
            description="Two recordings side by side, before and after a patch, of two prompts or two seeds: heat maps on "
            "one scale, the difference, and each word's share of the attention.",
            search_aliases=ALIASES,
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            inputs=[
                Recording.Input("first", tooltip="From Record Token Attention: before, say."),
                Recording.Input("second", tooltip="From another Record Token Attention: after, say."),
                *settings_inputs(CompareConfig),
                # Nothing of a recording is there before its sampler has run: the pictures make this node wait.
                io.Image.Input("first_image", tooltip="The pictures of the first recording."),
                io.Image.Input("second_image", tooltip="The pictures of the second recording."),
            ],
            outputs=[
                io.Image.Output(display_name="IMAGE", tooltip="A sheet for each picture: maps, difference and bars."),
                io.String.Output(display_name="report", tooltip="Each word's share of the attention in both, as lines."),
                io.String.Output(display_name="json", tooltip="The same as JSON, with what start and padding get."),
            ],
        )

    @classmethod
    def execute(cls, first, second, first_image, second_image, **settings) -> io.NodeOutput:
        (first, one), (second, two) = own(cls, first, "first_image"), own(cls, second, "second_image")
        chosen = CompareConfig(**settings)
        height, width = first_image.shape[1:3]
        comparison = compare(first, second, chosen.words, (height, width), progress_bar())
        report = comparison.report((chosen.first_title, chosen.second_title))
        sheets = draw_comparison(comparison, (first_image, second_image), chosen, progress_bar())
        text = "\n".join([report, one, two]).strip()
        return io.NodeOutput(sheets, report, comparison.as_json(), ui=ui.PreviewText(text))


class SaveTokenAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FMN_SaveTokenAttention",
            display_name="Save Token Attention",
            description="Writes a recording into output/attention as data: every layer's map (.npz for NumPy), or words and "
            "their shares (.json). Files are numbered, never overwritten.",
            search_aliases=ALIASES,
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            inputs=[
                Recording.Input("recording", tooltip="From Record Token Attention."),
                # Nothing of a recording is there before its sampler has run: the picture makes this node wait.
                io.Image.Input("image", tooltip=OWN_PICTURE),
                io.Combo.Input(
                    "format",
                    options=["npz", "json"],
                    default="npz",
                    tooltip="`npz`: each layer's mean map [pictures, heads, height, width, tokens], and the facts as text. "
                    "`json`: the facts alone: tokens, words, shares, layers.",
                ),
                io.String.Input("filename_prefix", default="attention", tooltip="Name of the file; a slash makes a folder."),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Where the file is.")],
        )

    @classmethod
    def execute(cls, recording, image, format, filename_prefix) -> io.NodeOutput:
        recording, note = own(cls, recording, "image")
        data = {"npz": as_npz, "json": as_json}[format](recording)
        root = Path(folder_paths.get_output_directory(), "attention")
        paths = numbered(root, filename_prefix or "attention", format)
        path = save_under_next(paths, lambda path: write_new(data, path))
        return io.NodeOutput(str(path), ui=ui.PreviewText(f"Saved {describe(path)}\n{note}".strip()))
