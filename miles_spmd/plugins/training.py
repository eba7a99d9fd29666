"""The plug points of training: how sequences are packed, and what looks at the model in each phase.

Importing this file imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Packer(Protocol):
    """``train.packing``: divides the sequences of a batch into micro-batches. It runs on the controller."""

    def __call__(
        self, lengths: Sequence[int], *, data_parallel_size: int, max_tokens: int, multiple: int
    ) -> Sequence[Sequence[Sequence[int]]]:
        """Return ``packing[d][m]``: the indices of the sequences of micro-batch m on data-parallel rank d.

        ``lengths`` are tokens; preference pairs count as one sequence. Each index occurs once. Every rank has the same
        number of micro-batches, a ``multiple``, and each of them at least one sequence, or -1 alone, which stands for a
        sequence without weight. No micro-batch has more than ``max_tokens`` tokens."""
        ...


class TrainerHook(Protocol):
    """``train.trainer_hook``: is called in every rank that trains, before and after each of its phases.

    It is there to look at the model, such as for norms of weights. What it changes, the optimizer's own copies and the
    ledger do not learn of. All ranks make the same calls in the same order, so that it may use torch.distributed.
    """

    def __call__(self, phase: str, *, ends: bool, role: str, weights: Mapping[str, Tensor]) -> None:
        """``phase``: `log_probs`, `values` or `train`. ``ends``: False before it, True after it. ``role``: whose model
        it is, such as `actor` or `critic`. ``weights``: this rank's part of it by names of Megatron, on the device."""
        ...
