"""The one message with which a run ends, and the controller's warnings before it.

The processes of a run see its end from different sides. Who knows most speaks first, the others follow after a grace;
so the first message is printed, and the others are not. What the processes share is the name of a file, which the
launcher of a verb makes and which the first of them removes: nothing has to be written for that, not even to a full
disk. Where another launcher has started the ranks such a file is missing, and everybody speaks.

A launcher that was killed leaves the folder of that file, which the next launcher of the machine removes. That would
silence the processes of the run that end a moment later, so each of them keeps the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from pathlib import Path
from typing import TextIO

from miles_spmd.types.files import with_remedy
from miles_spmd.types.printable import MAX_LINE, printable

VARIABLE = "MILES_SPMD_UNSAID"
LOCK = "lock"  # file beside that one, on which whoever needs the folder has a shared lock
GRACE = 3.0  # seconds in which a process of the run may still say why it ends


def keep() -> None:
    """Keep the file until this process has ended, whatever becomes of its launcher."""
    if path := os.environ.get(VARIABLE):
        with contextlib.suppress(OSError):
            fcntl.flock(os.open(Path(path).with_name(LOCK), os.O_RDONLY), fcntl.LOCK_SH)


def speaks() -> bool:
    """Return whether nobody has said why the run ends; from now on, this process has."""
    try:
        if path := os.environ.get(VARIABLE):
            os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def say(text: str, stream: TextIO | None = None) -> None:
    """Print ``text``, on stderr unless ``stream`` is given, if nobody has spoken before."""
    if speaks():
        print(f"miles-spmd: {printable(with_remedy(text), MAX_LINE)}", file=stream or sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a warning on stderr; the run goes on."""
    print(f"miles-spmd: warning: {printable(text, MAX_LINE)}", file=sys.stderr, flush=True)


def say_for_others(text: str) -> None:
    """Print ``text`` if nobody has spoken when the grace is over: whoever should have was killed."""
    end = time.monotonic() + GRACE
    while os.path.exists(os.environ[VARIABLE]) and time.monotonic() < end:
        time.sleep(0.05)
    say(text)
