"""Every hostile file is read, and what was read of it is used, in a process of its own, whose time and memory are
measured."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import os
import random
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from hostile_files import Files, Maker
from waiting import STALLED

from fmn_core.cli.run_config import inversion_settings, read_concepts, read_config
from fmn_core.convert.config import ImportConfig
from fmn_core.convert.exporter import merge, save_as
from fmn_core.convert.importer import import_patch
from fmn_core.errors import ForgetError
from fmn_core.inspection.describe import text_of
from fmn_core.inspection.inspect import inspect_patch
from fmn_core.inspection.plot import draw_inspection
from fmn_core.inversion.embedding import read_embedding
from fmn_core.patch.file import is_patch, read_patch, save_patch
from fmn_core.patch.gate import gate
from fmn_core.patch.patch import Patch, model_shapes
from fmn_core.patch.stack import stack, unstack
from fmn_core.patch.summary import summary
from fmn_core.patch.weighted import WeightedPatch, stored_parts
from fmn_core.training.checkpoint import Checkpoint, State
from fmn_core.training.images import read_images

ROOT = Path(__file__).resolve().parents[2]
SLOW, MUCH = 2.0, 400 << 20  # seconds of computing for one answer; bytes of memory over the file's own
SOLVED = 1e9  # rank cubed, times layers, up to which patches are stacked here: a stack of more takes as long as a real one
KILLED, MEMORY = 60, 4 << 30  # seconds of computing and bytes after which a child is given up


def questions(host, path: Path, good: Patch) -> Iterator[tuple[str, Callable[[], object]]]:
    """(what, how) of all that is done with a file, and with what was read of it."""
    if path.suffix == ".yaml":
        yield "read a config", lambda: [read_concepts(c) or inversion_settings(c) for c in read_config(path).values()]
        return
    if path.suffix == ".png":
        yield "read pictures", lambda: read_images(path.parent)
        return
    if path.suffix == ".checkpoint":
        yield "go on from a state", lambda: resume(path)
        return
    read: list[Patch] = []
    yield "is it a patch?", lambda: is_patch(path)
    yield "read a patch", lambda: read.append(read_patch(path))
    yield "import", lambda: import_patch(host, path, ImportConfig(energy=0.9))
    yield "read learned words", lambda: read_embedding(path, {"clip_l": 1})
    yield "merge into a checkpoint", lambda: merge(path, good, 1.0, path.with_name("out.safetensors")).unlink()
    if read:
        yield from uses(read[0], path)


def uses(patch: Patch, path: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """(what, how) of what is done with a patch that was read."""
    out = path.with_name("out.safetensors")
    yield "say what it forgets", lambda: summary(patch)
    yield "inspect", lambda: text_of(inspect_patch(patch, None, path))
    yield "inspect as JSON", lambda: json.dumps(inspect_patch(patch, None, path).plain())
    yield "draw", lambda: draw_inspection(inspect_patch(patch, None, path))
    yield "gate", lambda: gate(patch, torch.ones(77, width_of(patch)))
    if patch.rank**3 * len(patch.modules) < SOLVED:
        yield "stack", lambda: stack([WeightedPatch(patch, 0.5), WeightedPatch(other(patch))])
        yield "take apart", lambda: unstack(patch)
    yield "write anew", lambda: written(save_patch, patch, out)
    yield "export as PEFT", lambda: written(lambda patch, out: save_as(patch, "peft", out), patch, out)
    yield "export in full", lambda: written(lambda patch, out: save_as(patch, "diff", out), patch, out)


def width_of(patch: Patch) -> int:
    """How wide the words are that a patch, or the first part of a stacked one, remembers."""
    part = stored_parts(patch.info)[0].info if "patches" in patch.info else patch.info
    words = WeightedPatch(Patch({}, part)).statistics
    return words.keys.shape[1] if words else 1


def other(patch: Patch) -> Patch:
    """The same patch of another concept."""
    return Patch(patch, patch.info | {"concept": "another"})


def written(write: Callable, patch: Patch, out: Path) -> None:
    try:
        write(patch, out)
    finally:
        out.unlink(missing_ok=True)


def resume(path: Path) -> int:
    parameters = [torch.ones(2)]
    state = State(parameters, torch.optim.AdamW(parameters), torch.Generator(), tensors={"good": []})
    checkpoint = Checkpoint()
    checkpoint.file = path
    return checkpoint.resume(state, lambda: None)


class Answer(NamedTuple):
    """What came of one question, and the seconds of computing that it took."""

    what: str
    came: str
    seconds: float


class Outcome(NamedTuple):
    """What came of one file: its answers, the bytes of memory that they took over its own, and what did harm."""

    kind: str
    size: int
    answers: list[Answer]
    memory: int
    harm: str

    @property
    def read(self) -> bool:
        """Whether any reader took the file; to say whether it is a patch is not to take it."""
        return any(answer.came == "read" and answer.what != "is it a patch?" for answer in self.answers)


def ask_all(host, path: Path, good: Patch) -> list[Answer]:
    answers = []
    for what, how in questions(host, path, good):
        start, came = time.process_time(), "read"
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                how()
        except ForgetError as error:
            came = "refused" if len(str(error)) < 5000 else "HARM a sentence of a page"
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            came = f"HARM {type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:200]}"
        answers.append(Answer(what, came, time.process_time() - start))
    return answers


def peak_of(work: Callable[[], object]) -> tuple[object, int, int]:
    """What this gives in a process of its own, as JSON, with that one's status and the most bytes of memory it held."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what is free here could hide what a child takes
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            resource.setrlimit(resource.RLIMIT_CPU, (KILLED, KILLED))  # of its own: others do not take from it
            signal.alarm(10 * STALLED)  # where it waits for ever
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
            with open(writing, "w") as pipe:
                json.dump(work(), pipe)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading) as pipe:
        said = pipe.read()
    _, status, used = os.wait4(child, 0)
    return json.loads(said) if said else [], status, used.ru_maxrss * 1024


