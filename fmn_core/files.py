"""Files that appear whole or not at all, under names that nobody has."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import ForgetError


def slug(name: str) -> str:
    """A concept's name as part of a file name: letters, digits and hyphens."""
    return re.sub(r"\W+", "-", name.lower()).strip("-")[:60] or "concept"


def describe(path: Path) -> str:
    """A file's name and size, for people."""
    return f"{path}  {path.stat().st_size:,} bytes"


def write_new(data: bytes, path: Path) -> None:
    """Writes a file under a name that must be new: whole or not at all; raises ForgetError where that cannot be."""
    with new_file(path) as file:
        file.write(data)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Context with an open file that gets its name, which must be new, on leaving, and is gone after an error; raises
    ForgetError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".tmp", delete=False) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                file.close()
                publish(Path(file.name), path)
            finally:
                file.close()
                Path(file.name).unlink(missing_ok=True)
    except OSError as error:
        remedy = "choose a shorter name" if error.errno == errno.ENAMETOOLONG else "free some space or choose another folder"
        raise ForgetError(
            f"{path.name} could not be written to {path.parent}: {error.strerror or error}. Nothing was left there; "
            f"{remedy}, and queue again."
        ) from error


def publish(temporary: Path, path: Path) -> None:
    """Gives a finished file its name; hosts cache by name, so a name in use is never taken over."""
    try:
        os.link(temporary, path)
        return
    except OSError:  # the name is taken, or the file system has no hard links
        pass
    require_new(path)
    os.rename(temporary, path)


def require_new(path: Path) -> Path:
    """The path; raises ForgetError where the name is taken, be it by a link to nowhere: better before the work."""
    if os.path.lexists(path):
        raise ForgetError(f"{path} exists already, and files are never overwritten: choose another name.")
    return path
