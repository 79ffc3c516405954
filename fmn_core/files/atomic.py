"""Files that appear whole or not at all, under names that nobody has."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

from ..errors import ForgetError

PREFIX, SUFFIX = ".fmn-", ".tmp"  # of files that are being written
LEFT_OVER = 86400  # seconds after which a half-written file is one that a killed process left
Saved = TypeVar("Saved")


class NameTakenError(ForgetError):
    """A name is in use, and files are never overwritten."""


def mode_of_new_files() -> int:
    """What the process gives to a file that it opens; the system tells it only while it sets it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask


READABLE = mode_of_new_files()


def describe(path: Path) -> str:
    """A file's name and size, for people."""
    return f"{path}  {path.stat().st_size:,} bytes"


def write_new(data: bytes, path: Path) -> Path:
    """Writes a file under a name that must be new, whole or not at all, and returns it; raises ForgetError where that cannot
    be."""
    with new_file(path) as file:
        file.write(data)
    return path


def write_all_new(files: dict[Path, Callable[[IO[bytes]], object]]) -> None:
    """Writes several files that belong together, each by what writes into it once it is open, under names that must be
    new: all of them or none; raises ForgetError."""
    for path in files:
        require_new(path)
    written = []
    try:
        for path, write in files.items():
            with new_file(path) as file:
                write(file)
            written.append(path)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def save_under_next(paths: Iterable[Path], save: Callable[[Path], Saved]) -> Saved:
    """What `save` returns for the first of the paths whose name it finds free: another process may take a name that was
    free when it was chosen. Raises ForgetError as `save` does for anything else, and where there is no further path."""
    taken = None
    for path in paths:
        try:
            return save(path)
        except NameTakenError as error:
            taken = error
    raise taken or ForgetError("There is no name left to save under: choose another.")


def write_over(data: bytes, path: Path) -> None:
    """Writes a file whole or not at all, in the place of one that may be there; raises ForgetError where that cannot be."""
    with temporary_file(path) as file:
        file.write(data)
        finish(file)
        os.replace(file.name, path)


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Context with an open file that gets its name, which must be new, on leaving, and is gone after an error; raises
    ForgetError where it cannot be written."""
    with temporary_file(path) as file:
        yield file
        finish(file)
        publish(Path(file.name), path)


@contextmanager
def temporary_file(path: Path) -> Iterator[IO[bytes]]:
    """Context with an open, hidden file in a path's folder, gone on leaving unless it was given a name; raises ForgetError
    where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left_over(path.parent)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=PREFIX, suffix=SUFFIX, delete=False) as file:
            try:
                yield file
            finally:
                try:
                    file.close()
                finally:  # closing writes what is left, and fails where the disk is full
                    Path(file.name).unlink(missing_ok=True)
    except OSError as error:
        remedy = "choose a shorter name" if error.errno == errno.ENAMETOOLONG else "free some space or choose another folder"
        raise ForgetError(
            f"{path.name} could not be written to {path.parent}: {error.strerror or error}. Nothing was left there; "
            f"{remedy}, and queue again."
        ) from error


def finish(file: IO[bytes]) -> None:
    """Brings what was written to the disk, before a name says that it is there."""
    file.flush()
    os.fsync(file.fileno())
    os.chmod(file.name, READABLE)  # a temporary file is its owner's alone
    file.close()


def remove_left_over(folder: Path) -> None:
    """Takes away what processes that were killed while writing have left in a folder; what may be in use stays."""
    for file in folder.glob(f"{PREFIX}*{SUFFIX}"):
        try:
            if time.time() - file.stat().st_mtime > LEFT_OVER:
                file.unlink(missing_ok=True)
        except OSError:  # another process was quicker
            continue


def publish(temporary: Path, path: Path) -> None:
    """Gives a finished file its name; hosts cache by name, so an existing file is never overwritten.

    Raises NameTakenError where another process was quicker.
    """
    try:
        os.link(temporary, path)
        return
    except OSError:  # the name is taken, or the file system has no hard links
        pass
    with reserved(path):
        require_new(path)
        os.rename(temporary, path)


@contextmanager
def reserved(path: Path) -> Iterator[None]:
    """Context in which no other process of this pack gives a file this name; raises NameTakenError where one is about to."""
    mark = path.with_name(f"{PREFIX}{hashlib.sha256(path.name.encode(errors='surrogateescape')).hexdigest()[:16]}{SUFFIX}")
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        raise NameTakenError(taken(path)) from None
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


def taken(path: Path) -> str:
    """What a user reads of a name in use."""
    return f"{path} exists already, and files are never overwritten: choose another name."


def require_new(path: Path) -> Path:
    """The path; raises NameTakenError where the name is taken, be it by a link to nowhere: better before the work."""
    if os.path.lexists(path):
        raise NameTakenError(taken(path))
    return path
