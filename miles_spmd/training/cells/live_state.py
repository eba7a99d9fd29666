"""The state of a rank's trainers in place: what the same rank of a cell that is behind receives from its peer.

Tensors travel as bytes into the tensors of the receiver, in one order that both derive from the same models, and every
one is compared with a digest. Nothing that arrives is interpreted beyond that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import chain

import torch
import xxhash
from torch import Tensor
from torchft.checkpointing.transport import CheckpointTransport

from miles_spmd.training.cells.group import Group
from miles_spmd.training.checkpoint import TrainerCheckpoint, set_random_state

MESSAGE_BYTES = 1 << 28  # of a tensor that is sent at a time
BLOCK_BYTES = 1 << 24  # that are digested at a time


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

    def __init__(self, group: Group, state: LiveState) -> None:
        self._group, self._state = group, state

    def metadata(self) -> str:
        return ""

    def send_checkpoint(
        self, dst_ranks: list[int], step: int, state_dict: dict[str, object], timeout: timedelta
    ) -> None:
        random, tensors, updates = self._state.random(), self._state.tensors(), self._state.updates
        digests = [digest(each) for each in (*tensors, random)]
        header = torch.tensor([step, random.numel(), len(tensors), *updates, *digests], dtype=torch.int64)
        for rank in dst_ranks:
            for tensor in (header, *_pieces([*tensors, random])):
                self._group.send([tensor.cpu()], rank, tag=0).wait(timeout)

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> dict[str, object]:
        state, tensors, own = self._state, self._state.tensors(), self._state.random()
        header, trainers = torch.zeros(4 + len(state.updates) + len(tensors), dtype=torch.int64), len(state.updates)
        self._group.recv([header], src_rank, tag=0).wait(timeout)
        of_step, random_bytes, count, *rest = header.tolist()
        updates, digests = rest[:trainers], rest[trainers:]
        if (of_step, random_bytes, count) != (step, own.numel(), len(tensors)):
            raise HealError(f"the peer sends {count} tensors of step {of_step}, not {len(tensors)} of step {step}")
        state.settle()
        state.whole = False
        random = torch.empty(random_bytes, dtype=torch.uint8)
        for piece in _pieces([*tensors, random]):
            received = piece if piece.device.type == "cpu" else torch.empty_like(piece, device="cpu")
            self._group.recv([received], src_rank, tag=0).wait(timeout)
            state.received += received.numel()
            if received is not piece:
                piece.copy_(received)
        damaged = [n for n, each in enumerate((*tensors, random)) if digest(each) != digests[n]]
        if damaged:
            raise HealError(f"{len(damaged)} of {count + 1} tensors arrived damaged, the first is number {damaged[0]}")
        state.complete(updates, random)
        return {"user": {"default": {}}, "torchft": {"step": step, "batches_committed": 0}}


def digest(tensor: Tensor) -> int:
    """Return the XXH3 of a uint8 tensor as a signed number of 64 bits."""
    of_tensor = xxhash.xxh3_64()
    for block in tensor.split(BLOCK_BYTES):
        of_tensor.update(block.cpu().numpy())
    return int.from_bytes(of_tensor.digest(), "big", signed=True)


def _pieces(tensors: list[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        yield from tensor.split(MESSAGE_BYTES)
