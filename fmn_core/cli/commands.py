"""The commands: the options of each, and what it does."""

from __future__ import annotations

import argparse
import io
import json
import math
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from ..erasure.config import ForgetConfig, TrainingConfig
from ..erasure.forget import forget
from ..errors import ForgetError
from ..evaluation.config import EvaluationConfig
from ..files.atomic import describe, require_new, write_new
from ..files.names import distinct, slug
from ..inversion.config import InversionConfig
from ..inversion.embedding import embedding_token, save_embedding
from ..inversion.textual_inversion import Inversion, invert_pictures
from ..log import say
from ..patch.file import read_patch, save_patch
from ..patch.stack import stack, unstack
from ..patch.summary import summary
from ..patch.weighted import WeightedPatch
from ..text.concept import make_concepts
from ..training.checkpoint import beside
from ..training.images import read_folders, read_images
from .model import add_device, add_embeddings, add_model, open_host
from .run_config import run
from .settings import add_preset_settings, add_settings, take_config, take_settings


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
    command.set_defaults(run=run_forget)


def run_forget(options: argparse.Namespace) -> None:
    config = take_config(options)
    if not (options.concept or options.embedding):
        raise ForgetError(
            "There is no concept: give its name with --concept, or the file of learned words with --embedding."
        )
    if options.output:
        require_new(options.output)
    names = "\n".join(options.concept or [embedding_token(file.stem) for file in options.embedding])
    concepts = len(make_concepts(names, config.concept_type, config.template))
    if options.images and len(options.images) != concepts:
        raise ForgetError(
            f"There are {concepts} concepts and {len(options.images)} folders of pictures: give --images once for each "
            "concept, in the same order."
        )
    images, concept_of = pictures_for(options, config)
    host = open_host(options)
    path = options.output or Path(f"forget-{slug(names)}.safetensors")
    require_new(path)
    with beside(path, save_patch) as checkpoint:
        patch, _ = forget(host, names, config, images=images, checkpoint=checkpoint, concept_of=concept_of)
        files = save_patch(patch, path)
    say(summary(patch), *map(describe, files))


def pictures_for(options: argparse.Namespace, config: ForgetConfig) -> tuple[Tensor | None, list[int] | None]:
    """The pictures of --images, and the number of each one's concept; raises ForgetError for a preset without pictures."""
    if not options.images:
        return None, None
    if not isinstance(config, TrainingConfig):
        raise ForgetError(f"The preset `{config.preset}` uses no pictures: leave out --images, or choose another preset.")
    return read_folders(options.images, config.resolution)


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
    command.set_defaults(run=run_invert)


def run_invert(options: argparse.Namespace) -> None:
    settings = take_settings(options, InversionConfig)
    require_new(options.output)
    images = read_images(options.images, settings.resolution) if options.images else None
    host = open_host(options)

    def save(inversion: Inversion, path: Path) -> Path:
        return save_embedding(inversion.vectors, path, asdict(settings))

    with beside(options.output, save) as checkpoint:
        inversion = invert_pictures(host, settings, images=images, concept=options.concept, checkpoint=checkpoint)
        save(inversion, options.output)
    say(inversion.summary, describe(options.output))


def add_run_config(parsers) -> None:
    command = parsers.add_parser("run-config", help="do what an attn.yaml or ti.yaml of the original Forget-Me-Not says")
    command.add_argument("file", type=Path)
    command.add_argument("--model", help="in place of the file's pretrained_model_name_or_path")
    add_device(command)
    command.set_defaults(run=run_config)


def run_config(options: argparse.Namespace) -> None:
    run(options.file, options.model, options.device)


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
    command.set_defaults(run=run_evaluate)


def run_evaluate(options: argparse.Namespace) -> None:
    from ..evaluation.clip import load_clip
    from ..evaluation.evaluate import evaluate, with_evaluation
    from ..evaluation.plot import draw_report

    settings, patch = take_settings(options, EvaluationConfig), read_patch(options.file)
    for path in (options.output, options.json, options.picture):
        if path:
            require_new(path)
    images = read_images(options.images, settings.resolution) if options.images else None
    scorer = load_clip(options.clip) if options.clip else None
    host = open_host(options)
    evaluation = evaluate(host, patch, settings, clip=scorer, images=images)
    say(evaluation.report["summary"])  # before a full disk can take it away
    if options.output:
        save_patch(with_evaluation(patch, evaluation.report), options.output)
    if options.json:
        write_new(json.dumps(evaluation.report, indent=1).encode(), options.json)
    if options.picture:
        save_picture(draw_report(evaluation), options.picture)


