"""Forgetting without a graph: `python -m fmn_core forget --model FOLDER --concept cat`, `... inspect FILE`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from .errors import ForgetError
from .forget import forget, summary
from .patch import read_patch, require_new, save_patch, slug
from .settings import ForgetSettings


def add_settings(parser: argparse.ArgumentParser, settings: type) -> None:
    """One option for each field of a settings dataclass, with its default, choices and help."""
    for f in dataclasses.fields(settings):
        option, help = f"--{f.name.replace('_', '-')}", f.metadata["help"].replace("%", "%%")
        if isinstance(f.default, bool):
            parser.add_argument(option, action="store_true", help=help)
        else:
            shown = f"{help} (default: {f.default})" if f.default != "" else help
            choices = f.metadata["choices"]
            parser.add_argument(option, type=type(f.default), default=f.default, choices=choices, help=shown)


def take_settings(options: argparse.Namespace, settings: type):
    """The dataclass from parsed options; raises ForgetError for values out of bounds."""
    return settings(**{f.name: getattr(options, f.name) for f in dataclasses.fields(settings)})


def run_forget(options: argparse.Namespace) -> None:
    from .hosts.diffusers import DiffusersHost, load_pipeline

    settings = take_settings(options, ForgetSettings)
    names = "\n".join(options.concept)
    if options.out:
        require_new(options.out)
    images = read_images(options.images) if options.images else None
    host = DiffusersHost(load_pipeline(options.model, options.device), settings.resolution)
    patch, _ = forget(host, names, settings, images)
    path = options.out or Path(f"forget-{slug(patch.info['concept'])}.safetensors")
    save_patch(patch, path)
    print(summary(patch))
    print(f"{path}  {path.stat().st_size:,} bytes")


def read_images(folder: Path):
    """The pictures of a folder as [P, H, W, 3] in 0..1, brought to the size of the first."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise ForgetError(f"There is no picture in {folder}: put PNG, JPEG or WebP files there.")
    pictures = [ImageOps.exif_transpose(Image.open(file)).convert("RGB") for file in files]
    fitted = [np.asarray(ImageOps.fit(picture, pictures[0].size)) for picture in pictures]
    return torch.from_numpy(np.stack(fitted)).float() / 255


def run_inspect(options: argparse.Namespace) -> None:
    patch = read_patch(options.file)
    if options.json:
        print(json.dumps({key: value for key, value in patch.info.items() if key != "erase_keys"}, indent=1))
        return
    info, base = patch.info, patch.info["base"]
    print(f"{options.file}: forgets {info['concept']}")
    print(f"made by the preset {info['settings'].get('preset')} of Forget-Me-Not {info['version']}")
    print(f"made for {base['name']} ({base['family']})")
    print(f"rank {patch.rank}, {len(patch.modules)} projections")
    print(summary(patch))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fmn_core", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("forget", help="make a patch that forgets concepts, in a diffusers model")
    command.add_argument(
        "--model", required=True, help="a folder or name of a diffusers model, or a .safetensors checkpoint"
    )
    command.add_argument(
        "--concept", required=True, action="append", help="its names, between commas; once for each concept"
    )
    command.add_argument("--images", type=Path, help="`paper`: a folder of pictures that show it")
    command.add_argument("--out", type=Path, help="the file to write; a name in use is never taken over")
    command.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    add_settings(command, ForgetSettings)
    command.set_defaults(run=run_forget)
    command = commands.add_parser("inspect", help="what a patch forgets, how it was made, and its own report")
    command.add_argument("file", type=Path)
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=run_inspect)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ForgetError, OSError) as error:  # OSError: diffusers' answer to a model that is not there
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
