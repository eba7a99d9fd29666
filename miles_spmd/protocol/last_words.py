"""The one message with which a run ends, and the controller's warnings before it.

The processes of a run see its end from different sides. Who knows most speaks first, the others follow after a grace;
so the first message is printed, and the others are not. What the processes share is the name of a file, which the
launcher of a verb makes and which the first of them removes: nothing has to be written for that, not even to a full
disk. Where another launcher has started the ranks such a file is missing, and everybody speaks.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

from miles_spmd.types.files import with_remedy
from miles_spmd.types.printable import MAX_LINE, printable

VARIABLE = "MILES_SPMD_UNSAID"
GRACE = 3.0  # seconds in which a process of the run may still say why it ends


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
