"""The preflight: every node of a job is examined at the same time, and the bad one is named, in less than a minute.

srun starts ``doctor --cluster FOLDER`` as one task on each node. A task looks at its own node, measures with the
others, and writes what it has found into a private folder inside FOLDER, which all nodes share; that it can is one of
the findings. The first task reads all findings, prints one table, and decides. Where a collective is slow, pairs of
neighbours show which node is the reason.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from miles_spmd.doctor import examine
from miles_spmd.telemetry.environment import environment, gpu_errors, gpus
from miles_spmd.types.files import write_whole
from miles_spmd.types.variables import VariableError, positive, whole
from miles_spmd.worker.meeting import Place, bind_sockets, published_store
from miles_spmd.worker.slurm_task import hosts

SECONDS = 55.0  # for everything; the environment's LIMIT sets another number
LIMIT = "MILES_SPMD_PREFLIGHT"
MORE = "a first start on a slow file system takes longer: MILES_SPMD_PREFLIGHT=SECONDS allows more"
SKEW = 1.0  # seconds between the clocks of two nodes: more confuses deadlines and the order of files
SLOW = 0.5  # share of the median bandwidth below which a node counts as slow
BYTES = {"cuda": 2**30, "cpu": 2**22}
REPEATS = 5
MEASURE = "-m", "miles_spmd.preflight"


class Report(msgspec.Struct):
    """What one node has found out about itself."""

    node: str
    problems: list[str] = []
    stuck: str = ""  # why the node has measured nothing, which may be because of another node
    versions: dict[str, str] = {}
    gpus: int = 0
    skew: float | None = None  # seconds by which its clock is ahead of the first node's
    local: float | None = None  # GB/s of an all-reduce of 1 GiB over the node's own ranks
    missing: list[int] = []  # numbers of nodes with ranks that did not reach the first node, as that one reports
    pairs: list[float] = []  # the same with the ranks of one neighbour, and of the other
    all: float | None = None  # over all ranks


def preflight(shared: Path) -> int:
    """Examine this node as one task of srun, and on the first one all nodes. Returns the exit status: 0, or 1 where a
    node is bad, or 2 where nothing can be examined. Ends the process's own children."""
    began = time.monotonic()
    names = hosts(os.environ.get("SLURM_STEP_NODELIST", "")) or [socket.gethostname()]
    try:
        end, expected = began + _seconds(), positive("MILES_SPMD_BANDWIDTH", 0.0)
        node, nodes = whole("SLURM_PROCID", 0), whole("SLURM_STEP_NUM_TASKS", 1, least=1)
        ranks, promised = len(gpus()) or whole("NPROC_PER_NODE", 1, least=1), whole("SLURM_GPUS_ON_NODE", 0)
        if node >= nodes or nodes != len(names):
            raise VariableError(
                f"this is task {node} of {nodes} on {len(names)} nodes: call srun with --ntasks-per-node=1 and without "
                "--ntasks, so that there is one task on each node"
            )
    except VariableError as error:
        print(f"preflight: error: {error}", file=sys.stderr, flush=True)
        return 2
    parts = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    folder = shared / "_".join(["preflight", *(os.environ.get(part, "0") for part in parts)])
    report = Report(names[node])
    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)
        write_whole(folder / f"{node}.try", b"\0" * 2**20, sync=True)
    except OSError as error:
        print(f"preflight: {names[node]}: {error.filename or folder}: {error.strerror}", file=sys.stderr, flush=True)
        return 1
    report.problems += gpu_errors()  # before the measurement, which uses the GPUs
    parts_of = {
        "doctor": partial(_examine, report, promised),
        "all-reduce": partial(_measure, report, folder, node, nodes, ranks, end),
    }
    threads = {what: _Part(what, part, report) for what, part in parts_of.items()}
    for what, thread in threads.items():
        thread.join(max(0.0, end - 4 - time.monotonic()))
        if thread.is_alive() and what == "doctor":  # the other has a limit of its own
            report.problems.append(f"{what}: no result within {max(0.0, _seconds() - 4):g} s; {MORE}")
    write_whole(folder / f"{node}.json", msgspec.json.encode(report))
    if node:
        return 0
    reports = _gather(folder, names, end)
    shutil.rmtree(folder, ignore_errors=True)
    bad = judge(reports, expected)
    print(render(reports, bad, time.monotonic() - began), flush=True)
    return 1 if bad else 0


