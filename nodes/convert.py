"""Import Forget Patch, Export Forget Patch."""

from __future__ import annotations

import logging

import torch
from comfy_api.latest import io, ui

from ..fmn_core.convert.config import ImportConfig
from ..fmn_core.convert.exporter import EXPORT_FORMATS, save_as
from ..fmn_core.convert.importer import import_patch
from ..fmn_core.files.atomic import save_under_next
from ..fmn_core.hosts.comfy.model import ComfyHost
from ..fmn_core.log import displayable
from ..fmn_core.patch.summary import summary
from .patch import as_patch, listed_files, lora_name, new_paths, require_file, written_at
from .schema import LoraModel, schema, settings_inputs

FROM_MODEL = "the connected model"
CHECKPOINT_PREFIX = "checkpoint: "  # before the names of checkpoints, in a list that has LoRAs too


def place(name: str) -> tuple[str, str]:
    """The name of a LoRA, or of a checkpoint that CHECKPOINT stands before, and the host's word for its kind."""
    return name.removeprefix(CHECKPOINT_PREFIX), "checkpoints" if name.startswith(CHECKPOINT_PREFIX) else "loras"


class ImportPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        checkpoints = [CHECKPOINT_PREFIX + name for name in listed_files("checkpoints")]
        return schema(
            node_id="FMN_ImportPatch",
            display_name="Import Forget Patch",
            description="Makes a forget patch of what another tool made: a LoRA in any spelling (kohya, LECO, LyCORIS, "
            "diffusers, PEFT), an ESD file, or a checkpoint that has forgotten.",
            search_aliases=["convert lora", "esd", "leco", "extract lora"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the file was made for. It is not changed."),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.Combo.Input(
                    "file",
                    options=[*listed_files(), *checkpoints],
                    tooltip="A LoRA, or weights of a model that has forgotten. Press R to refresh the list.",
                ),
                io.String.Input(
                    "concept",
                    default="",
                    multiline=True,
                    tooltip="The name of what it forgets; other names of the same after commas, one concept a line. "
                    "Empty: the patch goes by the file's name, and cannot be evaluated.",
                ),
                *settings_inputs(ImportConfig),
                io.Combo.Input(
                    "base",
                    options=[FROM_MODEL, *checkpoints],
                    tooltip="For full weights: what they are compared with. The model that they were trained from.",
                ),
            ],
            outputs=[
                LoraModel.Output(
                    display_name="lora", tooltip="The patch: for Apply FMN Patch, Save Forget Patch and all others."
                ),
                LoraModel.Output(
                    display_name="unet_lora",
                    tooltip="What a LoRA changes outside the cross-attention: an ordinary LoRA, for Load LoRA Model, beside "
                    "the patch. Save Forget Patch writes it too. Else it is empty.",
                ),
                io.String.Output(
                    display_name="report", tooltip="What was found, what is left out, and how near the patch comes."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file, base, **kwargs):
        names = [place(name) for name in (file, base) if isinstance(name, str) and name != FROM_MODEL]
        return [written_at(name, kind) for name, kind in names]

    @classmethod
    def execute(cls, model, clip, file, concept, base, **settings) -> io.NodeOutput:
        own = base == FROM_MODEL
        with torch.inference_mode(False):  # the graph runs in inference mode, whose tensors the patch must not be
            host = ComfyHost(model, clip)
            found = (
                require_file(*place(file)),
                ImportConfig(**settings),
                concept,
                None if own else require_file(*place(base)),
            )
            patch = import_patch(host, *found)
        text = summary(patch)
        if patch.info["report"]["warnings"]:
            logging.warning("Import Forget Patch: %s", displayable(text))
        return io.NodeOutput(patch, patch.unet_lora, text, ui=ui.PreviewText(text))


class ExportPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FMN_ExportPatch",
            display_name="Export Forget Patch",
            description="Writes a patch for other programs: under PEFT's names for diffusers, or as full differences.",
            search_aliases=["save lora", "diffusers lora", "peft"],
            is_output_node=True,
            inputs=[
                LoraModel.Input("lora", tooltip="The patch."),
                io.Combo.Input(
                    "format",
                    options=list(EXPORT_FORMATS),
                    tooltip="`peft`: a LoRA under the names that diffusers and PEFT use; ComfyUI and the webuis do not read "
                    "it. `diff`: the full change of each layer, many times as large; for ComfyUI and the webuis, not for "
                    "diffusers.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="forget-%concept%-%format%",
                    tooltip="Name of the file; %concept% becomes the concept's name, %format% the format. "
                    "A slash makes a folder in output/loras.",
                ),
            ],
            outputs=[io.String.Output(display_name="lora_name", tooltip="The file's name below output/loras.")],
        )

    @classmethod
    def execute(cls, lora, format, filename_prefix) -> io.NodeOutput:
        patch = as_patch(lora)
        paths = new_paths(filename_prefix.replace("%format%", format), patch)
        files = save_under_next(paths, lambda path: save_as(patch, format, path))
        return io.NodeOutput(lora_name(files[0]), ui=ui.PreviewText("\n".join(f"Saved {file}" for file in files)))
