"""What is there, and does it work: versions, devices, folders, and a self-test on the demo model."""

from __future__ import annotations

import importlib
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from .. import __version__
from ..erasure.config import make_config
from ..erasure.forget import forget
from ..errors import ForgetError
from ..files.atomic import write_new
from ..files.libraries import take_from
from ..host import DiffusionHost
from ..patch.file import serialize
from ..patch.patch import fingerprint

COMMANDS_TAKE = {
    "transformers": ("CLIPModel", "CLIPTokenizer"),
    "diffusers": ("DiffusionPipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline"),
}
Finding = tuple[bool, str, str]  # well, what, how it is
PACKAGES = ("torch", "safetensors", "numpy", "pillow", "einops", "transformers", "diffusers")
ROOT = Path(__file__).parents[2]
NOT_THE_SAME = "what is trained on it may differ in the last bits from run to run"
CHECKPOINT = ROOT / "demo" / "checkpoints" / "emoji-sd-128.safetensors"


def examine() -> Iterator[Finding]:
    """One check after another."""
    yield True, "Forget-Me-Not", f"{__version__} in {ROOT}"
    yield sys.version_info >= (3, 10), "Python", f"{platform.python_version()} on {platform.platform()}"
    for name in PACKAGES:
        found = version_of(name)
        if name == "diffusers" and not found:
            yield True, name, "not installed; only the command line needs it"
        else:
            yield bool(found), name, found or "missing: install the host's own requirements.txt"
    yield from text("libraries", importable())
    yield from text("devices", devices())
    for what, folder in (("current folder", Path.cwd()), ("temporary folder", Path(tempfile.gettempdir()))):
        yield writable(what, folder)
    yield from text("self-test", self_test())


def text(what: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """The findings, the last of them what ended them before their time."""
    try:
        yield from findings
    except Exception as error:  # whatever is ill: the other checks go on
        yield False, what, f"{type(error).__name__}: {error}"


def version_of(package: str) -> str:
    """A package's version, or nothing where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def importable() -> Iterator[Finding]:
    """Whether what the commands take of the libraries can be imported: one may be there and not fit another."""
    for library, names in COMMANDS_TAKE.items():
        if version_of(library):
            try:
                take_from(library, *names)
            except ForgetError as error:
                yield False, f"{library}, imported", str(error)
            else:
                yield True, f"{library}, imported", ", ".join(names)


def devices() -> Iterator[Finding]:
    """What torch can compute on, and whether it gives the same twice there."""
    yield True, "CPU", f"{torch.get_num_threads()} threads; with as many, the same inputs and seed give the same file"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield True, f"GPU {index}", f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free; {NOT_THE_SAME}"
    if torch.backends.mps.is_available():
        yield True, "GPU", f"Apple MPS; {NOT_THE_SAME}"


def writable(what: str, folder: Path) -> Finding:
    """Whether a file can be made, given its name and taken away in a folder."""
    path = folder / f"fmn-doctor-{time.time_ns()}"
    try:
        write_new(b"whole", path)
        path.unlink()
    except (ForgetError, OSError) as error:
        return False, what, f"{folder}: {error}"
    return True, what, f"{folder}: files can be written"


def self_test() -> Iterator[Finding]:
    """Forgets a concept by two presets on the demo model, in ComfyUI or else by diffusers; says what it lacks."""
    if not CHECKPOINT.is_file():
        yield False, "demo model", f"{CHECKPOINT} is not there: restore it from the repository; no self-test without it"
        return
    for what, load in (("ComfyUI", comfyui_host), ("diffusers", diffusers_host)):
        try:
            host = load()
        except Exception as error:  # there, but of a kind that the pack does not run in
            yield True, what, f"not used: {error}"
            continue
        if what == "ComfyUI":
            from ..hosts.comfy.folders import written_folders

            yield from (writable(f"{what}, {name}", folder) for name, folder in written_folders().items())
        yield from forget_twice(host, what)
        return
    yield False, "self-test", "neither ComfyUI (set FMN_COMFYUI to its folder) nor diffusers is there to run the model"


def comfyui_host() -> DiffusionHost:
    return importlib.import_module("demo.host").load_demo_model()


def diffusers_host() -> DiffusionHost:
    from ..hosts.diffusers.model import DiffusersHost

    return DiffusersHost(importlib.import_module("demo.export").make_pipeline(), progress_bar=False)


def forget_twice(host: DiffusionHost, where: str) -> Iterator[Finding]:
    """Checks that forgetting works, gives the same twice, and leaves the model as it was."""
    before = fingerprint(host)
    for preset in ("fast", "paper"):
        quick = {"steps": 3, "num_images": 1, "num_inference_steps": 2, "resolution": 64} if preset == "paper" else {}
        config = make_config(preset, **quick)
        start = time.monotonic()
        first, second = (serialize(forget(host, "cat", config)[0], "doctor") for _ in range(2))
        text = f"{len(first):,} bytes in {(time.monotonic() - start) / 2:.1f} s in {where}"
        same = first == second
        yield (
            same or host.device.type != "cpu",
            f"preset {preset}",
            f"{text}, {'the same' if same else 'not the same'} twice",
        )
    same = fingerprint(host) == before
    yield same, "the model", "left as it was" if same else "changed"
