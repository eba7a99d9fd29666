"""How much an execution in the sandbox may use."""

from __future__ import annotations

import resource

import msgspec

_MIB = 2**20


class Limits(msgspec.Struct, frozen=True):
    """Limits of one execution. An execution that reaches one of them ends, or gets an error from the operating system.

    The limits of memory and of CPU time are those of a process, so all processes together may use ``processes`` times
    as much. Limits that this process itself has (``ulimit -H``) are not exceeded.
    """

    seconds: float = 10.0
    """Wall time of the whole execution, in seconds."""
    cpu_seconds: int = 10
    """CPU time of each process, in seconds."""
    memory_mib: int = 1024
    """Address space of each process, in MiB; the interpreter itself takes about 30."""
    processes: int = 16
    """Number of processes and threads at the same time."""
    file_mib: int = 16
    """Size of each file that is written, in MiB."""
    open_files: int = 64
    """Number of open file descriptors of each process."""
    folder_mib: int = 64
    """Size of the working directory, in MiB; it lies in the memory of the host."""
    output_bytes: int = 2**20
    """Bytes of standard output, and as many of standard error."""

    def __post_init__(self) -> None:
        """Raise ValueError for a limit that is not positive."""
        for name in self.__struct_fields__:
            if getattr(self, name) <= 0:
                raise ValueError(f"Limits.{name} must be positive, got {getattr(self, name)}")

    def prlimit_options(self) -> list[str]:
        """Return the options of prlimit(1) that set these limits in the sandbox."""
        wanted = {
            "as": (resource.RLIMIT_AS, self.memory_mib * _MIB),
            "fsize": (resource.RLIMIT_FSIZE, self.file_mib * _MIB),
            "nofile": (resource.RLIMIT_NOFILE, self.open_files),
            "nproc": (resource.RLIMIT_NPROC, self.processes + 1),  # and the init of the sandbox
            "core": (resource.RLIMIT_CORE, 1),  # byte: with 0, a crash would still start the host's handler of dumps
            "memlock": (resource.RLIMIT_MEMLOCK, _MIB),
            "msgqueue": (resource.RLIMIT_MSGQUEUE, 0),
        }
        options = [f"--{name}={_at_most(limit, value)}" for name, (limit, value) in wanted.items()]
        # SIGXCPU can be ignored, the SIGKILL a second later cannot
        soft, hard = (_at_most(resource.RLIMIT_CPU, self.cpu_seconds + later) for later in (0, 1))
        return [*options, f"--cpu={soft}:{hard}"]


def _at_most(limit: int, value: int) -> int:
    """Return ``value``, or this process's own hard limit where that is lower: it cannot be raised."""
    _, hard = resource.getrlimit(limit)
    return value if hard == resource.RLIM_INFINITY else min(value, hard)
