"""The state of a rank's trainers in place: what the same rank of a cell that is behind receives from its peer.

Tensors travel as bytes into the tensors of the receiver, in one order that both derive from the same models, and every
one is compared with a digest. Nothing that arrives is interpreted beyond that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from itertools import chain

import torch
from torch import Tensor
from torchft.checkpointing.transport import CheckpointTransport

from miles_spmd.training.cells.group import Group
from miles_spmd.training.checkpoint import TrainerCheckpoint, set_random_state
from miles_spmd.weights.checksums import checksum

MESSAGE_BYTES = 1 << 28  # of a tensor that is sent at a time
_DEVICES = "cpu", "cuda"


class HealError(RuntimeError):
    """The state of a peer did not arrive as it was sent."""


class LiveState:
    """The tensors that checkpoints have of a rank's trainers, where they are, and those of ``snapshots``: weights in
    host memory that training replaces. ``settle`` returns when snapshots may be overwritten.

    ``received`` counts bytes. Where the state is not ``whole`` a part of it may be another cell's, or damaged.
    """

    def __init__(
        self,
        checkpoints: Sequence[TrainerCheckpoint],
        snapshots: Callable[[], Iterable[Tensor]] = tuple,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self._checkpoints, self._snapshots, self.settle = checkpoints, snapshots, settle
        self.received, self.whole = 0, True

    def tensors(self) -> list[Tensor]:
        """Return each piece of memory once, as uint8 [bytes]; the same on the same rank of every cell."""
        seen, found = set[tuple[int, int]](), []
        of_trainers = (checkpoint.live_tensors() for checkpoint in self._checkpoints)
        for tensor in chain(*of_trainers, self._snapshots()):
            own = tensor.detach().reshape(-1).view(torch.uint8)
            if (place := (own.data_ptr(), own.numel())) not in seen and own.numel():
                seen.add(place)
                found.append(own)
        return found

    def random(self) -> Tensor:
        """Return the random state of this rank, uint8 [bytes]."""
        return torch.cat([state.flatten() for state in self._checkpoints[0].random_state().values()])

    @property
    def updates(self) -> list[int]:
        """The updates that each trainer has made."""
        return [checkpoint.updates for checkpoint in self._checkpoints]

    def complete(self, updates: Sequence[int], random: Tensor) -> None:
        """Continue after so many updates of each trainer, with this random state; the tensors are there."""
        states = self._checkpoints[0].random_state()
        sizes = [state.numel() for state in states.values()]
        parts = zip(states.items(), random.split(sizes), strict=True)
        set_random_state({name: part.view(state.shape) for (name, state), part in parts})
        for checkpoint, number in zip(self._checkpoints, updates, strict=True):
            checkpoint.proceed(number)
        self.whole = True


class PeerTransport(CheckpointTransport[dict[str, object]]):
    """Sends a :class:`LiveState` over the process group of a quorum, from a cell to those that are behind. torchft
    calls it while they agree on the quorum, when no trainer works."""

    def __init__(self, group: Group, state: LiveState, seconds: float) -> None:
        self._group, self._state, self._seconds = group, state, seconds

    def metadata(self) -> str:
        return ""

    def send_checkpoint(
        self, dst_ranks: list[int], step: int, state_dict: dict[str, object], timeout: timedelta
    ) -> None:
        state, random = self._state, self._state.random()
        pieces = _pieces([*state.tensors(), random])
        between_gpus = [piece.device.type == self._group.device.type == "cuda" for piece in pieces]
        digests = [digest(piece if direct else piece.cpu()) for piece, direct in zip(pieces, between_gpus)]
        header = torch.tensor([step, random.numel(), len(pieces), *state.updates, *between_gpus, *digests])
        with self._group.watched(self._seconds):
            for rank in dst_ranks:
                self._group.give(header, rank)
                for piece, direct in zip(pieces, between_gpus):
                    self._group.give(piece if direct else piece.cpu(), rank)

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> dict[str, object]:
        state, random = self._state, self._state.random()
        pieces, trainers = _pieces([*state.tensors(), random]), len(state.updates)
        header = torch.zeros(3 + trainers + 2 * len(pieces), dtype=torch.int64)
        with self._group.watched(self._seconds):
            self._group.take(header, src_rank)
            of_step, random_bytes, count, *rest = header.tolist()
            if (of_step, random_bytes, count) != (step, random.numel(), len(pieces)):
                raise HealError(f"the peer sends {count} pieces of step {of_step}, not {len(pieces)} of step {step}")
            updates, between_gpus, digests = rest[:trainers], rest[trainers:][:count], rest[trainers + count :]
            state.settle()
            state.whole = False
            damaged = []
            for number, (piece, direct) in enumerate(zip(pieces, between_gpus, strict=True)):
                arrived = piece if piece.is_cuda == direct else torch.empty_like(piece, device=_DEVICES[direct])
                self._group.take(arrived, src_rank)
                state.received += arrived.numel()
                if digest(arrived) != digests[number]:
                    damaged.append(number)
                if arrived is not piece:
                    piece.copy_(arrived)
        if damaged:
            raise HealError(f"{len(damaged)} of {count} pieces arrived damaged, the first is number {damaged[0]}")
        state.complete(updates, pieces[-1])
        return {"user": {"default": {}}, "torchft": {"step": step, "batches_committed": 0}}


def digest(tensor: Tensor) -> int:
    """Return a digest of a uint8 tensor that depends on every bit and its position, a signed number of 64 bits: one for
    host memory, and another for GPUs."""
    if tensor.is_cuda and (tensor.numel() % 4 or tensor.data_ptr() % 4):
        tensor = torch.cat([tensor, tensor.new_zeros(-tensor.numel() % 4)])
    return int(checksum(tensor))


def _pieces(tensors: list[Tensor]) -> list[Tensor]:
    return [piece for tensor in tensors for piece in tensor.split(MESSAGE_BYTES)]
