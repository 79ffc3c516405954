"""What is there, and does it work: versions, devices, folders, and a self-test on the embedded model."""

from __future__ import annotations

import importlib
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch

from . import __version__
from .errors import ForgetError
from .files import write_new

PACKAGES = ("torch", "safetensors", "numpy", "pillow", "einops", "transformers", "diffusers")
ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "demo" / "checkpoints" / "emoji-sd-128.safetensors"


def examine() -> Iterator[tuple[bool, str, str]]:
    """(well, what, finding) of one check after another."""
    yield True, "Forget-Me-Not", f"{__version__} in {ROOT}"
    yield sys.version_info >= (3, 10), "Python", f"{platform.python_version()} on {platform.platform()}"
    for name in PACKAGES:
        found = version_of(name)
        optional = name == "diffusers"
        yield bool(found) or optional, name, found or ("not installed; only the command line needs it" if optional else "missing")
    yield from devices()
    for what, folder in (("current folder", Path.cwd()), ("temporary folder", Path(tempfile.gettempdir()))):
        yield writable(what, folder)
    yield from self_test()


def version_of(package: str) -> str:
    """A package's version, or nothing where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def devices() -> Iterator[tuple[bool, str, str]]:
    """What torch can compute on, and whether it gives the same twice there."""
    yield True, "CPU", f"{torch.get_num_threads()} threads; the same inputs and seed give the same file"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        told = f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free; training may differ in the last bits between runs"
        yield True, f"GPU {index}", told
    if torch.backends.mps.is_available():
        yield True, "GPU", "Apple MPS; training may differ in the last bits between runs"


def writable(what: str, folder: Path) -> tuple[bool, str, str]:
    """Whether a file can be made, given its name and taken away in a folder."""
    path = folder / f"fmn-doctor-{time.time_ns()}"
    try:
        write_new(b"whole", path)
        path.unlink()
    except (ForgetError, OSError) as error:
        return False, what, f"{folder}: {error}"
    return True, what, f"{folder}: files can be written"


def self_test() -> Iterator[tuple[bool, str, str]]:
    """Forgets a concept by two presets on the embedded model, in ComfyUI or else by diffusers; says what it lacks."""
    if not CHECKPOINT.is_file():
        yield False, "embedded model", f"{CHECKPOINT} is not there: restore it from the repository; no self-test without it"
        return
    load = None
    for what, module, loader in (
        ("ComfyUI", "demo.host", comfyui_host),
        ("diffusers", "demo.export", diffusers_host),
    ):
        try:
            load = loader(importlib.import_module(module))
            yield True, what, f"{load.__name__}: the self-test runs in it" if hasattr(load, "__name__") else "found"
            break
        except (ImportError, FileNotFoundError, ValueError, RuntimeError) as error:
            yield True, what, f"not used: {error}"
    if load is None:
        yield False, "self-test", "neither ComfyUI (set FMN_COMFYUI to its folder) nor diffusers is there to run the model"
        return
    yield from forget_twice(load)


def comfyui_host(demo) -> Callable:
    return demo.load_embedded_model


def diffusers_host(demo) -> Callable:
    from .hosts.diffusers import DiffusersHost

    return lambda: DiffusersHost(demo.make_pipeline(), progress_bar=False)


def forget_twice(load: Callable) -> Iterator[tuple[bool, str, str]]:
    """Checks that forgetting works, gives the same twice, and leaves the model as it was."""
    from .forget import forget
    from .patch import fingerprint, serialize
    from .settings import ForgetSettings

    host = load()
    before = fingerprint(host)
    for preset in ("fast", "paper"):
        settings = ForgetSettings(preset=preset, steps=3, num_pictures=1, sampling_steps=2, resolution=64)
        start = time.monotonic()
        first, second = (serialize(forget(host, "cat", settings)[0], "doctor") for _ in range(2))
        told = f"{len(first):,} bytes, {(time.monotonic() - start) / 2:.1f} s"
        yield first == second, f"preset `{preset}`", f"{told}, {'the same twice' if first == second else 'another each time'}"
    same = fingerprint(host) == before
    yield same, "the model", "left as it was" if same else "changed"
