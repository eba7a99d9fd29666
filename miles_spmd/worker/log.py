"""The file that a rank prints into, from its start on."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import itertools
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from miles_spmd.types.secrets import scrubbed


class Log(io.FileIO):
    """The file that a rank prints into. Where it cannot be written, whatever prints goes on, and :meth:`check` raises
    the error at the end of the command: else it would be raised by any line of any library, even while another error is
    being reported."""

    path: Path
    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            self.error = OSError(error.errno, error.strerror, str(self.path))
            return len(data)

    def move(self, path: Path) -> None:
        """Go on as ``path``. A file that has this name, of a process that this one replaces, is kept under another.
        Raises OSError."""
        if path.exists():
            names = (path.with_suffix(f".{number}{path.suffix}") for number in itertools.count(1))
            path.rename(next(name for name in names if not name.exists()))
        with contextlib.suppress(FileNotFoundError):  # the controller, which ends the run, has collected it
            self.path.rename(path)
        self.path = path

    def check(self) -> None:
        if self.error is not None:
            raise self.error


def redirect_output(path: Path) -> tuple[TextIO, Log]:
    """Send everything that this process prints, native libraries included, to ``path``. Returns the former stderr, and
    the log. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = Log(path, "a")
    log.path = path
    sys.stdout.flush()
    sys.stderr.flush()
    terminal = scrubbed(os.fdopen(os.dup(2), "w"))
    for number in (1, 2):
        os.dup2(log.fileno(), number)
    lines = io.TextIOWrapper(io.BufferedWriter(log), errors="backslashreplace", line_buffering=True)
    sys.stdout = sys.stderr = scrubbed(lines)
    faulthandler.enable()  # a crash in native code writes its stack to the log
    print(f"--- {time.strftime('%F %T')} {socket.gethostname()} pid {os.getpid()}")
    log.check()
    return terminal, log
