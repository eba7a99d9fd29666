"""Imported by the process from which others are forked, so that each of them has from the start what takes long."""

from miles_spmd.platform import cpu

cpu.install()

import miles_spmd.generation.sglang.engine  # noqa: E402
import miles_spmd.telemetry.report  # noqa: E402
import miles_spmd.worker.worker  # noqa: E402, F401
