"""The groups of ranks by name: the engines of one group serve the same model, and so do its trainers, if it has any."""

from pathlib import Path
from typing import Any

import msgspec

POLICY = "policy"  # what is trained: its trainers give its engines their weights
SECOND_POLICY = "second_policy"  # trained beside it, on the same episodes, by ranks of its own
JUDGE = "judge"  # a model that scores responses, with the weights of its checkpoint


def in_group(group: str, name: str) -> str:
    """Return what ``name`` of a group is called among those of all groups: itself in that of the first policy."""
    return name if group == POLICY else f"{group}/{name}"


class EngineGroup(msgspec.Struct, frozen=True):
    """What the engines of a group serve, and how they are built."""

    name: str
    hf_checkpoint: Path
    server_args: dict[str, Any]  # fields of SGLang's ServerArgs

    @property
    def tp_size(self) -> int:
        """Number of ranks of an engine."""
        return int(self.server_args.get("tp_size", 1))
