"""One rank's part of the output layer: its logits in chunks of rows, so that they are never all in memory.

16k positions of a vocabulary of 152k would take 9 GiB for every copy of the logits otherwise. The price is one more
matrix product: the backward pass computes the logits again.

Shape suffixes: R rows (positions) of a chunk, H hidden size, V token ids of this rank, K tokens of each position.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from miles_spmd.invariant.linear import linear
from miles_spmd.invariant.operators import softcap
from miles_spmd.training import softmax

# Logits of a chunk on a rank where tensor operations read them: 512 MiB in fp32, of which two copies are alive beside
# the logits themselves, three while the entropy is differentiated. A kernel makes no copies: chunks are larger there.
MAX_LOGITS = 2**27
FP32_COPIES = 2 * 4  # bytes per logit
ROW_MULTIPLE = 128  # matrix products of a multiple of so many rows waste nothing
SORT_COST = 4  # sorted rows take so many times the memory: values, indices and running sums


@dataclass
class OutputLayer:
    """Output vectors ``weight`` [V, H] of the token ids ``first_id`` .. ``first_id + V - 1``.

    Ids from ``vocab_size`` on are padding and no tokens. The other ranks of ``group`` hold the rest of the vocabulary;
    None: this rank holds all of it. ``invariant``: logits and their sums are bitwise equal to those of an engine that
    computes with :mod:`miles_spmd.invariant`. ``softcap``: see :func:`~miles_spmd.invariant.operators.softcap`.

    Raises ValueError where all of this rank's ids are padding.
    """

    weight: Tensor
    vocab_size: int
    first_id: int = 0
    group: dist.ProcessGroup | None = None
    invariant: bool = False
    softcap: float = 0.0

    def __post_init__(self) -> None:
        if self.first_id >= self.vocab_size:
            raise ValueError(
                f"the rank with tokens from {self.first_id} on has none of a vocabulary of {self.vocab_size}; "
                "take a smaller megatron.tensor_model_parallel_size"
            )
        if self.group is not None and self.group.size() == 1:
            self.group = None

    @property
    def token_weight(self) -> Tensor:
        """Return the output vectors without those of padding."""
        return self.weight[: self.vocab_size - self.first_id]

    @property
    def softmax(self) -> ModuleType:
        """Return the module that reads logits: a kernel's, or that of tensor operations."""
        if self.weight.is_cuda and self.weight.dtype != torch.float64:
            from miles_spmd.training import softmax_kernel

            return softmax_kernel
        return softmax

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """Return [R, V] in the dtype of ``hidden_RH``; with a soft-cap in fp32 at least, as engines compute it."""
        logits_RV = (linear if self.invariant else F.linear)(hidden_RH, self.token_weight)
        return softcap(logits_RV, self.softcap) if self.softcap else logits_RV

    def measure(self, logits_RV: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return what :func:`softmax.measure` does, of this rank's logits; of all ranks' where the layer is invariant.

        Partial sums of ranks would be added in another order than an engine's sum over its whole vocabulary.
        """
        if self.invariant and self.group is not None:
            # Contiguous without padding, as an engine's logits are: the distance between rows decides how many numbers
            # a thread of the kernel reads at a time, and with it the reduction order.
            logits_RV = self.gather(logits_RV)[:, : self.vocab_size].contiguous()
        return self.softmax.measure(logits_RV, temperature)

    def chunks(self, rows: int, cut: bool, sorts: bool = False) -> list[slice]:
        """Return the chunks of ``rows`` rows. ``cut``: the distribution is cut by top-k or top-p, for which the whole
        vocabulary is gathered and sorted; ``sorts``: this rank's logits are sorted.

        The forward and the backward pass of a batch have the same chunks: only products of the same shape are sure to
        give the same logits, and with them the same tokens above a threshold.
        """
        if cut:
            size = MAX_LOGITS // (SORT_COST * self.vocab_size)
        elif sorts or self.softmax is softmax:
            size = MAX_LOGITS // (len(self.token_weight) * (SORT_COST if sorts else 1))
        else:
            # the memory of MAX_LOGITS with their copies in fp32, filled with logits alone
            item = self.weight.itemsize
            size = MAX_LOGITS * (item + FP32_COPIES) // (item * len(self.token_weight))
            size -= size % ROW_MULTIPLE if size > ROW_MULTIPLE else 0
        size = max(1, size)
        return [slice(start, start + size) for start in range(0, rows, size)]

    def gather(self, values_RV: Tensor) -> Tensor:
        """Return all ranks' ``values`` side by side, with -inf in the columns of padding."""
        if self.group is None:
            return values_RV
        padding = len(self.weight) - values_RV.shape[1]
        own = F.pad(values_RV, (0, padding), value=float("-inf"))
        of_ranks = [torch.empty_like(own) for _ in range(self.group.size())]
        dist.all_gather(of_ranks, own, self.group)
        return torch.cat(of_ranks, 1)
