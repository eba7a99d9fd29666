"""Imported once by the process from which others are forked (tests/forked.py), so that each of them starts with every
import that takes long already done."""

import sys

from miles_spmd.platform import cpu

cpu.install()

import torch.distributed.run  # noqa: E402, F401
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import (  # noqa: E402
    SubprocessHandler,
)
from torch.distributed.elastic.rendezvous import dynamic_rendezvous  # noqa: E402

import miles_spmd.cli  # noqa: E402
import miles_spmd.controller.inputs  # noqa: E402
import miles_spmd.generation.sglang.engine  # noqa: E402
import miles_spmd.supervisor  # noqa: E402
import miles_spmd.telemetry.report  # noqa: E402
import miles_spmd.worker.main  # noqa: E402
import miles_spmd.worker.worker  # noqa: E402
from tests import forked  # noqa: E402

SubprocessHandler._popen = forked.fork_rank
miles_spmd.supervisor.launch = forked.fork_launcher
# torchrun names its events, which nobody reads, by inspect.stack(): for each of them that looks at every module several
# times for every frame, and there are thousands of modules here. The same name without it saves seconds of each start.
dynamic_rendezvous.get_method_name = lambda depth=2: sys._getframe(depth).f_code.co_name
