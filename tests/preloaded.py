"""Imported once by the process from which others are forked (tests/forked.py), so that each of them starts with every
import that takes long already done."""

from miles_spmd.platform import cpu

cpu.install()

import torch.distributed.run  # noqa: E402, F401
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import (  # noqa: E402
    SubprocessHandler,
)

import miles_spmd.cli  # noqa: E402
import miles_spmd.generation.sglang.engine  # noqa: E402
import miles_spmd.telemetry.report  # noqa: E402
import miles_spmd.worker.worker  # noqa: E402, F401
from tests import forked  # noqa: E402

SubprocessHandler._popen = forked.fork_rank
