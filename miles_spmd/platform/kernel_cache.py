"""Where compiled kernels are kept: a private folder on each node, and one archive of it that all nodes share.

Triton, torch's inductor, DeepGEMM, FlashInfer and TVM compile kernels when they are first called, which takes most of a
cold start. Each of them has a cache whose place an environment variable names. They are set to folders
on the node's own disk, because a cache consists of many small files that all ranks open, and a file of a shared file
system takes milliseconds to open. A node's folder is filled from the archive before anything compiles, by one of its
ranks, and the archive is written by one rank when a run has compiled what it had not.

Both are named by the versions of everything that compiles or is compiled, and by the GPU.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import stat
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# variable -> folder in the cache
FOLDERS = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "extensions",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "TVM_FFI_CACHE_DIR": "tvm",
    "SGLANG_DG_CACHE_DIR": "deep_gemm",  # from which SGLang sets the next one
    "DG_JIT_CACHE_DIR": "deep_gemm",
    "CUDA_CACHE_PATH": "driver",
}
PACKAGES = (
    *("torch", "triton", "sglang", "sglang-kernel", "sgl-deep-gemm", "flashinfer-python", "apache-tvm-ffi"),
    *("megatron-core", "transformer_engine"),
)
BYTECODE = "bytecode"
ROOT = ".root"  # file of an archive: the folder that it was made of
UNFINISHED = re.compile(r"(^|/)(tmp\.|\.tmp|[^/]*\.lock$|lock$)")  # names of files that are being written
MOST_BYTES = 4 << 30  # of an archive
STALE_SECONDS = 900.0  # after which whoever has begun to write an archive has died
KERNELS = Path(__file__).parents[1]


def shared_folder() -> Path:
    """Return the folder for archives in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "miles-spmd" / "kernels"


