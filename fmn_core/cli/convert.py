"""The command `convert`: what others made into forget patches, and these into what others read."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..convert.config import ImportConfig
from ..convert.exporter import EXPORT_FORMATS, PER_LEVEL, merge, save_as
from ..convert.importer import import_patch
from ..errors import ForgetError
from ..files.atomic import describe, require_new
from ..files.safetensors import open_weights
from ..log import say
from ..lora.keys import blocks_per_level
from ..patch.file import read_patch, save_patch
from ..patch.patch import Patch, model_shapes
from ..patch.summary import summary
from .model import add_device, add_embeddings, open_host

TARGETS = ("patch", *EXPORT_FORMATS, "checkpoint")


def add_convert(commands, add_settings) -> None:
    """Adds the command to a parser's commands."""
    command = commands.add_parser("convert", help="import a LoRA or full weights as a patch, or export one for other tools")
    command.add_argument("file", type=Path, help="a patch, a LoRA, or weights of a model that has forgotten: .safetensors")
    command.add_argument(
        "--to",
        choices=TARGETS,
        default="patch",
        help="a forget patch; a LoRA with PEFT's names, for diffusers; the full differences, for ComfyUI and the webuis; or "
        "a copy of the checkpoint --base with the patch in it (default: patch)",
    )
    command.add_argument(
        "--model", help="the diffusers model, or .safetensors checkpoint, that FILE was made for, where FILE is no patch yet"
    )
    command.add_argument(
        "--base",
        type=Path,
        help="for `--to checkpoint` the checkpoint to copy; else the weights that full ones are compared with, in place of "
        "--model's own",
    )
    command.add_argument("--concept", default="", help="what FILE forgets: its names, separated by commas")
    add_embeddings(command, "a file of learned words: in --concept <NAME> stands for them")
    command.add_argument("--strength", type=float, default=1.0, help="of the patch in the checkpoint (default: 1.0)")
    command.add_argument(
        "--output", type=Path, required=True, help="the file to write; an existing file is never overwritten"
    )
    add_device(command)
    add_settings(command, ImportConfig)
    command.set_defaults(run=run_convert)


def run_convert(options: argparse.Namespace) -> None:
    require_new(options.output)
    if options.to == "checkpoint" and options.base is None:
        raise ForgetError("There is no checkpoint to put the patch into: name it with --base.")
    if options.strength != 1 and options.to != "checkpoint":
        raise ForgetError("--strength is for `--to checkpoint` alone: a LoRA is given its strength where it is loaded.")
    patch, per_level = take_patch(options)
    if options.to == "patch":
        files = save_patch(patch, options.output)
    elif options.to == "checkpoint":
        files = [merge(options.base, patch, options.strength, options.output)]
        if patch.unet_lora:
            say("What FILE changes outside the cross-attention is not in the checkpoint.")
    else:
        files = save_as(patch, options.to, options.output, per_level)
    say(summary(patch), *map(describe, files))


def take_patch(options: argparse.Namespace) -> tuple[Patch, int]:
    """The patch in the file, read or imported, and `blocks_per_level` of its model."""
    with open_weights(options.file) as weights:
        ready = "fmn.patch" in weights.metadata
    if ready:
        if options.to == "patch":
            raise ForgetError(f"{options.file.name} is a forget patch already: say what to convert it to with --to.")
        return read_patch(options.file), PER_LEVEL
    if not options.model:
        raise ForgetError(f"{options.file.name} is not a forget patch yet: name the model it was made for with --model.")
    host = open_host(options)
    settings = ImportConfig(options.concept_type, options.rank, options.energy)
    patch = import_patch(host, options.file, settings, options.concept, options.base)
    return patch, blocks_per_level([*model_shapes(host), *host.other_layers()])
