"""Refit: copy the trainer's weights into the engine, for any parallel layouts of the two."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import TYPE_CHECKING

import msgspec
import torch
import torch.distributed as dist

from miles_spmd.models.layout import TensorLayout, check_filled
from miles_spmd.weights.checksums import Comparisons, checksum
from miles_spmd.weights.copy_plan import Holding, Plan, make_plan
from miles_spmd.weights.transport import ALIGNMENT, Bucket, exchange, gather, make_buckets, raise_together, rectangle

if TYPE_CHECKING:
    from miles_spmd.weights.direct_refit import DirectRefit


class RefitCounts(msgspec.Struct, frozen=True):
    """What one refit copied into this rank's engine, in bytes of the engine's dtypes."""

    bytes_local: int
    bytes_received: int
    checksum_mismatches: int = 0  # never another number: a mismatch raises RefitError


class Refit:
    """Plans once, runs many times. All ranks of ``group`` (default: the world) construct and run it together.

    ``weights`` and ``engine_weights`` map local names to tensors; ``layouts`` and ``engine_layouts`` are their layouts
    in checkpoint coordinates. The tensor objects must stay the same from run to run; their storage may change, except
    for ``weights`` that other ranks on the same host read. A rank without trainer or engine passes empty ones. Between
    GPUs of one host weights are copied directly from tensor to tensor, otherwise through buffers for two buckets of
    ``bucket_bytes``.

    Raises ValueError when a layout does not fill its tensor exactly, or no rank holds what an engine needs.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        layouts: list[TensorLayout],
        engine_weights: Mapping[str, torch.Tensor],
        engine_layouts: list[TensorLayout],
        *,
        bucket_bytes: int,
        checksums: bool = True,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.weights, self.engine_weights = weights, engine_weights
        self.checksums = checksums
        self.group, self.rank = group, dist.get_rank(group)
        self.device = next((t.device for t in (*weights.values(), *engine_weights.values())), torch.device("cpu"))
        dtype_names = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in engine_weights.items()}
        on_gpu = (_on_one_gpu(weights), _on_one_gpu(engine_weights))
        mine = Holding(socket.gethostname(), layouts, engine_layouts, dtype_names, on_gpu)
        holdings = gather(mine, Holding, self.group)
        dtypes = [{name: getattr(torch, d) for name, d in holding.target_dtypes.items()} for holding in holdings]
        self.senders = [rank for rank, holding in enumerate(holdings) if holding.sources]
        self.receivers = [rank for rank, holding in enumerate(holdings) if holding.targets]
        plan = self._plan(holdings)
        self.padding = plan.padding
        self.local = make_buckets(plan.local, dtypes[self.rank], bucket_bytes)
        self.sends = {to: make_buckets(copies, dtypes[to], bucket_bytes) for to, copies in plan.sends.items()}
        self.receives = {
            source: make_buckets(copies, dtypes[self.rank], bucket_bytes) for source, copies in plan.receives.items()
        }
        self.counts = RefitCounts(
            sum(bucket.payload for bucket in self.local),
            sum(bucket.payload for buckets in self.receives.values() for bucket in buckets),
        )
        self._direct = self._make_direct(holdings)

    def _make_direct(self, holdings: list[Holding]) -> DirectRefit | None:
        """Return the direct part, with the buckets between GPUs of one host, and take these out of the other parts. If
        a rank cannot map the memory of others, only copies inside ranks are direct. All ranks decide alike, from
        ``holdings`` and the result of the collective :func:`map_peers`."""
        if not all(any(holding.on_gpu[side] for holding in holdings) for side in (0, 1)):
            return None
        from miles_spmd.weights.direct_refit import DirectRefit, map_peers  # needs Triton

        def direct(source: int, target: int) -> bool:
            a, b = holdings[source], holdings[target]
            return a.on_gpu[0] and b.on_gpu[1] and a.host == b.host

        pulls = {rank: buckets for rank, buckets in self.receives.items() if direct(rank, self.rank)}
        serves = {rank: buckets for rank, buckets in self.sends.items() if direct(self.rank, rank)}
        shared = map_peers(self.weights, pulls, serves, self.group)
        if shared is None:
            pulls, serves, shared = {}, {}, {}
        self.receives = {rank: buckets for rank, buckets in self.receives.items() if rank not in pulls}
        self.sends = {rank: buckets for rank, buckets in self.sends.items() if rank not in serves}
        if direct(self.rank, self.rank):
            pulls, self.local = {**pulls, self.rank: self.local}, []
        return DirectRefit(self.weights, self.engine_weights, pulls, serves, shared, self.device, self.group)

    def _plan(self, holdings: list[Holding]) -> Plan:
        """Raises ValueError on all ranks if one of them has a problem."""
        plan, problem = Plan([], {}, {}, []), ""
        try:
            mine = holdings[self.rank]
            for tensors, layouts in ((self.weights, mine.sources), (self.engine_weights, mine.targets)):
                for layout in layouts:
                    check_filled(layout.local_name, tuple(tensors[layout.local_name].shape), layout.pieces)
            plan = make_plan(holdings, self.rank)
        except ValueError as error:
            problem = str(error)
        raise_together(problem, self.group)
        return plan

    @torch.no_grad()
    def run(self) -> RefitCounts:
        """Copy all weights. Raises RefitError naming the tensors when a checksum differs after the write."""
        comparisons = Comparisons()
        if self._direct is not None:
            self._direct.run(comparisons if self.checksums else None)
        self._copy_local(comparisons)
        self._copy_remote(comparisons)
        for place, shape in self.padding:
            rectangle(self.engine_weights, place, shape).zero_()
        comparisons.check()
        return self.counts

    def _copy_local(self, comparisons: Comparisons) -> None:
        buffer = self._buffer(self.local) if self.checksums else None
        for bucket in self.local:
            sources, targets = bucket.sources(self.weights), bucket.targets(self.engine_weights)
            torch._foreach_copy_(targets, sources)
            if buffer is not None:
                sent, written = _packed_checksum(bucket, sources, buffer), _packed_checksum(bucket, targets, buffer)
                comparisons.add(sent != written, [(bucket, self.rank)])

    def _copy_remote(self, comparisons: Comparisons) -> None:
        """Send and receive in rounds; in a round, a rank sends to one rank and receives from one."""
        outbox = self._buffer(bucket for buckets in self.sends.values() for bucket in buckets)
        inbox = self._buffer(bucket for buckets in self.receives.values() for bucket in buckets)
        for to, source in self._rounds():
            for sent, received in zip_longest(self.sends.get(to, ()), self.receives.get(source, ())):
                outgoing = self._pack(sent, outbox) if sent else None
                incoming = inbox[: received.nbytes + ALIGNMENT] if received else None
                exchange(outgoing, to, incoming, source, self.group)
                if received:
                    self._unpack(received, inbox, source, comparisons)

    def _rounds(self) -> Iterator[tuple[int, int]]:
        """Yield, for every round, the rank to send to and the rank to receive from; this rank itself stands for none.

        Over all rounds a sender has every receiver once, and in each round no rank serves two others. Sender i sends to
        receiver i + turn, so that receiver j receives from sender j - turn (modulo ``count``); the shorter list is
        filled up with this rank."""
        count = max(len(self.senders), len(self.receivers))
        senders, receivers = ([*ranks, *[self.rank] * (count - len(ranks))] for ranks in (self.senders, self.receivers))
        for turn in range(count):
            to = receivers[(self.senders.index(self.rank) + turn) % count] if self.rank in self.senders else self.rank
            source = senders[self.receivers.index(self.rank) - turn] if self.rank in self.receivers else self.rank
            yield to, source

    def _pack(self, bucket: Bucket, buffer: torch.Tensor) -> torch.Tensor:
        """Return the bucket in flat form, followed by its checksum, as a view of ``buffer``. Values are cast before
        they are sent, so that no more bytes are sent than the engine has."""
        torch._foreach_copy_(bucket.segments(buffer), bucket.sources(self.weights))
        if self.checksums:
            _trailer(bucket, buffer).copy_(checksum(buffer[: bucket.nbytes]))
        return buffer[: bucket.nbytes + ALIGNMENT]

    def _unpack(self, bucket: Bucket, buffer: torch.Tensor, source: int, comparisons: Comparisons) -> None:
        targets = bucket.targets(self.engine_weights)
        torch._foreach_copy_(targets, bucket.segments(buffer))
        if self.checksums:
            sent = _trailer(bucket, buffer).clone()
            comparisons.add(sent != _packed_checksum(bucket, targets, buffer), [(bucket, source)])

    def _buffer(self, buckets: Iterable[Bucket]) -> torch.Tensor:
        largest = max((bucket.nbytes for bucket in buckets), default=0)
        return torch.empty(largest + ALIGNMENT, dtype=torch.uint8, device=self.device)


def _packed_checksum(bucket: Bucket, rectangles: list[torch.Tensor], buffer: torch.Tensor) -> torch.Tensor:
    """Return the checksum of what the rectangles hold now. It includes the gaps of ``buffer`` between them; these are
    equal on both sides, because the receiver computes it in the buffer that it received."""
    torch._foreach_copy_(bucket.segments(buffer), rectangles)
    return checksum(buffer[: bucket.nbytes])


def _trailer(bucket: Bucket, buffer: torch.Tensor) -> torch.Tensor:
    return buffer[bucket.nbytes : bucket.nbytes + 8].view(torch.int64)[0]


def _on_one_gpu(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether one kernel can copy all of them: there are tensors, on one GPU, with contiguous rows."""
    devices = {tensor.device for tensor in tensors.values()}
    return (
        len(devices) == 1
        and devices.pop().type == "cuda"
        and all(tensor.stride(-1) == 1 for tensor in tensors.values())
    )