class Hostile:
    """Has every file read and used, each in a process of its own."""

    def __init__(self, host, folder: Path, seed: int):
        self.host, self.folder = host, folder
        self.good = read_patch(ROOT / "demo/loras/forget-car.safetensors")
        self.maker = Maker(random.Random(seed))
        self.maker.shapes = model_shapes(host)
        self.outcomes: list[Outcome] = []
        whole = folder / "bad.safetensors"
        save_patch(stack([WeightedPatch(self.good), WeightedPatch(other(self.good))]), whole)
        ask_all(host, whole, self.good)  # the first time, libraries come into memory
        whole.unlink()
        gc.freeze()  # what is here stays: it need not be looked through in every process

    def run(self, count: int, known: bool = True) -> None:
        """All known files, and `count` random ones."""
        for kind, files in self.maker.known() if known else ():
            self.file(kind, files)
        for _ in range(count):
            self.file(*self.maker.random())

    def file(self, kind: str, files: Files) -> Outcome:
        """One file, the first of these, with the others beside it."""
        for name, raw in files.items():
            (self.folder / name).write_bytes(raw)
        path, size = self.folder / next(iter(files)), sum(map(len, files.values()))
        files.clear()
        _, _, first = peak_of(lambda: [])
        said, status, peak = peak_of(lambda: ask_all(self.host, path, self.good))
        answers = [Answer(*one) for one in said]
        if any(answer.seconds > SLOW for answer in answers):  # what else the machine does slows computing down too
            again, _, _ = peak_of(lambda: ask_all(self.host, path, self.good))
            less = {what: seconds for what, _, seconds in again}
            answers = [a._replace(seconds=min(a.seconds, less.get(a.what, a.seconds))) for a in answers]
        harms = [f"{a.what}: {a.came}" for a in answers if a.came.startswith("HARM")]
        harms += [f"{a.what}: {a.seconds:.1f} s" for a in answers if a.seconds > SLOW]
        memory = max(peak - first - size, 0)
        if status or not answers:
            harms.append(f"the process ended with status {status}")
        if memory > MUCH:
            harms.append(f"{memory >> 20} MB over the file")
        left = sorted(file.name for file in self.folder.iterdir() if file.name.startswith(("out", ".")))
        harms += [f"left {name}" for name in left]
        for file in self.folder.iterdir():
            file.unlink()
        self.outcomes.append(Outcome(kind, size, answers, memory, "; ".join(harms)))
        return self.outcomes[-1]

    def table(self) -> str:
        """For each kind: how many files, read and refused, the slowest answer, the most memory."""
        rows = ["| files | tried | read | refused | slowest answer | most memory over the file |", f"|{'---|' * 6}"]
        for kind in dict.fromkeys(outcome.kind for outcome in self.outcomes):
            own = [outcome for outcome in self.outcomes if outcome.kind == kind]
            read = sum(outcome.read for outcome in own)
            slowest = max((answer for outcome in own for answer in outcome.answers), key=lambda a: a.seconds)
            most = max(outcome.memory for outcome in own) >> 20
            rows.append(
                f"| {kind} | {len(own)} | {read} | {len(own) - read} | {slowest.seconds:.1f} s, {slowest.what} | {most} MB |"
            )
        return "\n".join(rows)

    @property
    def harms(self) -> list[str]:
        return [f"{o.kind}, {o.size:,} bytes: {o.harm}" for o in self.outcomes if o.harm]
