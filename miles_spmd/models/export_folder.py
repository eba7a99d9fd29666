"""The folder of an export, which a later export may replace: it lists its own files, and everything else in it is the
user's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

MANIFEST = "export_manifest.json"
_WRITER = "miles-spmd export"


def foreign_files(folder: Path) -> list[str]:
    """Return the names in ``folder`` that no export wrote, or that were changed since; none if the folder is missing.

    Raises OSError, NotADirectoryError for something else than a folder.
    """
    if not folder.exists():
        return []
    written = _listed(folder / MANIFEST)
    present = [entry for entry in folder.iterdir() if not (written is not None and entry.name == MANIFEST)]
    return sorted(entry.name for entry in present if (written or {}).get(entry.name, "") != _fingerprint(entry))


def write_manifest(folder: Path) -> None:
    """List the present files of ``folder``. Raises OSError, which names the list; the former one is then left."""
    files = {entry.name: _fingerprint(entry) for entry in sorted(folder.iterdir()) if entry.name != MANIFEST}
    scratch = folder / f".{MANIFEST}"
    try:
        scratch.write_text(json.dumps({"written_by": _WRITER, "files": files}, indent=2) + "\n")
        scratch.replace(folder / MANIFEST)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(folder / MANIFEST)) from None


def is_begun(folder: Path) -> bool:
    """Whether ``folder``, which has a name that only exports use, is one that an export began to write. Its first file
    is the list, so one that was killed before leaves nothing else."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return _listed(folder / MANIFEST) is not None or {entry.name for entry in folder.iterdir()} <= {f".{MANIFEST}"}


def _listed(manifest: Path) -> dict[str, str] | None:
    try:
        content = json.loads(manifest.read_bytes())
    except (OSError, ValueError):
        return None
    files = content.get("files") if isinstance(content, dict) and content.get("written_by") == _WRITER else None
    return files if isinstance(files, dict) else None


def _fingerprint(file: Path) -> str | None:
    """Weights by their size and the time of their last change, because to read them takes as long as to write them;
    other files by their contents. Weights that were trained further have the same size."""
    if file.is_symlink() or not file.is_file():
        return None
    if file.suffix == ".safetensors":
        status = file.stat()
        return f"{status.st_size} bytes, changed last at {status.st_mtime_ns} ns"
    return f"sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}"
