"""Where the ranks of a run meet: the store in which torch.distributed finds the other ranks, and the keys by which the
controller admits them. docs/security.md says what is protected against whom.

A store of torch is a server without any authentication, and so are the sockets of gloo. On one node there is therefore
no such server: the store is a file in a folder that nobody else can enter, and sockets are bound to the loopback
interface. On several nodes the launcher's store has to be used, or rank 0's where srun is the launcher. Nothing in it
grants anything: the keys lie in such a folder inside the run folder, which the nodes share, and the store has its name
alone. Sockets are bound to the interface by which the nodes reach each other.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec
import psutil

from miles_spmd.protocol.last_words import LOCK
from miles_spmd.protocol.pipe import Credentials
from miles_spmd.protocol.router import ANY_INTERFACE, LOOPBACK, address_towards
from miles_spmd.types.cell import Cell
from miles_spmd.types.files import naming
from miles_spmd.types.variables import VariableError, text, whole
from miles_spmd.worker import slurm_task
from miles_spmd.worker.controller_process import ControllerProcess

if TYPE_CHECKING:
    from torch.distributed import Store

FOLDER = "MILES_SPMD_MEETING"  # environment: the private folder of a run on one node, made and removed by its launcher
PREFIX = "miles-spmd-"
INTERFACES = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
PORT = "port"  # file in a meeting's folder: where rank 0's store listens
POLL = 0.02  # seconds between looks for a file


@dataclass(frozen=True)
class Place:
    """The place that the launcher (torchrun, or srun through its script) assigns to this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master: str  # address of the first node, for all nodes
    meeting: str = ""  # what the folder is called in which the tasks of srun meet; "": another launcher's ranks
    cell: Cell | None = None  # that these ranks are; they are numbered from 0 in each

    @classmethod
    def from_environment(cls) -> Place:
        """Raises VariableError."""
        world_size = whole("WORLD_SIZE", least=1)
        place = cls(
            rank=whole("RANK"),
            world_size=world_size,
            local_rank=whole("LOCAL_RANK"),
            local_world_size=whole("LOCAL_WORLD_SIZE", world_size, least=1),
            master=text("MASTER_ADDR"),
            meeting=os.environ.get(slurm_task.MEETING, ""),
            cell=Cell.from_environment(),
        )
        if (
            place.rank >= world_size
            or place.local_rank >= place.local_world_size
            or place.local_world_size > world_size
        ):
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
            given = ", ".join(f"{name} {os.environ[name]}" for name in names if name in os.environ)
            raise VariableError(f"the environment has {given}, which cannot be the place of a rank")
        return place

    @property
    def number(self) -> int:
        """The number of this rank among those of all cells."""
        return self.rank if self.cell is None else self.cell.number * self.world_size + self.rank

    @property
    def ranks(self) -> int:
        """The number of ranks of all cells."""
        return self.world_size if self.cell is None else self.cell.cells * self.world_size

    @property
    def ranks_here(self) -> int:
        """The number of ranks of this machine."""
        return self.local_world_size * (self.cell.here if self.cell else 1)

    @property
    def host(self) -> str:
        """The name or address under which all ranks reach the first node."""
        return LOOPBACK if self.one_node else self.master

    @property
    def one_node(self) -> bool:
        return self.local_world_size == self.world_size


def meet(
    place: Place, run_dir: Path, controller: ControllerProcess | None, timeout: float
) -> tuple[Store, Credentials]:
    """Return the store for torch.distributed, and this rank's credentials. ``controller`` is given on rank 0, except in
    a cell: whoever starts cells has the controller, and writes the keys.

    Raises RuntimeError when the launcher's store names a folder that is not private, TimeoutError when rank 0's keys
    are not seen within ``timeout`` seconds, and EOFError when the controller died.
    """
    from torch.distributed import FileStore, PrefixStore

    limit, end = timedelta(seconds=timeout), time.monotonic() + timeout
    bind_sockets(place)
    launchers = None  # kept to the end of this function: rank 0 may be the one that offers it
    folder = _given_folder(place)
    if folder is None and place.meeting:
        folder = _known_folder(place, run_dir, end)
        launchers = None if place.one_node else published_store(place, folder, end)
    elif folder is None:
        launchers = _launchers_store(place, limit)
        folder = _agree(place, run_dir, launchers, end)
    store = FileStore(str(folder / "store"), place.world_size) if place.one_node else cast("Store", launchers)
    store.set_timeout(limit)
    keys = folder / "keys.json" if place.cell is None else Path(place.cell.keys)
    if controller is not None:
        write_private(keys, msgspec.json.encode(controller.credentials()))
    _await(keys, place, end)
    credentials = msgspec.json.decode(keys.read_bytes(), type=list[Credentials])[place.rank]
    members = PrefixStore("members", store)
    members.set(str(place.rank), "has its keys")
    if place.rank == 0:
        members.wait([str(rank) for rank in range(place.world_size)])
        keys.unlink()
        (folder / PORT).unlink(missing_ok=True)
        if not place.one_node:
            folder.rmdir()
    return store, credentials


def is_standby(place: Place) -> bool:
    """Return whether this rank has no keys yet, because it is one of a cell that may have to be started again."""
    return place.cell is not None and not Path(place.cell.keys).exists()


def wait_as_standby(place: Place) -> None:
    """Return when this rank has keys."""
    while is_standby(place):
        time.sleep(POLL)


