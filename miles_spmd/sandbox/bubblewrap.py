"""The command line of bubblewrap: what a program in the sandbox sees of the machine, and as whom it runs."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from miles_spmd.sandbox.limits import Limits

FOLDER = "/tmp"  # the working directory in the sandbox, the only place that can be written
_NOBODY = 65534  # user and group in the sandbox, and of its processes on the host where root starts them
_LINKED = ("bin", "sbin", "lib", "lib32", "lib64")  # links into /usr on most systems
_OLDEST = (0, 7)  # has --size
_DISABLES_USERNS = (0, 8)
_SHM_BYTES = 2**20
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": FOLDER,
    "TMPDIR": FOLDER,
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the same program prints the same set
    "PYTHONDONTWRITEBYTECODE": "1",
    # libraries would start a thread for each core of the node, more than Limits.processes
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
# A mount namespace in which nobody can reach the folders ($2 to --): each below the mount point $1.
_EXPOSE = """set -e
point=$1 n=0; shift
mount -t tmpfs -o mode=755 sandbox "$point"
while [ "$1" != -- ]; do mkdir "$point/$n"; mount --rbind "$1" "$point/$n"; n=$((n + 1)); shift; done
shift; exec "$@"
"""


class Python(NamedTuple):
    """An interpreter, and the folders that it needs beside /usr."""

    executable: str
    folders: tuple[str, ...]
    hidden: tuple[str, ...]  # its folders of packages, where they are not to be seen


def missing() -> str | None:
    """Return what this machine lacks before anything is tried, and the remedy; None: nothing."""
    if platform.machine() not in ("x86_64", "aarch64"):
        return f"the sandbox runs on x86_64 and aarch64, and this machine is {platform.machine()}"
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return "bwrap is not in PATH: install the package bubblewrap"
    if version(bwrap) < _OLDEST:
        found, oldest = (".".join(map(str, one)) for one in (version(bwrap), _OLDEST))
        return f"{bwrap} has version {found}: install bubblewrap {oldest} or newer"
    if shutil.which("prlimit") is None:
        return "prlimit is not in PATH: install the package util-linux"
    return exposes(python(packages=False))


def exposes(python: Python) -> str | None:
    """Return why the folders of an interpreter must not be shown to a program; None: they may be."""
    for folder in python.folders:
        for name, own in (("home directory", os.path.expanduser("~")), ("working directory", ".")):
            if _is_in(os.path.realpath(own), folder):
                return f"the interpreter's folder {folder} contains your {name}: use an interpreter in one of its own"
    return None


@cache
def version(bwrap: str) -> tuple[int, ...]:
    """Return the version of bubblewrap, (0,) if it does not print one."""
    done = subprocess.run([bwrap, "--version"], capture_output=True, text=True, check=False)
    return tuple(map(int, re.findall(r"\d+", done.stdout))) or (0,)


def command(
    limits: Limits,
    python: Python,
    files: Mapping[str, int],
    arguments: Sequence[str],
    *,
    has_proc: bool,
    seccomp: int,
    status: int,
) -> list[str]:
    """Return the command that runs ``main.py`` among the ``files`` (name -> descriptor with its content).

    ``seccomp``: descriptor with the filter. ``status``: descriptor that bwrap writes its report to. ``has_proc``: with
    a /proc of the sandbox's own processes.
    """
    bwrap = str(shutil.which("bwrap"))
    exposed, prefix = _as_nobody(python.folders) if _is_root() else ({}, [])
    mounts = [*_system(), *(part for one in python.folders for part in ("--ro-bind", exposed.get(one, one), one))]
    for folder in python.hidden:
        mounts += ["--tmpfs", folder, "--remount-ro", folder]
    return [
        *prefix,
        bwrap,
        *("--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
        # it is a setting in /proc, and seccomp refuses new namespaces anyway
        *(["--disable-userns"] if has_proc and version(bwrap) >= _DISABLES_USERNS else []),
        *("--uid", str(_NOBODY), "--gid", str(_NOBODY), "--hostname", "sandbox", "--cap-drop", "ALL"),
        *("--die-with-parent", "--new-session", "--seccomp", str(seccomp), "--json-status-fd", str(status)),
        "--clearenv",
        *(part for name, value in _ENVIRONMENT.items() for part in ("--setenv", name, value)),
        *mounts,
        *(["--proc", "/proc"] if has_proc else []),
        *("--dev", "/dev", "--size", str(_SHM_BYTES), "--tmpfs", "/dev/shm"),
        *("--remount-ro", "/dev", "--size", str(limits.folder_mib * 2**20), "--tmpfs", FOLDER, "--chdir", FOLDER),
        *(part for name, number in files.items() for part in ("--file", str(number), f"{FOLDER}/{name}")),
        *("--remount-ro", "/"),
        *("--", "/usr/bin/prlimit", *limits.prlimit_options(), "--"),
        *(python.executable, "-s", "main.py", *arguments),
    ]


def python(packages: bool) -> Python:
    """Return the interpreter of this process: the one of its virtual environment with ``packages``, otherwise the one
    that this was made from, without any package that is not in the standard library."""
    # a link on the way, such as python3 of a version manager, may lead through folders that are not in the sandbox
    base = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    prefixes = [sys.base_prefix, sys.base_exec_prefix, *([sys.prefix] if packages else [])]
    folders = tuple(one for one in dict.fromkeys(map(os.path.realpath, prefixes)) if not _is_in(one, "/usr"))
    if packages:
        own = sys.prefix != sys.base_prefix
        real = os.path.join(os.path.realpath(sys.prefix), "bin", os.path.basename(sys.executable))
        return Python(real if own else base, folders, ())
    lies_in = {sys.base_prefix, sys.base_exec_prefix, "/usr", "/usr/local"}
    hidden = {os.path.realpath(one) for prefix in lies_in for one in Path(prefix).glob("lib*/python3*/*-packages")}
    return Python(base, folders, tuple(sorted(hidden)))


def _system() -> Iterator[str]:
    yield from ("--ro-bind", "/usr", "/usr")
    for name in _LINKED:
        if os.path.islink(f"/{name}"):
            yield from ("--symlink", os.readlink(f"/{name}"), f"/{name}")
        elif os.path.isdir(f"/{name}"):
            yield from ("--ro-bind", f"/{name}", f"/{name}")


def _is_in(path: str, folder: str) -> bool:
    return Path(path).is_relative_to(folder)


# --- root ------------------------------------------------------------------------------------------------------------


def _is_root() -> bool:
    """Whether this is root of the machine, and not the user who is called root in a user namespace."""
    inside, outside, count = map(int, Path("/proc/self/uid_map").read_text().split()[:3])
    return os.geteuid() == inside == outside == 0 and count > _NOBODY


def _as_nobody(folders: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the beginning of a command that runs the rest as nobody, and where the ``folders`` are that nobody could
    not reach otherwise (such as an interpreter below /root).

    In a user namespace of root the kernel does not limit the number of processes, and a program that has left the
    namespace would be root.
    """
    setpriv = [_tool("setpriv"), f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", "--inh-caps=-all", "--"]
    unreachable = [folder for folder in folders if not _reachable(folder)]
    if not unreachable:
        return {}, setpriv
    points = [
        one for one in ("/mnt", "/srv", "/media") if os.path.isdir(one) and not any(_is_in(f, one) for f in folders)
    ]
    point = points[0] if points else "/mnt"
    exposed = {folder: f"{point}/{number}" for number, folder in enumerate(unreachable)}
    unshare = [_tool("unshare"), "--mount", "--propagation", "private", "--"]
    return exposed, [*unshare, _tool("sh"), "-c", _EXPOSE, "sh", point, *unreachable, "--", *setpriv]


def _tool(name: str) -> str:
    return shutil.which(name) or name


def _reachable(folder: str) -> bool:
    """Whether every user can enter the folder."""
    return all(os.stat(one).st_mode & 0o001 for one in (Path(folder), *Path(folder).parents))
