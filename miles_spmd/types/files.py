"""Files that are whole whatever happens, and disks that are full."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from unicodedata import category

FULL = {number: os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}
REMEDY = "free some space on its disk, or raise the limit"


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that is raised inside names a file: ``path``, unless it names one already. What writes into an open
    file, or syncs or closes it, raises errors without a name."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def unusable(path: str | Path) -> str | None:
    """Return why nothing can be looked up at ``path``, whether it exists or not: control characters, too long, links in
    a circle, a folder that this user may not enter. None: nothing is wrong with the path itself."""
    if any(category(character) == "Cc" for character in str(path)):
        return "has control characters"
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return f"cannot be used: {error.strerror}"
    return None


class AppendedFile:
    """A file that consists of whole lines: each call writes all of its bytes, or none and raises OSError.

    It is unbuffered, so that a killed process leaves what it has written. A plain ``write`` of such a file may end in
    the middle of a line where the disk is full, which only its result tells.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.file = FileIO(path, "a")

    def append(self, data: bytes) -> None:
        before = os.fstat(self.file.fileno()).st_size
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self.file.write(rest) or 0 :]
        except OSError as error:
            self.file.truncate(before)
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def sync(self) -> None:
        """Return when all is on the disk."""
        with naming(self.path):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        with naming(self.path):
            self.file.close()


def write_whole(path: Path, content: bytes, *, sync: bool = False) -> None:
    """Write a file that is complete or, after an error, what it was before. ``sync``: return when it is on disk. Raises
    OSError, which names it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(content)
        if sync:
            with scratch.open("rb") as file:
                os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # of a file system that is read-only: it has no such file
            scratch.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def link(path: Path, target: str) -> None:
    """Let ``path`` be a symbolic link to ``target``, at once; what was there is replaced. A file system without links
    has none afterwards, so nothing may need it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():  # of a folder that was copied without links
            shutil.rmtree(path)
        scratch.symlink_to(target)
        scratch.replace(path)


def with_remedy(message: str) -> str:
    """Return the message of an error, and what to do where it is about room for a file: a full disk, a quota, or the
    limit of a file's size (``ulimit -f``)."""
    full = any(text in message for text in FULL.values()) and REMEDY not in message
    return f"{message}; {REMEDY}" if full else message
