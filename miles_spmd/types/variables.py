"""Numbers in the environment: those of launchers, of Slurm, and our own. A variable that is empty counts as not set."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping


class VariableError(RuntimeError):
    """A variable of the environment that is missing, or has no value that it can have: which, and what to do."""


def text(name: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return the variable ``name``. Raises VariableError where it is not set."""
    if value := environment.get(name):
        return value
    raise VariableError(f"the environment has no {name}, which whoever starts ranks gives each of them")


def whole(name: str, default: int | None = None, *, least: int = 0, environment: Mapping[str, str] = os.environ) -> int:
    """Return the whole number in the variable ``name``, which is at least ``least``. Raises VariableError; also where
    it is not set and has no ``default``."""
    if default is not None and not environment.get(name):
        return default
    value = text(name, environment)
    if not (value.isascii() and value.isdecimal() and len(value) < 19 and int(value) >= least):
        raise VariableError(f"{name} in the environment has to be a whole number, at least {least}, got {value!r}")
    return int(value)


def positive(name: str, default: float, environment: Mapping[str, str] = os.environ) -> float:
    """Return the number above 0 in the variable ``name``, or ``default``. Raises VariableError."""
    value = environment.get(name)
    if not value:
        return default
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise VariableError(f"{name} in the environment has to be a finite number above 0, got {value!r}")
    return number


def job_end(environment: Mapping[str, str]) -> float:
    """Return when the job ends, in Unix seconds, where ``environment`` has it; infinite otherwise. Raises VariableError
    where our own variable has something else; what Slurm's has for a job without an end differs by version."""
    ours = positive("MILES_SPMD_JOB_END", math.inf, environment)
    with contextlib.suppress(ValueError):
        if 0 < (end := float(environment.get("SLURM_JOB_END_TIME") or 0)) < math.inf:
            return end
    return ours
