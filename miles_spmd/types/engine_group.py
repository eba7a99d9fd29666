"""The groups of ranks that hold engines, by name: the engines of one group serve the same model."""

from pathlib import Path
from typing import Any

import msgspec

POLICY = "policy"  # what is trained: its trainers give its engines their weights
JUDGE = "judge"  # a model that scores responses, with the weights of its checkpoint


class EngineGroup(msgspec.Struct, frozen=True):
    """What the engines of a group serve, and how they are built."""

    name: str
    hf_checkpoint: Path
    server_args: dict[str, Any]  # fields of SGLang's ServerArgs

    @property
    def tp_size(self) -> int:
        """Number of ranks of an engine."""
        return int(self.server_args.get("tp_size", 1))
