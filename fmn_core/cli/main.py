"""Forgetting without a graph: `python -m fmn_core forget --model FOLDER --concept cat`, `... evaluate FILE --model
FOLDER`, `... convert FILE --to peft --output FILE`, `... inspect FILE`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from ..errors import ForgetError
from ..evaluation.config import EvaluationConfig
from ..inversion.config import InversionConfig
from ..log import say
from ..training.memory import out_of_memory_told, ran_out
from . import commands
from .convert import add_convert
from .model import add_device, add_embeddings, add_model
from .settings import add_preset_settings, add_settings


def add_forget(parsers) -> None:
    command = parsers.add_parser("forget", help="make a patch that forgets concepts, in a diffusers model")
    add_model(command)
    command.add_argument("--concept", action="append", help="its names, separated by commas; once for each concept")
    add_embeddings(command, "a file of learned words: in --concept <NAME> stands for them, or leave that out")
    command.add_argument(
        "--images",
        type=Path,
        action="append",
        help="a folder of pictures that show it, for all presets but `fast`; once for each concept, in their order",
    )
    command.add_argument("--output", type=Path, help="the file to write; an existing file is never overwritten")
    add_device(command)
    add_preset_settings(command)
    command.set_defaults(run=commands.run_forget)


def add_invert(parsers) -> None:
    command = parsers.add_parser("invert", help="learn words that call for what pictures show (textual inversion)")
    add_model(command)
    pictures = command.add_mutually_exclusive_group(required=True)
    pictures.add_argument("--images", type=Path, help="a folder of pictures")
    pictures.add_argument("--concept", default="", help="or what the model makes pictures of itself")
    command.add_argument("--output", type=Path, required=True, help="the embedding's file, e.g. my-cat.safetensors")
    add_embeddings(command, "a file of learned words that --concept or --template calls by <NAME>")
    add_device(command)
    add_settings(command, InversionConfig)
    command.set_defaults(run=commands.run_invert)


def add_run_config(parsers) -> None:
    command = parsers.add_parser("run-config", help="do what an attn.yaml or ti.yaml of the original Forget-Me-Not says")
    command.add_argument("file", type=Path)
    command.add_argument("--model", help="in place of the file's pretrained_model_name_or_path")
    add_device(command)
    command.set_defaults(run=commands.run_config)


def add_evaluate(parsers) -> None:
    command = parsers.add_parser("evaluate", help="measure what a patch forgets and what it harms, in a diffusers model")
    command.add_argument("file", type=Path, help="the patch")
    add_model(command)
    command.add_argument("--json", type=Path, help="write every figure there")
    command.add_argument("--picture", type=Path, help="draw the report there, as .png or .jpg")
    command.add_argument("--output", type=Path, help="write the patch there, with the report in it")
    command.add_argument("--clip", metavar="FOLDER", help="a transformers CLIPModel, for CLIP scores")
    command.add_argument("--images", type=Path, help="a folder of pictures of the concept, for `--inversion`")
    add_embeddings(command, "a file of learned words that the patch forgets or keeps by")
    add_device(command)
    add_settings(command, EvaluationConfig)
    command.set_defaults(run=commands.run_evaluate)


def add_stack(parsers) -> None:
    command = parsers.add_parser("stack", help="make one patch of several, in which each does what it does alone")
    command.add_argument("files", nargs="+", metavar="FILE[=STRENGTH]", help="patches; strength 1 where none is given")
    command.add_argument(
        "--output", type=Path, required=True, help="the file to write; an existing file is never overwritten"
    )
    command.set_defaults(run=commands.run_stack)


def add_unstack(parsers) -> None:
    command = parsers.add_parser("unstack", help="take a stacked patch apart again")
    command.add_argument("file", type=Path)
    command.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the patches go")
    command.set_defaults(run=commands.run_unstack)


def add_inspect(parsers) -> None:
    command = parsers.add_parser(
        "inspect", help="what a patch forgets, how it was made, its own report, and what it changes"
    )
    command.add_argument("file", type=Path)
    command.add_argument("--model", help="a diffusers model, or a .safetensors checkpoint: does the patch fit it?")
    command.add_argument("--picture", type=Path, help="draw the report there, as .png or .jpg")
    command.add_argument("--json", action="store_true", help="every figure, and all that the patch says of itself")
    add_device(command)
    command.set_defaults(run=commands.run_inspect)


def add_doctor(parsers) -> None:
    command = parsers.add_parser("doctor", help="versions, devices, folders, and a self-test of ten seconds")
    command.set_defaults(run=commands.run_doctor)


def show_any_letter() -> None:
    """Lets the streams write letters that the terminal's encoding lacks as their numbers."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a caller reads along
            stream.reconfigure(errors="backslashreplace")


def main(arguments: list[str] | None = None) -> int:
    show_any_letter()
    parser = argparse.ArgumentParser(prog="python -m fmn_core", description=__doc__)
    parser.add_argument(
        "--verbose", action="store_true", help="one line to stderr for each phase: what, how long, its figures"
    )
    parsers = parser.add_subparsers(dest="command", required=True)
    add_forget(parsers)
    add_invert(parsers)
    add_run_config(parsers)
    add_evaluate(parsers)
    add_stack(parsers)
    add_unstack(parsers)
    add_convert(parsers, add_settings)
    add_inspect(parsers)
    add_doctor(parsers)
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("forget_me_not").setLevel(logging.INFO if options.verbose else logging.WARNING)
    try:
        with out_of_memory_told():
            options.run(options)
    except KeyboardInterrupt:
        say("Stopped.", file=sys.stderr)
        return 130
    except (ForgetError, OSError) as error:  # OSError: diffusers' answer to a model that is not there
        say(error, file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not ran_out(error):
            raise
        say(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
