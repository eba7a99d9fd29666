"""Started by torchrun in place of ``-m miles_spmd``: a worker that does not come to the end of one checkpoint.

    held_save.py FOLDER RANK ARGUMENTS OF MILES-SPMD ...

When that rank has written its data into a checkpoint folder of that name, it touches the file ``held`` in the working
directory, with its process id in it, and its thread that writes waits for ever. Everything else is the real worker.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from miles_spmd.cli import main

folder, rank = sys.argv[1:3]
fsync = os.fsync


def held_fsync(descriptor: int) -> None:
    fsync(descriptor)
    if f"/{folder}" in os.readlink(f"/proc/self/fd/{descriptor}"):
        scratch = Path("held.tmp")
        scratch.write_text(str(os.getpid()))
        scratch.rename("held")
        while True:
            time.sleep(600)


if __name__ == "__main__":
    if os.environ["RANK"] == rank:
        os.fsync = held_fsync
    sys.argv = ["miles-spmd", *sys.argv[3:]]
    main()
