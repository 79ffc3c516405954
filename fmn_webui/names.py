"""Names of patches: what may become a file's name in the LoRA folder, and which files there are patches."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from fmn_core.errors import ForgetError
from fmn_core.files.names import DEVICES, MOST_NAME_BYTES, slug
from fmn_core.patch.file import is_patch

# A prompt calls a LoRA `<lora:NAME:WEIGHT>`, where `=` is for named weights; lists have commas; Windows refuses the others.
UNFIT = re.compile(r'[<>:="/\\|?*,\x00-\x1f\x7f]')
NONE = "None"  # what no patch is chosen by
MOST_PATCH_NAME = 100  # letters
UNFINISHED = "-unfinished"
# Folders in the LoRA folder, of what the script stacked for a generation; the first is hidden on the host's page of LoRAs.
STACKS = (".forget-me-not-stacks", "forget-me-not-stacks")
CARD_ENDINGS = (".json", ".png")  # what a card is read from


def check_name(name: str) -> str:
    """The name, if it can be a patch's; raises ForgetError for one that leads out of the folder or suits no prompt."""
    name = name.strip().removesuffix(".safetensors")
    bad = UNFIT.search(name) or not name.isprintable() or name.startswith(".") or name.endswith((".", " "))
    if (
        bad
        or not name
        or len(name) > MOST_PATCH_NAME
        or len(name.encode()) > MOST_NAME_BYTES
        or name.split(".")[0].strip().upper() in DEVICES | {"NONE"}
    ):
        raise ForgetError(
            f"`{name[:MOST_PATCH_NAME]}` cannot be a patch's name: use letters, digits, spaces and hyphens, "
            f"{MOST_PATCH_NAME} at most, without folders, colons and commas."
        )
    return name


def can_be_called(name: str) -> bool:
    """Whether a prompt's tag and a page can hold a file's name; a file that was put there by hand may have any."""
    return name.isprintable() and not UNFIT.search(name) and name != NONE


def unfinished_name(name: str, concept: str) -> str:
    """What the patch of a stopped training is called: the name that was asked for, or the concept's, and `-unfinished`."""
    stem = check_name(name) if name.strip() else f"forget-{slug(concept)}"
    return f"{stem[: MOST_PATCH_NAME - len(UNFINISHED)].rstrip()}{UNFINISHED}"


def lora_files(folder: Path) -> dict[str, list[Path]]:
    """Name -> LoRA files of that name in the folder and those below it, as the host finds them."""
    found: dict[str, list[Path]] = {}
    for parent, _, files in os.walk(folder, followlinks=True):
        for path in (Path(parent, file) for file in sorted(files)):
            if path.suffix.lower() in (".safetensors", ".pt", ".ckpt"):
                found.setdefault(path.stem, []).append(path)
    return found


class PatchList:
    """The patches in the LoRA folder that can be called, without those made for one generation; whether a file is one is
    read once for each time that it was written."""

    def __init__(self):
        self.known: dict[tuple[str, int], bool] = {}

    def __call__(self, folder: Path) -> dict[str, Path]:
        """Name -> file of every patch, in the order of names."""
        seen, found = {}, {}
        for name, paths in lora_files(folder).items():
            if not can_be_called(name):
                continue
            for path in paths:
                if path.suffix != ".safetensors" or path.parent.name in STACKS or not path.is_file():
                    continue
                try:
                    key = str(path), path.stat().st_mtime_ns
                    seen[key] = self.known[key] if key in self.known else is_patch(path)
                except OSError:  # taken away meanwhile
                    continue
                if seen[key]:
                    found.setdefault(name, path)
        self.known = seen
        return dict(sorted(found.items(), key=lambda one: one[0].lower()))


def new_patch_path(folder: Path, name: str, concept: str) -> Path:
    """Where a new patch goes: under its name, which no LoRA may have, or numbered under the concept's.

    Raises ForgetError for a name that cannot be or is taken.
    """
    if not name.strip():
        return next(free_files(folder, f"forget-{slug(concept)}"))
    stem = check_name(name)
    if not is_free(folder)(stem):
        raise ForgetError(f"`{stem}` is in the LoRA folder already, and files are never overwritten: choose another name.")
    return folder / f"{stem}.safetensors"


def new_files(folder: Path, name: str, concept: str, numbered: bool = False) -> Iterator[Path]:
    """Where a new patch may go, the best place first: as `new_file` says, or with `numbered` under the next free name of the
    kind; and where that was taken meanwhile, under a number of its own: what was learned is not thrown away."""
    if numbered:
        yield from free_files(folder, name)
    if name.strip():
        try:
            yield new_patch_path(folder, name, concept)
        except ForgetError:  # taken while the patch was made
            pass
    yield from free_files(folder, f"forget-{slug(f'{name} {concept}'.strip())}")


def free_files(folder: Path, stem: str) -> Iterator[Path]:
    """Those of `stem`, `stem-2`, `stem-3` ... that no LoRA has, one after another."""
    free = is_free(folder)
    for n in itertools.count(1):
        each = stem if n == 1 else f"{stem}-{n}"
        if free(each):
            yield folder / f"{each}.safetensors"


def is_free(folder: Path) -> Callable[[str], bool]:
    """What tells whether no LoRA has a name, nor its card or its `-unet`."""
    taken = {other.lower() for other in lora_files(folder)}
    taken |= {path.stem.lower() for path in folder.glob("*") if path.suffix in CARD_ENDINGS}  # of a LoRA that is gone
    return lambda stem: stem.lower() not in taken and f"{stem}-unet".lower() not in taken
