"""Invert Concept."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..fmn_core.files.atomic import save_under_next
from ..fmn_core.files.names import slug
from ..fmn_core.hosts.comfy.model import ComfyHost
from ..fmn_core.inversion.config import InversionConfig
from ..fmn_core.inversion.embedding import save_embedding
from ..fmn_core.inversion.textual_inversion import Inversion, invert_pictures
from .schema import LossMap, schema, settings_inputs
from .unfinished import checkpoint_for


class InvertConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FMN_InvertConcept",
            display_name="Invert Concept",
            description="Learns words that call for what pictures show (textual inversion) and writes them as an embedding, "
            "for Forget Concept or any prompt.",
            search_aliases=["textual inversion", "embedding", "concept inversion", "train embedding"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The model that the words are for. It is not changed."),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.String.Input(
                    "concept",
                    default="cat",
                    tooltip="What the file is named after, and what the model makes pictures of where none are connected.",
                ),
                *settings_inputs(InversionConfig),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Pictures that show the concept (a VAE is needed then). Without them the model makes its own.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the pictures the concept is: what is around it counts little. One mask for all "
                    "pictures or one for each, of their size.",
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Needed for pictures; without pictures it only makes previews possible."
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="embedding",
                    tooltip="The words as a prompt calls for them, embedding:NAME; for `concept` of Forget Concept.",
                ),
                LossMap.Output(display_name="loss_map", tooltip="The loss of each step, for Plot Loss Graph."),
            ],
        )

    @classmethod
    def execute(cls, model, clip, concept, *, images=None, mask=None, vae=None, **settings) -> io.NodeOutput:
        config = InversionConfig(**settings)
        with torch.inference_mode(False):  # the graph runs in inference mode, whose tensors autograd refuses
            images, mask = (None if x is None else x.clone() for x in (images, mask))
            host = ComfyHost(model, clip, vae)

            def save(inversion: Inversion, concept: str = concept) -> Path:
                paths = new_embeddings(concept)
                return save_under_next(paths, lambda path: save_embedding(inversion.vectors, path, asdict(config)))

            def save_unfinished(inversion: Inversion) -> Path:
                return save(inversion, f"{concept} unfinished")

            with checkpoint_for(cls, save_unfinished) as checkpoint:
                inversion = invert_pictures(host, config, images=images, mask=mask, concept=concept, checkpoint=checkpoint)
                path = save(inversion)
        text = f"{inversion.summary}\nSaved {path}"
        return io.NodeOutput(f"embedding:{path.stem}", {"loss": inversion.losses}, ui=ui.PreviewText(text))


def new_embeddings(concept: str) -> Iterator[Path]:
    """Numbered paths in the host's first embeddings folder, of names that are in none of them: prompts call by name."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths("embeddings")]
    for number in itertools.count(1):
        name = f"learned-{slug(concept)}_{number:05}_"
        if not any(file.stem == name for folder in folders for file in folder.rglob(f"{name}.*")):
            yield folders[0] / f"{name}.safetensors"
