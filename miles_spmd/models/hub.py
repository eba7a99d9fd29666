"""Models of the Hugging Face Hub: `Qwen/Qwen3-0.6B` in the place of a folder."""

from __future__ import annotations

import re
from pathlib import Path

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def is_hub_id(folder: Path) -> bool:
    """Return whether ``folder`` may be a model of the Hub: it has the form of one, and no such folder exists."""
    return ID.fullmatch(str(folder)) is not None and not folder.exists() and not folder.parent.is_dir()


def resolve_hub_id(folder: Path, *, download: bool) -> Path:
    """Return the folder that has a model of the Hub, any other folder unchanged; also a model that is not on this
    machine where ``download`` is false or HF_HUB_OFFLINE is set. Raises ValueError where it cannot be downloaded."""
    if not is_hub_id(folder):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    try:
        found = Path(snapshot_download(str(folder), local_files_only=True, allow_patterns=FILES))
        if (found / "config.json").is_file() and any(found.glob("*.safetensors")):
            return found
    except (OSError, ValueError):  # it is not in the cache
        pass
    if not download or HF_HUB_OFFLINE:
        return folder
    try:
        return Path(snapshot_download(str(folder), allow_patterns=FILES))
    except Exception as error:  # of the network, of the Hub, of its client
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"no folder {folder}, and it cannot be downloaded: {reason:.300}; {advice(folder)}") from error


def advice(folder: Path) -> str:
    """Return how to get a model of the Hub."""
    place = f"models/{folder.name}"
    return f"where there is a network, `hf download {folder} --local-dir {place}` gets it; then name {place}"