def bind_sockets(place: Place) -> None:
    """Let gloo and NCCL listen on the one interface that this run needs. Of several nodes' a user may know better."""
    towards = place.host if place.cell is None else place.cell.host  # cells may be on several nodes
    own = address_towards(towards)
    if place.one_node and (own is None or own.startswith("127.")):
        os.environ.update(dict.fromkeys(INTERFACES, "lo"))
        return
    for interface, addresses in psutil.net_if_addrs().items():
        if own in [address.address for address in addresses]:
            for name in INTERFACES:
                os.environ.setdefault(name, interface)


def store_without_keys(place: Place, limit: timedelta) -> Store:
    """Return the store for torch.distributed of ranks that have no controller, as in benchmarks."""
    from torch.distributed import FileStore

    folder = _given_folder(place)
    return FileStore(str(folder / "store"), place.world_size) if folder else _launchers_store(place, limit)


@contextlib.contextmanager
def made_by_launcher() -> Iterator[Path]:
    """Make the private folder of a run on one node, remove it after the block, and remove those that launchers have
    left which were killed, and whose ranks have ended: their locks are free. Raises OSError."""
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name, Path(name, "new").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        Path(lock.name).rename(Path(name, LOCK))  # a lock that others see is taken
        for folder in Path(name).parent.glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError), (folder / LOCK).open("rb") as other:  # OSError: it is another user's
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        yield Path(name)


def _given_folder(place: Place) -> Path | None:
    """Return the folder that the launcher has made. It is forgotten: a run that this process starts has another."""
    folder = os.environ.pop(FOLDER, None)
    return Path(folder) if folder and place.one_node else None


def _launchers_store(place: Place, limit: timedelta) -> Store:
    """Connect to the store that torchrun offers to its ranks. Under other launchers rank 0 offers one, on the interface
    that the ranks need."""
    from torch.distributed import TCPStore
    from torch.distributed.rendezvous import rendezvous

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return next(rendezvous("env://", timeout=limit))[0]
    port, descriptor = whole("MASTER_PORT"), None
    if place.rank == 0:
        port, descriptor = _listen(place, port)
    return TCPStore(place.host, port, place.world_size, place.rank == 0, limit, master_listen_fd=descriptor)


def _listen(place: Place, port: int) -> tuple[int, int]:
    """Return a listening socket's port and descriptor; port 0: any that is free."""
    server = socket.create_server((address_towards(place.host) or ANY_INTERFACE, port))
    return server.getsockname()[1], server.detach()


def published_store(place: Place, folder: Path, end: float) -> Store:
    """Connect to the store that rank 0 offers at a free port, which it writes into ``folder``: no launcher has to
    choose one. Raises TimeoutError."""
    from torch.distributed import TCPStore

    descriptor = None
    if place.rank == 0:
        port, descriptor = _listen(place, 0)
        write_private(folder / PORT, str(port).encode())
    else:
        _await(folder / PORT, place, end)
        port = int((folder / PORT).read_text())
    limit = timedelta(seconds=max(1.0, end - time.monotonic()))
    return TCPStore(
        place.host, port, place.world_size, place.rank == 0, limit, wait_for_workers=False, master_listen_fd=descriptor
    )


def _agree(place: Place, run_dir: Path, launchers: Store, end: float) -> Path:
    """Return the private folder that rank 0 makes. Whoever can write to the launcher's store could name another one:
    only a folder of this user's that nobody else can enter is accepted."""
    parent = Path(tempfile.gettempdir()) if place.one_node else run_dir
    if place.rank == 0:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        launchers.set("meeting", folder.name)
        return folder
    name = launchers.get("meeting").decode(errors="replace")
    folder = parent / name
    if re.fullmatch(PREFIX + r"\w+", name):
        _await(folder, place, end)
        if _is_private(folder, place, run_dir):
            return folder
    raise RuntimeError(
        f"the launcher's store names {str(folder)[:200]!r} as the folder with this run's keys, and that folder is not "
        "this user's alone: another process has written to the store (docs/security.md)"
    )


def _known_folder(place: Place, run_dir: Path, end: float) -> Path:
    """Return the private folder of the tasks of srun, whose name all of them know; rank 0 makes it."""
    folder = (Path(tempfile.gettempdir()) if place.one_node else run_dir) / f"{PREFIX}{place.meeting}"
    if place.rank == 0:
        try:
            folder.mkdir(0o700)
        except FileExistsError:
            killed = f"ranks meet in {folder}, which a run that was killed has left behind: remove it"
            raise RuntimeError(killed) from None
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _await(folder, place, end)
    if not _is_private(folder, place, run_dir):
        raise RuntimeError(f"ranks meet in {folder}, and that folder is not this user's alone: remove it")
    return folder


def _is_private(folder: Path, place: Place, run_dir: Path) -> bool:
    status = folder.lstat()
    owner = os.geteuid() if place.one_node else run_dir.stat().st_uid  # a file server may map the user's number
    return stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077 and status.st_uid == owner


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only this user can read; it appears under its name when it is whole."""
    scratch = path.with_suffix(".tmp")
    with naming(path), open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
    scratch.rename(path)


def _await(path: Path, place: Place, end: float) -> None:
    """Wait until ``path`` exists. A shared file system may show it late."""
    while not path.exists():
        if time.monotonic() > end:
            shared = "" if place.one_node else ": run.output_dir has to be a folder that all nodes share"
            raise TimeoutError(f"rank {place.rank} does not see {path}, which rank 0 has to write{shared}")
        time.sleep(POLL)
