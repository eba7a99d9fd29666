"""Why ranks hang, from what each of them reports when a deadline is missed: which collective they wait in, which ranks
have not entered it, and where those are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from miles_spmd.protocol.messages import Collective, GroupRecord, Overdue

MAX_WAITS = 4  # collectives that are described
MAX_FRAMES = 6  # of a rank
MAX_STACKS = 8  # ranks whose frames are shown

Group = tuple[str, tuple[int, ...]]  # name and ranks: two sides of a run may have groups of one name


@dataclass
class Wait:
    """A collective of a group that some ranks wait in. ``entered`` by rank."""

    group: GroupRecord
    number: int
    entered: dict[int, Collective] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)
    unknown: list[int] = field(default_factory=list)  # late ranks whose record could not be read


def describe(reports: Mapping[int, Overdue], late: Sequence[int], doing: Callable[[int], str]) -> list[str]:
    """Return lines about ``reports`` by rank. ``late``: the ranks that have not replied; ``doing``: what another one
    does. No lines where no rank has reported."""
    found = waits(reports, late)
    lines = [line for wait in found[:MAX_WAITS] for line in _wait(wait, set(late), doing)]
    if len(found) > MAX_WAITS:
        lines.append(f"{len(found) - MAX_WAITS} more collectives wait, for these or for other ranks")
    lines += [
        f"{ranks([rank])} in {one.operation} ({one.tensors}) for {one.seconds:.1f} s, of {_title(group)}"
        for rank, report in reports.items()
        for group in report.groups
        for one in group.messages
    ][:MAX_STACKS]
    absent = [rank for wait in found for rank in wait.missing]
    order = [rank for rank in dict.fromkeys([*absent, *reports]) if rank in reports]
    stacks = {rank: " < ".join(reports[rank].frames[:MAX_FRAMES]) for rank in order[:MAX_STACKS]}
    for stack, same in groupby(stacks, key=lambda rank: stacks[rank]):
        lines.append(f"{ranks(list(same))} in {stack}")
    return lines


def waits(reports: Mapping[int, Overdue], late: Sequence[int]) -> list[Wait]:
    """Return the collectives that ranks wait in, those first that wait for a rank which waits for nobody."""
    unread = {rank for rank in late if rank not in reports or not reports[rank].groups}
    records: dict[Group, dict[int, GroupRecord]] = {}
    for rank, report in reports.items():
        for group in report.groups:
            records.setdefault((group.name, tuple(group.ranks)), {})[rank] = group
    waiting = {
        rank
        for rank, report in reports.items()
        for group in report.groups
        if group.messages or any(not one.done for one in group.collectives)
    }
    found = [wait for by_rank in records.values() if (wait := _first_unfinished(by_rank, unread)) is not None]
    return sorted(found, key=lambda w: (not _disagrees(w), all(rank in waiting for rank in w.missing), w.group.name))


def _first_unfinished(by_rank: Mapping[int, GroupRecord], unread: set[int]) -> Wait | None:
    """Return the first collective of one group that a rank waits in, or None. A rank that took another one for it, and
    has left that, counts as well: only the operation shows the error."""
    unfinished = [c.number for group in by_rank.values() for c in group.collectives if not c.done]
    if not unfinished:
        return None
    group = next(iter(by_rank.values()))
    wait = Wait(group, min(unfinished))
    for rank in group.ranks or sorted(by_rank):
        known = by_rank[rank].collectives if rank in by_rank else []
        for collective in known:
            if collective.number == wait.number:
                wait.entered[rank] = collective
        if all(collective.number < wait.number for collective in known):
            (wait.unknown if rank in unread else wait.missing).append(rank)
    return wait


def _disagrees(wait: Wait) -> bool:
    return len({collective.operation for collective in wait.entered.values()}) > 1


def _wait(wait: Wait, late: set[int], doing: Callable[[int], str]) -> list[str]:
    place = f"number {wait.number} of {_title(wait.group)}"
    kinds: dict[str, list[int]] = {}
    for rank, one in wait.entered.items():
        kinds.setdefault(f"{one.operation} ({one.tensors})", []).append(rank)
    if len(kinds) > 1:  # of another size, too: some operations allow that, but none of those that hang
        calls = "; ".join(f"{ranks(some)} {kind}" for kind, some in kinds.items())
        what = "call different collectives" if _disagrees(wait) else "contribute different tensors"
        lines = [f"ranks {what} as {place}: {calls}"]
    else:
        seconds = min((one.seconds for one in wait.entered.values() if not one.done), default=0.0)
        waiting = [rank for rank, one in wait.entered.items() if not one.done]
        lines = [f"{ranks(waiting)} in {next(iter(kinds))} for {seconds:.1f} s or more, {place}"]
    if wait.missing:
        lines[0] += f"; not entered by {ranks(wait.missing)}"
    if wait.unknown:
        lines[0] += f"; nothing is recorded of {ranks(wait.unknown)}"
    # whoever has replied has left the command without the collective
    return lines + [f"{ranks([rank])} is not late: {doing(rank)}" for rank in wait.missing if rank not in late]


def _title(group: GroupRecord) -> str:
    name = group.purpose or f"group {group.name}"
    return f"{name} ({ranks(group.ranks)})" if group.ranks else name


def ranks(numbers: Sequence[int]) -> str:
    """Return "rank 3", or "ranks 0, 1, 4-7"."""
    spans = []
    for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        span = [rank for _, rank in run]
        spans.append(f"{span[0]}-{span[-1]}" if len(span) > 2 else ", ".join(map(str, span)))
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(spans)}"
