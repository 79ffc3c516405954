"""What is trained outlives an interrupt, an error and a killed process: the state of a training in a file of its own.

The file stands under the hash of all that the training was given, so the same inputs, queued again, find it. What comes
before the first step (encoded prompts, generated pictures, the closed form) is computed again: the same inputs give the
same.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor

from .. import __version__
from ..errors import ForgetError
from ..files.atomic import remove_left_over, save_under_next, write_over
from ..files.safetensors import UNREADABLE, read_small
from ..host import DiffusionHost
from ..log import logger, quoted
from .state import State

BESIDE = ".forget-me-not"  # the folder of checkpoints beside a file that is to be made
ENDING = ".checkpoint"  # safetensors inside; hosts list what ends so, in any folder, as a LoRA
EVERY = 10.0  # seconds between two writes
MOST, OLDEST = 8, 14 * 86400  # files in a folder beside one's own, and the age in seconds at which they go
ROOM = 64 << 20  # bytes that a file may have beyond what its parameters account for
Result = TypeVar("Result")  # what a training makes


class Checkpoint(Generic[Result]):
    """Context around a training and the saving of what it made. Left well, it takes its file away; left by an exception of
    any kind, it writes the state after the last whole step, and hands the result so far to `rescue`. An exception from the
    midst of the optimiser's own step costs the state, but not the result: there the file stays as it was last written.

    `folder`: where files go; without one, nothing is written.
    """

    def __init__(self, folder: Path | None = None, rescue: Callable[[Result], object] | None = None, every: float = EVERY):
        self.folder, self.rescue, self.every = folder, rescue, every
        self.file: Path | None = None
        self.state: State | None = None
        self.unfinished: Callable[[], Result] | None = None
        self.resumed = 0  # steps that an earlier run has done
        self.written = time.monotonic()

    def begin(self, host: DiffusionHost, texts: Iterable[str], *inputs: object) -> None:
        """Names the file after all that the training is given: the model with all that is on it, texts with what their
        words are to it, and other plain values and tensors."""
        if self.folder is None:
            return
        try:
            known = [[text, known_words(host, text)] for text in texts], host.identity(), arithmetic(host.device)
        except (RuntimeError, TypeError, AttributeError) as error:  # weights of a kind that does not show its values
            logger.warning("checkpoint.off why=%s", quoted(error))
            return
        self.file = self.folder / f"{digest(__version__, known, inputs)}{ENDING}"

    def resume(self, state: State, unfinished: Callable[[], Result]) -> int:
        """Brings a state to where the last run of the same training got to, and returns how many steps are done.
        `unfinished` makes the result of the steps done so far; it is asked only after an exception."""
        self.state, self.unfinished, self.resumed, state.mark = state, unfinished, 0, None
        self.written = time.monotonic()
        if self.file is None or not self.file.exists():
            return 0
        first = state.stored()
        try:
            most = ROOM + 16 * sum(p.numel() * p.element_size() for p in state.parameters)
            kept, _ = read_small(self.file, most)
            state.load(kept)
        except UNREADABLE as error:
            logger.warning("checkpoint.unusable file=%s why=%s", self.file.name, quoted(error))
            state.load(first)
            return 0
        state.set_mark()
        self.resumed = len(state.losses)
        logger.info("checkpoint.resumed file=%s step=%d", self.file.name, len(state.losses))
        return len(state.losses)

    def keep(self, now: bool = False) -> None:
        """After a whole step: marks the state, and writes it if the last write is a while ago, or `now`."""
        if self.file is None and self.rescue is None:
            return
        assert self.state is not None
        self.state.set_mark()
        if now or time.monotonic() - self.written >= self.every:
            self.write()

    def write(self) -> None:
        """Writes the state; a full disk costs the file and not the training."""
        if self.file is None:
            return
        assert self.state is not None
        try:
            write_over(save(self.state.stored(), {"fmn.checkpoint": __version__}), self.file)
            prune_checkpoints(self.file.parent, self.file)
        except ForgetError as error:
            logger.warning("checkpoint.unwritten why=%s", quoted(error))
        self.written = time.monotonic()

    def done(self) -> None:
        """The training has ended: what fails from now on leaves a state to go on from, and nothing unfinished."""
        self.unfinished = None

    def __enter__(self) -> Checkpoint[Result]:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            self.remove()
        elif self.state is not None and self.state.mark is not None:
            self._rescue(self.state, error)
        self.state = self.unfinished = None

    def _rescue(self, state: State, error: BaseException) -> None:
        try:
            state.back()  # the exception may have come in the middle of a step
            if not state.torn:
                self.write()
            if self.rescue and self.unfinished and len(state.losses) > self.resumed:
                where = self.rescue(self.unfinished())
                logger.warning("checkpoint.rescued step=%d file=%s", len(state.losses), quoted(where))
        except Exception as second:  # the first is what the user has to see
            logger.warning("checkpoint.lost why=%s after=%s", quoted(second), type(error).__name__)

    def remove(self) -> None:
        """Takes the file away, and the folder where it was the last."""
        if self.file is None:
            return
        try:
            self.file.unlink(missing_ok=True)
            folder = self.file.parent
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        except OSError as error:
            logger.warning("checkpoint.left file=%s why=%s", quoted(self.file), quoted(error))


def beside(path: Path, save: Callable[[Result, Path], object]) -> Checkpoint[Result]:
    """A checkpoint for what is to become a file, in a folder beside it; what is unfinished is saved beside it too."""

    def rescue(result: Result) -> Path:
        stem = f"{path.stem}-unfinished"
        names = (path.with_stem(f"{stem}-{n}" if n else stem) for n in itertools.count())

        def save_as(name: Path) -> Path:
            save(result, name)
            return name

        return save_under_next((name for name in names if not os.path.lexists(name)), save_as)

    return Checkpoint(path.parent / BESIDE, rescue)


def arithmetic(device: torch.device) -> list[object]:
    """What the last bits of a sum depend on, beside its terms: torch, the processor's instructions, the number of threads,
    by which sums are cut into parts, and the device."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return [torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), str(device), kind]


def known_words(host: DiffusionHost, text: str) -> object:
    """What a text is to the model, beside its letters: the vectors of its words, learned ones among them."""
    try:
        return host.token_embeddings(text)
    except ForgetError:  # a host without them
        return [token.id for token in host.tokenize(text)]


def prune_checkpoints(folder: Path, own: Path) -> None:
    """Takes away checkpoints that are old or too many, one's own excepted, and what killed processes left half-written."""
    remove_left_over(folder)
    others = []
    for file in folder.glob(f"*{ENDING}"):
        try:
            if file != own:
                others.append((file.stat().st_mtime, file))
        except OSError:  # another process was quicker
            continue
    for place, (written, file) in enumerate(sorted(others, reverse=True)):
        if place >= MOST or time.time() - written > OLDEST:
            try:
                file.unlink(missing_ok=True)
            except OSError:
                continue


def digest(*values: object) -> str:
    """sha256 of plain values and tensors, lists and dicts of them; tensors by every byte."""
    found = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            add([str(value.dtype), *value.shape])
            found.update(value.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            add([[key, value[key]] for key in sorted(value)])
        elif isinstance(value, list | tuple):
            found.update(f"[{len(value)}".encode())
            for one in value:
                add(one)
        else:
            text = f"{type(value).__name__} {value!r}".encode("utf-8", "surrogatepass")
            found.update(f"{len(text)} ".encode() + text)

    add(values)
    return found.hexdigest()
