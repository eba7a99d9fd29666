"""All processes of a session: what its leader has started, in whatever process group, unless it began a session of its
own."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path


def members(leader: int) -> list[int]:
    """Return the processes of the session that ``leader`` has begun, without those that have ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, _, session, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(session) == leader and state not in "ZX":
                found.append(int(entry.name))
    return found


def kill(leader: int) -> None:
    """Kill all processes of a session, those that are started meanwhile, too; ``leader`` last, where it is this one."""
    this = os.getpid()
    while others := [pid for pid in members(leader) if pid != this]:
        for pid in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    if this == leader:
        os.kill(this, signal.SIGKILL)
