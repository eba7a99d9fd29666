"""From sequences to the micro-batches of each rank, and from the ranks' results back to the order of the sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TypeVar

import numpy as np

from miles_spmd.plugins.plug_point import PlugPoint
from miles_spmd.plugins.training import Packer
from miles_spmd.protocol.commands import Command
from miles_spmd.protocol.messages import TrainerRank
from miles_spmd.types.train_sequence import MicroBatch, TrainSequence

C = TypeVar("C", bound=Command)
FILLER = -1  # stands for a sequence without weight, so that every rank has something to run

# ``packing[d][m]`` lists the sequences (indices into the batch) of micro-batch m on data-parallel rank d. Every rank
# has the same number of micro-batches: ranks of an expert-parallel group meet in collectives in each of them.
Packing = list[list[list[int]]]


def pack(lengths: Sequence[int], *, data_parallel_size: int, max_tokens: int, multiple: int = 1) -> Packing:
    """Return the fewest balanced micro-batches of at most ``max_tokens`` tokens, a multiple of ``multiple`` per rank.

    The longest sequence goes first into the emptiest micro-batch (LPT), ties by index: a pure function of the lengths.
    Raises ValueError naming the sequence that alone exceeds the budget.
    """
    for index, length in enumerate(lengths):
        if length > max_tokens:
            raise ValueError(
                f"sequence {index} has {length} tokens, more than one micro-batch may hold ({max_tokens}); "
                "raise max_tokens_per_gpu"
            )
    unit = data_parallel_size * multiple
    count = unit * max(1, -(-sum(lengths) // (max_tokens * unit)))
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        loads = np.zeros(count, np.int64)
        for index in order:
            target = int(loads.argmin())
            bins[target].append(index)
            loads[target] += lengths[index]
        if loads.max(initial=0) <= max_tokens:
            break
        count += unit
    filled = [sorted(b) or [FILLER] for b in bins]
    return [filled[rank::data_parallel_size] for rank in range(data_parallel_size)]


PACKERS: PlugPoint[Packer] = PlugPoint("train.packing", {"balanced": pack}, Packer)


def pack_by(name: str, lengths: Sequence[int], *, data_parallel_size: int, max_tokens: int, multiple: int) -> Packing:
    """Return the packing of the packer called ``name``. Raises PlugInError where a user's returns something else."""
    packer = PACKERS.resolve(name)
    returned = packer(lengths, data_parallel_size=data_parallel_size, max_tokens=max_tokens, multiple=multiple)
    if name in PACKERS.builtins:
        return [[list(one) for one in rank] for rank in returned]
    try:
        packing = [[[int(index) for index in one] for one in rank] for rank in returned]
    except (TypeError, ValueError):
        packing = []
    if problem := _problem(packing, lengths, data_parallel_size, max_tokens, multiple):
        raise PACKERS.returned(name, returned, f"a packing ({Packer.__module__.replace('.', '/')}.py), and {problem}")
    return packing


def _problem(
    packing: Packing, lengths: Sequence[int], data_parallel_size: int, max_tokens: int, multiple: int
) -> str | None:
    """Return what a packing lacks."""
    counts = {len(rank) for rank in packing}
    if len(packing) != data_parallel_size or len(counts) != 1 or (count := counts.pop()) % multiple or not count:
        return f"{data_parallel_size} ranks have the same number of micro-batches, a multiple of {multiple}"
    micro_batches = list(chain.from_iterable(packing))
    indices = [index for one in micro_batches for index in one if one != [FILLER]]
    if sorted(indices) != list(range(len(lengths))) or not all(micro_batches):
        return f"each index from 0 to {len(lengths) - 1} occurs once, and no micro-batch is empty"
    longest = max(sum(lengths[index] for index in one if index != FILLER) for one in micro_batches)
    if longest > max_tokens:
        return f"no micro-batch has more than {max_tokens} tokens (one has {longest})"
    return None


def pack_leaves(
    lengths: Sequence[int], *, data_parallel_size: int, leaves: int, max_tokens: int, multiple: int = 1
) -> Packing:
    """Return the packing of the canonical reduction, whose gradient does not depend on the number of ranks.

    The sequences are cut in order into ``leaves`` equal shares. Each leaf is packed as if it were alone into
    micro-batches of at most ``max_tokens`` tokens, or as many as the longest sequence has, and all leaves get as many
    micro-batches as the largest. A rank gets consecutive leaves.
    """
    budget = max(max_tokens, *lengths)
    cuts: list[list[list[int]]] = []
    for share in np.array_split(np.arange(len(lengths)), leaves):
        (packed,) = pack([lengths[i] for i in share], data_parallel_size=1, max_tokens=budget)
        cuts.append([[int(share[i]) for i in b] for b in packed if b != [FILLER]])
    size = -(-max(map(len, cuts)) // multiple) * multiple
    filled = [cut + [[FILLER]] * (size - len(cut)) for cut in cuts]
    own = leaves // data_parallel_size
    return [list(chain(*filled[rank * own : (rank + 1) * own])) for rank in range(data_parallel_size)]


def expand(packing: Packing, size: int) -> Packing:
    """Return a packing of sequences from one of units, which consist of ``size`` consecutive sequences each."""

    def members(unit: int) -> list[int]:
        return [FILLER] * size if unit == FILLER else list(range(unit * size, (unit + 1) * size))

    return [[list(chain.from_iterable(map(members, units))) for units in rank] for rank in packing]


def commands(
    packing: Packing,
    sequences: Sequence[TrainSequence],
    trainers: Sequence[TrainerRank],
    make: Callable[[list[MicroBatch]], C],
) -> list[C]:
    """Return one command per trainer rank; ranks with parts of the same model replica get the same object."""
    filler = _without_weight(min(sequences, key=lambda s: len(s.tokens)))
    per_replica = [
        make([[filler if i == FILLER else sequences[i] for i in micro_batch] for micro_batch in rank])
        for rank in packing
    ]
    return [per_replica[rank.data_parallel_rank] for rank in trainers]


def in_sequence_order(
    packing: Packing, trainers: Sequence[TrainerRank], results: Sequence[Sequence[np.ndarray] | None], count: int
) -> list[np.ndarray]:
    """Return the arrays of all ``count`` sequences, from whichever rank of each replica returned them. Raises
    RuntimeError where none did."""
    found: dict[int, np.ndarray] = {}
    for rank, arrays in zip(trainers, results, strict=True):
        if arrays is not None:
            found |= zip(chain(*packing[rank.data_parallel_rank]), arrays, strict=True)
    if missing := sorted(set(range(count)) - found.keys()):
        raise RuntimeError(f"no rank returned anything for sequences {missing[:8]} (of {count})")
    return [found[index] for index in range(count)]


def _without_weight(sequence: TrainSequence) -> TrainSequence:
    """Return the first two tokens of ``sequence``, the fewest that have a target, without loss weight."""
    cut = {name: getattr(sequence, name) for name in TrainSequence.__struct_fields__}
    cut = {name: None if values is None else values[:2] for name, values in cut.items()}
    return TrainSequence(**cut | {"loss_weights": np.zeros_like(cut["loss_weights"])})
