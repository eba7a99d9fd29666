"""The quickstart whose first stage is forked from this process, which has all imports: its second one starts, as both
do for a user, in new interpreters."""

from __future__ import annotations

import os
import subprocess
from typing import Any

from miles_spmd.quickstart import __main__ as quickstart
from tests import forked

start = subprocess.run


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
    if str(quickstart.SFT) not in command:
        return start(command, **options)
    return subprocess.CompletedProcess(command, forked.fork_rank(None, command, os.environ).wait())


if __name__ == "__main__":
    quickstart.subprocess.run = run  # type: ignore[assignment]
    quickstart.main()
