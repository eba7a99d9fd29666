"""The collectives of this rank, as torch's flight recorder holds them: what to look at when a run hangs.

gloo and NCCL enter every collective into it when it is called, with the number that it has in its group, so that the
records of two ranks can be compared. What SGLang sends through its own NCCL binding and its custom all-reduce is not in
it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

from miles_spmd.protocol.messages import Collective, GroupRecord

READ_SECONDS = 0.5  # a device that hangs may keep the record locked
NEWEST = 4  # collectives of each group that are compared with those of other ranks
KEPT = 200  # collectives in the file


def read(seconds: float = READ_SECONDS) -> dict[str, Any]:
    """Return the record, the newest entries last, in torch's own names; without entries where torch has none or cannot
    be read in ``seconds``: this is for a thread that must not hang with the others."""
    found: dict[str, Any] = {}
    reader = threading.Thread(target=lambda: found.update(_read()), daemon=True)
    reader.start()
    reader.join(seconds)
    return dict(found) if not reader.is_alive() else {}


def _read() -> dict[str, Any]:
    from torch._C import _distributed_c10d as torch_groups

    record: dict[str, Any] = {"entries": []}
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):  # of NCCL where torch has it, and of gloo
        dump: Callable[[], bytes] | None = getattr(torch_groups, name, None)
        if dump is not None:
            part = json.loads(dump())
            record |= part | {"entries": record["entries"] + part.get("entries", [])}
    record["entries"].sort(key=lambda entry: entry["time_created_ns"])
    return record


def groups(record: dict[str, Any], rank: int) -> list[GroupRecord]:
    """Return the newest collectives of each group, and all that are unfinished. ``rank``: this one in the whole run,
    by which the members of groups are numbered."""
    now = time.time_ns()
    names = _members(rank)
    # by backend, name and purpose: gloo and NCCL count for themselves
    of_group: dict[tuple[str, str, str], tuple[list[Collective], list[Collective]]] = {}
    for entry in record.get("entries", []):
        backend, _, operation = entry["profiling_name"].partition(":")
        # NCCL also retires what has failed
        done = entry["state"] == "completed" or (entry["retired"] and backend == "gloo")
        entered, messages = of_group.setdefault((backend, *entry["process_group"]), ([], []))
        (messages if entry["is_p2p"] else entered).append(
            Collective(
                number=entry["p2p_seq_id" if entry["is_p2p"] else "collective_seq_id"],
                operation=operation,
                tensors=_tensors(entry),
                seconds=max(0.0, (now - entry["time_created_ns"]) / 1e9),
                done=done,
            )
        )
    found = []
    for (backend, name, purpose), (entered, messages) in of_group.items():
        shown = [one for i, one in enumerate(entered) if not one.done or i >= len(entered) - NEWEST]
        unknown = purpose in ("", "undefined")
        found.append(
            GroupRecord(
                name=f"{backend} {name}",
                purpose="" if unknown else purpose,
                ranks=names.get(name, []),
                collectives=shown[: 4 * NEWEST],
                messages=[one for one in messages if not one.done][:NEWEST],
            )
        )
    return found


def _tensors(entry: dict[str, Any]) -> str:
    """Return types and sizes of what goes into a collective."""
    pairs = list(zip(entry["input_dtypes"], entry["input_sizes"]))
    text = ", ".join(f"{kind} {size}" for kind, size in pairs[:2])
    return text + (f" and {len(pairs) - 2} more" if len(pairs) > 2 else "")


def _members(rank: int) -> dict[str, list[int]]:
    """Return the ranks of every group of this process by the group's name, numbered as in the whole run: the default
    group of disaggregated ranks counts from the first one of its side."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    if not dist.is_initialized():
        return {}
    world = distributed_c10d._world
    total = max((len(ranks) for ranks in world.pg_group_ranks.values()), default=1)
    first = rank - dist.get_rank()
    return {
        name: sorted((number + first) % total for number in world.pg_group_ranks.get(group, {}))
        for group, name in world.pg_names.items()
    }