class _Part(threading.Thread):
    """A part of the examination, which begins at once. What it raises is a problem of the node."""

    def __init__(self, what: str, part: Callable[[], None], report: Report) -> None:
        super().__init__(daemon=True)
        self._what, self._part, self._report = what, part, report
        self.start()

    def run(self) -> None:
        try:
            self._part()
        except Exception as error:
            self._report.problems.append(f"{self._what}: {type(error).__name__}: {error}")


def _seconds() -> float:
    return SECONDS if os.environ.get(LIMIT) == "off" else positive(LIMIT, SECONDS)


# --- one node --------------------------------------------------------------------------------------------------------


def _examine(report: Report, promised: int) -> None:
    here = environment()
    driver = {"driver": here.gpus[0].driver} if here.gpus else {}
    report.versions = here.packages | {"Python": here.python} | driver
    report.gpus = len(here.gpus)
    if report.gpus < promised:
        report.problems.append(f"{report.gpus} GPUs, and the job has {promised} on this node")
    sections, works = examine()
    path = sections["GPU path" if here.gpus else "CPU path"]
    failed = [finding for finding in path if finding.good is False]
    if failed or not works:
        report.problems += [f"{finding.name}: {finding.detail}" for finding in failed or sections["CPU path"]]


def _measure(report: Report, folder: Path, node: int, nodes: int, ranks: int, end: float) -> None:
    """Start a process for each rank of this node, and read what the first of them has measured."""
    processes = []
    for rank in range(ranks):
        place = {"RANK": node * ranks + rank, "WORLD_SIZE": nodes * ranks}
        place |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
        variables = os.environ | {name: str(number) for name, number in place.items()}
        variables.setdefault("MASTER_ADDR", report.node)
        command = [sys.executable, *MEASURE, str(folder), str(end - time.monotonic() - 10)]
        processes.append(
            subprocess.Popen(command, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    try:
        for rank, process in enumerate(processes):
            output, error = process.communicate(timeout=max(1.0, end - 6 - time.monotonic()))
            if process.returncode:
                reason = (error.strip().splitlines() or [f"status {process.returncode}"])[-1]
                report.stuck = report.stuck or f"all-reduce, rank {rank} of the node: {reason:.300}"
            elif rank == 0:
                for name, value in json.loads(output.splitlines()[-1]).items():
                    setattr(report, name, value)
    except subprocess.TimeoutExpired:
        report.stuck = "the all-reduce does not end"
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(folder: Path, seconds: float) -> dict[str, Any]:
    """One rank of the measurement. Returns what a node's first rank reports: GB/s of all-reduces over the ranks of the
    node, of pairs of nodes and of all nodes, and the difference of the clocks in seconds; or the first node, which
    nodes are missing. Raises RuntimeError where a sum is wrong."""
    import torch
    import torch.distributed as dist

    place, end = Place.from_environment(), time.monotonic() + seconds
    bind_sockets(place)
    store = published_store(place, folder, end)
    store.set(f"here {place.rank}", "")
    if missing := _missing(place, store, end):
        return {"missing": missing} if place.rank == 0 else {}
    skew = _skew(place, store)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(place.local_rank)
    limit = timedelta(seconds=max(1.0, end - time.monotonic()))
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("groups", store), rank=place.rank, world_size=place.world_size, timeout=limit
    )
    per_node, nodes = place.local_world_size, place.world_size // place.local_world_size
    tensor = torch.empty(BYTES[device] // 2, dtype=torch.bfloat16, device=device)

    def of(members: list[list[int]]) -> float | None:
        """GB/s in this rank's one of the groups, which have these nodes."""
        found = None
        for some in members:
            ranks = [node * per_node + local for node in some for local in range(per_node)]
            group = dist.new_group(ranks)
            if place.rank in ranks and len(ranks) > 1:
                found = _bandwidth(tensor, group)
        return found

    node_list = list(range(nodes))
    local = of([[node] for node in node_list])
    pairs = [of([node_list[i : i + 2] for i in range(first, nodes - 1, 2)]) for first in (0, 1)] if nodes > 2 else []
    whole = of([node_list])
    dist.barrier()
    dist.destroy_process_group()
    found = {"local": local, "pairs": [pair for pair in pairs if pair], "all": whole, "skew": skew}
    return {name: value for name, value in found.items() if value is not None}


def _missing(place: Place, store: Any, end: float) -> list[int]:
    """Wait for all ranks, and return the numbers of the nodes that have some that do not come."""
    if place.rank:
        found: list[int] = json.loads(store.get("missing"))
        return found
    ranks = [rank for rank in range(place.world_size) if not _wait(store, f"here {rank}", end - 10)]
    found = sorted({rank // place.local_world_size for rank in ranks})
    store.set("missing", json.dumps(found))
    if found:
        time.sleep(2)  # until the others have seen it in this process's store
    return found


def _skew(place: Place, store: Any) -> float | None:
    """Return by how many seconds this node's clock is ahead of the first node's."""
    if place.rank % place.local_world_size:
        return None
    if place.rank:
        before = time.time()
        store.set(f"ask {place.rank}", "")
        first = float(store.get(f"time {place.rank}"))
        return (before + time.time()) / 2 - first
    for rank in range(place.local_world_size, place.world_size, place.local_world_size):
        store.wait([f"ask {rank}"])
        store.set(f"time {rank}", repr(time.time()))
    return 0.0


def _wait(store: Any, key: str, end: float) -> bool:
    try:
        store.wait([key], timedelta(seconds=max(0.1, end - time.monotonic())))
    except Exception:  # torch's DistStoreError, which has no base of its own
        return False
    return True


def _bandwidth(tensor: Any, group: Any) -> float:
    """GB/s that each rank's link carries in an all-reduce: 2 (n - 1) / n times the size, over the median time (as
    nccl-tests' "busbw"). Raises RuntimeError where the sum is wrong."""
    import torch
    import torch.distributed as dist

    ranks, seconds = dist.get_world_size(group), []
    for _ in range(REPEATS + 1):
        tensor.fill_(1)
        dist.barrier(group)
        began = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    if not bool((tensor == ranks).all()):
        raise RuntimeError(f"an all-reduce of ones over {ranks} ranks is not {ranks} everywhere")
    return 2 * (ranks - 1) / ranks * tensor.numel() * tensor.element_size() / statistics.median(seconds[1:]) / 1e9


# --- all nodes -------------------------------------------------------------------------------------------------------


def _gather(folder: Path, names: list[str], end: float) -> list[Report]:
    """Read all reports; nodes that have none when the time is over have a problem instead."""
    files = [folder / f"{node}.json" for node in range(len(names))]
    while not all(file.exists() for file in files) and time.monotonic() < end:
        time.sleep(0.1)
    reports = []
    for name, file in zip(names, files):
        try:
            reports.append(msgspec.json.decode(file.read_bytes(), type=Report))
        except (OSError, msgspec.DecodeError):
            tried = "it has begun, and hangs" if file.with_suffix(".try").exists() else "it has not begun"
            question = f"{tried}; can it start Python, and does it share {folder.parent}?"
            reports.append(Report(name, [f"no report within {_seconds():g} s: {question}"]))
    return reports


def judge(reports: list[Report], expected: float = 0.0) -> dict[str, list[str]]:
    """Return what is wrong, by node; "" stands for what no node alone is the reason of. ``expected``: GB/s of the
    all-reduce over all ranks; 0: only nodes are compared with each other."""
    bad = {report.node: list(report.problems) for report in reports}
    for number in {number for report in reports for number in report.missing}:
        bad[reports[number].node].append(f"its ranks do not reach {reports[0].node}")
    for name in sorted({name for report in reports for name in report.versions}):
        found = Counter(report.versions.get(name, "none") for report in reports if report.versions)
        usual, _ = found.most_common(1)[0]
        for report in reports:
            if report.versions and (own := report.versions.get(name, "none")) != usual:
                bad[report.node].append(f"{name} {own}, and {usual} on other nodes")
    _judge_stuck(reports, bad)
    if skews := {report.node: report.skew for report in reports if report.skew is not None}:
        usual_skew = statistics.median_low(skews.values())
        for node, skew in skews.items():
            if abs(skew - usual_skew) > SKEW:
                bad[node].append(f"its clock differs by {skew - usual_skew:+.1f} s from other nodes'")
    _judge_speed(reports, bad, expected)
    return {node: problems for node, problems in bad.items() if problems}


def _judge_stuck(reports: list[Report], bad: dict[str, list[str]]) -> None:
    """The few nodes that are stuck where the others are not are bad. Where another node is bad anyway, nodes that are
    stuck may only wait for it; where most are stuck, it is not known whose problem it is."""
    stuck = [report for report in reports if report.stuck]
    if not stuck or any(problems for problems in bad.values()):
        return
    if len(reports) == 1 or 2 * len(stuck) < len(reports):
        for report in stuck:
            bad[report.node].append(report.stuck)
    else:
        bad[""] = [f"{', '.join(report.node for report in stuck)}: {stuck[0].stuck}: is the network stuck?"]


def _judge_speed(reports: list[Report], bad: dict[str, list[str]], expected: float) -> None:
    """A node is slow where its own ranks are, or where it is with both neighbours: with one it may be the other's."""
    for what, speeds in (
        ("its own ranks", {report.node: report.local for report in reports if report.local}),
        ("each neighbour", {report.node: max(report.pairs) for report in reports if report.pairs}),
    ):
        usual = statistics.median_high(speeds.values()) if speeds else 0.0
        for node, speed in speeds.items():
            if speed < SLOW * usual:
                bad[node].append(f"all-reduce with {what}: {speed:.3g} GB/s, and {usual:.3g} on other nodes")
    whole = min((report.all for report in reports if report.all), default=None)
    if expected and whole is not None and whole < expected:
        bad.setdefault("", []).append(
            f"all-reduce over all nodes: {whole:.3g} GB/s, expected {expected:g} (MILES_SPMD_BANDWIDTH)"
        )


def render(reports: list[Report], bad: Mapping[str, list[str]], seconds: float) -> str:
    """Return the table of all nodes, and below it a line for everything that is wrong."""
    head = f"{'node':<20} {'':<4} {'GPUs':>4} {'clock':>9} {'own ranks':>10} {'all nodes':>10}"
    lines = [f"{head}   GB/s of an all-reduce"]
    for report in reports:
        skew = "" if report.skew is None else f"{report.skew:+.3f} s"
        speeds = ("" if speed is None else f"{speed:.3g}" for speed in (report.local, report.all))
        mark = "NO" if report.node in bad else "ok"
        lines.append(f"{report.node:<20} {mark:<4} {report.gpus:>4} {skew:>9} {next(speeds):>10} {next(speeds):>10}")
    for node, problems in bad.items():
        lines += [f"bad: {node or 'the cluster'}: {problem}" for problem in problems]
    names = ",".join(node for node in bad if node)
    if names:
        lines.append(f"preflight: submit again with --exclude={names}, and report {names} to your administrators")
    end = "these nodes cannot run the job" if bad else "all nodes are as they should be"
    return "\n".join([*lines, f"preflight: {end}; {len(reports)} examined in {seconds:.0f} s"])


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), float(sys.argv[2]))))