def key(device: str) -> str:
    """Return the name of what is compiled with the versions of now for this kind of GPU or processor."""
    parts = {"device": device, "machine": platform.machine(), "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            parts[name] = importlib.metadata.version(name)
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for source in sorted(KERNELS.rglob("*.py")):
        text = source.read_bytes()
        if b"@triton.jit" in text:
            digest.update(source.relative_to(KERNELS).as_posix().encode() + b"\0" + text)
    return f"torch-{parts.get('torch', '')}-{digest.hexdigest()[:16]}"


class KernelCache:
    """The cache of this node. ``shared``: the folder for archives. ``device``: as for :func:`key`. ``side``: of
    the run, where ranks have different kernels. ``problems`` says why the cache or its copy is missing: a run works
    without."""

    def __init__(self, shared: Path, device: str, side: str = "") -> None:
        self.key = "-".join(filter(None, [key(device), side]))
        self.archive = shared / f"{self.key}.tar"
        self.folder = Path(os.environ.get("TMPDIR") or "/tmp", f"miles-spmd-kernels-{os.geteuid()}", self.key)
        self.problems: list[str] = []
        self.unpacked = 0  # files, by this process
        self._filling: threading.Thread | None = None
        self._known: set[str] = set()  # files that were there at the start
        self._archived: set[str] = set()

    def open(self) -> None:
        """Fill the node's folder from the archive, unless another rank has, and let libraries compile into it. Call it
        before they are imported. Variables that the user has set stay."""
        try:
            _make_private(self.folder.parent)
            with _locked(self.folder.parent / f"{self.key}.lock"):
                if not self.folder.exists():
                    self._unpack()
        except OSError as error:
            self.problems.append(f"compiled kernels are not kept: {error}")
            return
        self._known = set(self._files())
        self._archived = self._known if self.archive.exists() else set()
        taken = {folder for name, folder in FOLDERS.items() if os.environ.get(name)}
        os.environ.update({n: str(self.folder / folder) for n, folder in FOLDERS.items() if folder not in taken})
        if not _has_bytecode() and not sys.pycache_prefix:
            os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(self.folder / BYTECODE)

    @property
    def found(self) -> int:
        """The number of files that were there when this process began, whoever of the node unpacked them."""
        return len(self._known)

    @property
    def compiled(self) -> int:
        """The number of kernels, and of libraries of kernels, that this node has compiled since :meth:`open`."""
        return sum(name.endswith((".cubin", ".so")) for name in set(self._files()) - self._known)

    def fill(self, *, wait: bool = False) -> None:
        """Write the archive while the run goes on (``wait``: before this returns), if something was compiled that it
        does not have. One process at a time writes it."""
        if self._filling is None or not self._filling.is_alive():
            self._filling = threading.Thread(target=self._fill, name="kernel cache", daemon=True)
            self._filling.start()
        if wait:
            self._filling.join()

    def _fill(self) -> None:
        names = list(self._files())
        if set(names) <= self._archived:
            return
        scratch = self.archive.with_suffix(".writing")
        try:
            self.archive.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                if time.time() - scratch.stat().st_mtime > STALE_SECONDS:
                    scratch.unlink()
            descriptor = os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            return  # another node does it
        except OSError as error:
            self.problems.append(f"compiled kernels are not shared: {error}")
            return
        try:
            with open(descriptor, "wb") as file:
                self._pack(file, names)
            scratch.replace(self.archive)
            self._archived = set(names)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            self.problems.append(f"compiled kernels are not shared: {error}")

    def _pack(self, file: BinaryIO, names: list[str]) -> None:
        total = 0
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name in names:
                path = self.folder / name
                with contextlib.suppress(FileNotFoundError):  # some caches replace their files
                    total += path.stat().st_size
                    if total > MOST_BYTES:
                        raise OSError(f"{self.folder} has more than {MOST_BYTES >> 30} GiB; delete it")
                    archive.add(path, name, recursive=False)
            root = tarfile.TarInfo(ROOT)  # the last one, by which an archive is known to be whole
            root.size = len(text := str(self.folder).encode())
            archive.addfile(root, io.BytesIO(text))

    def _unpack(self) -> None:
        scratch = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=f"{self.key}."))
        try:
            if (archive := self._trusted()) is not None:
                with archive, tarfile.open(fileobj=archive) as packed:
                    packed.extractall(scratch, filter="data")
                if not (scratch / ROOT).exists():
                    raise tarfile.ReadError("its end is missing")
                self._move(scratch)
        except (tarfile.TarError, EOFError, UnicodeDecodeError) as error:
            self.problems.append(f"{self.archive} cannot be unpacked ({error}) and will be written again")
            shutil.rmtree(scratch)
            scratch.mkdir(mode=0o700)
        scratch.rename(self.folder)

    def _trusted(self) -> BinaryIO | None:
        """Open the archive. Code will be run from it: another user's, or one that others may write, does not count."""
        try:
            file = self.archive.open("rb")
        except FileNotFoundError:
            return None
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            file.close()
            self.problems.append(
                f"{self.archive} is not used: another user owns it or may write it; name a folder of your own by "
                "run.kernel_cache"
            )
            return None
        return file

    def _move(self, scratch: Path) -> None:
        """Let Triton find the files of its groups, which it names by their whole paths, in the folder of now."""
        root = scratch / ROOT
        former = root.read_text()
        root.unlink()
        self.unpacked = sum(1 for path in scratch.rglob("*") if path.is_file())
        if former == str(self.folder):
            return
        for group in scratch.glob("triton/*/__grp__*"):
            status = group.stat()
            group.write_text(group.read_text().replace(json.dumps(former)[1:-1], json.dumps(str(self.folder))[1:-1]))
            os.utime(group, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _files(self) -> Iterator[str]:
        """Yield the finished files, relative to the folder."""
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = Path(folder, name)
                relative = path.relative_to(self.folder).as_posix()
                if not UNFINISHED.search(relative) and stat.S_ISREG(path.lstat().st_mode):
                    yield relative


def _make_private(folder: Path) -> None:
    """Make a folder that only this user can enter. Raises OSError where another one is in its place."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise OSError(f"{folder} is not a folder of this user's alone; remove it, or set TMPDIR to another place")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # ends with the process, whatever becomes of it
        yield


def _has_bytecode() -> bool:
    """Return whether torch was compiled to bytecode when it was installed, as the other packages were then, too."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return True
    return Path(importlib.util.cache_from_source(torch.origin)).exists()