def save_picture(picture, path: Path) -> None:
    """Writes a picture [H, W, 3] in 0..1, in the format that the name ends in."""
    from PIL import Image

    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in ("PNG", "JPEG", "WEBP"):
        raise ForgetError(f"{path} has no extension of a picture format: use .png or .jpg.")
    data = io.BytesIO()
    Image.fromarray((picture.numpy() * 255).round().astype("uint8")).save(data, kind)
    write_new(data.getvalue(), path)


def add_stack(parsers) -> None:
    command = parsers.add_parser("stack", help="make one patch of several, in which each does what it does alone")
    command.add_argument("files", nargs="+", metavar="FILE[=STRENGTH]", help="patches; strength 1 where none is given")
    command.add_argument(
        "--output", type=Path, required=True, help="the file to write; an existing file is never overwritten"
    )
    command.set_defaults(run=run_stack)


def run_stack(options: argparse.Namespace) -> None:
    require_new(options.output)
    patch = stack([read_member(text) for text in options.files])
    say(summary(patch), *map(describe, save_patch(patch, options.output)))


def read_member(text: str) -> WeightedPatch:
    """A patch and its strength from FILE or FILE=STRENGTH."""
    name, equals, strength = text.rpartition("=")
    if not equals or Path(text).exists():
        return WeightedPatch(read_patch(Path(text)))
    try:
        value = float(strength)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ForgetError(f"`{strength}` is not a strength: write FILE=0.5, or the file alone for 1.")
    return WeightedPatch(read_patch(Path(name)), value)


def add_unstack(parsers) -> None:
    command = parsers.add_parser("unstack", help="take a stacked patch apart again")
    command.add_argument("file", type=Path)
    command.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the patches go")
    command.set_defaults(run=run_unstack)


def run_unstack(options: argparse.Namespace) -> None:
    parts = unstack(read_patch(options.file))
    names = distinct([f"forget-{slug(part.name)}" for part in parts])
    paths = [require_new(options.output / f"{name}.safetensors") for name in names]
    for part, path in zip(parts, paths, strict=True):
        save_patch(part.patch, path)
        say(f"{describe(path)}, strength {part.strength:g}")


def add_inspect(parsers) -> None:
    command = parsers.add_parser(
        "inspect", help="what a patch forgets, how it was made, its own report, and what it changes"
    )
    command.add_argument("file", type=Path)
    command.add_argument("--model", help="a diffusers model, or a .safetensors checkpoint: does the patch fit it?")
    command.add_argument("--picture", type=Path, help="draw the report there, as .png or .jpg")
    command.add_argument("--json", action="store_true", help="every figure, and all that the patch says of itself")
    add_device(command)
    command.set_defaults(run=run_inspect)


def run_inspect(options: argparse.Namespace) -> None:
    from ..inspection.describe import text_of
    from ..inspection.inspect import inspect_patch
    from ..inspection.plot import draw_inspection

    patch, host = read_patch(options.file), None
    if options.picture:
        require_new(options.picture)
    if options.model:
        host = open_host(options)
    inspection = inspect_patch(patch, host, options.file)
    if options.picture:
        save_picture(draw_inspection(inspection), options.picture)
    say(json.dumps(inspection.plain(), indent=1) if options.json else text_of(inspection))


def add_doctor(parsers) -> None:
    command = parsers.add_parser("doctor", help="versions, devices, folders, and a self-test of ten seconds")
    command.set_defaults(run=run_doctor)


def run_doctor(options: argparse.Namespace) -> None:
    from .doctor import examine

    ill = 0
    for well, what, finding in examine():
        ill += not well
        say(f"{'ok  ' if well else 'FAIL'} {what}: {finding}")
    if ill:
        raise ForgetError(f"{ill} of these checks failed.")
