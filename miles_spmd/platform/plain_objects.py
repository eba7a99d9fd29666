"""What torch.distributed's collectives of objects may unpickle: plain data, no code.

``all_gather_object`` and its relatives pickle what they send, and whoever gets into a connection between two ranks
could send a pickle that runs code. gloo's sockets have no authentication (docs/security.md), so a rank accepts only
what torch, Megatron and SGLang exchange.
"""

from __future__ import annotations

import dataclasses
import enum
import io
import pickle
import sys
from typing import Any

import torch

# Classes of data in modules below these; their constructors assign fields.
_DATA = ("torch.distributed.checkpoint.", "torch.distributed._shard.", "megatron.core.dist_checkpointing.")
# How a tensor's memory is unpickled; Megatron puts its own function in the place of torch's.
_STORAGE = (("torch.storage", "_load_from_bytes"), ("megatron.core.safe_globals", "safe_load_from_bytes"))
_NAMES = {
    "builtins": {"bytearray", "complex", "frozenset", "range", "set", "slice"},
    "collections": {"OrderedDict", "deque"},
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "torch": {"Size", "device"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "torch.serialization": {"_get_layout"},
    "traceback": {"FrameSummary", "StackSummary"},
}


class PlainUnpickler(pickle.Unpickler):
    """Raises UnpicklingError, with its name, for everything that is not plain data."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STORAGE:
            return lambda data: torch.load(io.BytesIO(data), weights_only=True)
        found = getattr(sys.modules.get(module), name, None)  # nothing is imported for a pickle
        if name in _NAMES.get(module, ()) or (module == "torch" and isinstance(found, torch.dtype)):
            return found
        if isinstance(found, type) and found.__module__ == module:
            data = dataclasses.is_dataclass(found) or issubclass(found, enum.Enum | tuple)
            if data and f"{module}.".startswith(_DATA):
                return found
            if issubclass(found, Exception) and f"{module}.".startswith(("builtins.", "torch.", *_DATA)):
                return found
        raise pickle.UnpicklingError(
            f"{module}.{name} is not among the types that ranks exchange: a process outside of the run may have sent "
            "it (docs/security.md)"
        )


def accept_plain_objects_only() -> None:
    """From now on, torch.distributed unpickles with :class:`PlainUnpickler` in this process."""
    from torch.distributed import distributed_c10d

    distributed_c10d._unpickler = PlainUnpickler
