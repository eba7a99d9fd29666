"""The environment of a run: versions of its software, and its machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import msgspec

from miles_spmd.types.files import write_whole
from miles_spmd.types.variables import whole

ENVIRONMENT_FILE = "environment.json"
# The versions that are tested together; on a GPU also those of CUDA_PINS.
PINS = {"megatron-core": "0.19.2", "sglang": "0.5.16", "transformers": "5.12.1", "torchft": "0.2.0"}
CUDA_PINS = {"sglang-kernel": "0.4.5", "sgl-deep-gemm": "0.1.4.post1", "torch_memory_saver": "0.0.10"}
IDLE_MIB = 2048  # of a GPU that nobody uses: less than any run, more than a driver
PACKAGES = ("miles-spmd", "torch", *PINS, "numpy", "msgspec", "pyzmq", "transformer_engine", *CUDA_PINS, "triton")


class Gpu(msgspec.Struct, frozen=True):
    name: str
    memory_gib: float
    driver: str
    capability: str = ""  # compute capability, such as "9.0"


class Environment(msgspec.Struct, frozen=True):
    python: str
    system: str
    cores: int  # that this process may use
    memory_gib: float
    gpus: list[Gpu]
    packages: dict[str, str]  # installed ones of PACKAGES
    cpu: str = ""
    task: str = ""  # the verb that the run does


def environment(task: str = "") -> Environment:
    """Return the environment of this process, which does ``task``."""
    return Environment(
        python=platform.python_version(),
        system=platform.platform(),
        cores=cores(),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        gpus=gpus(),
        packages={name: version for name in PACKAGES if (version := installed(name)) is not None},
        cpu=processor(),
        task=task,
    )


def cores() -> int:
    """Return the number of cores that this process may use: those of its affinity, which is also what a cgroup's cpuset
    leaves of it, and no more than the quota of its cgroup. os.cpu_count() ignores both."""
    allowed = len(os.sched_getaffinity(0))
    try:
        (own,) = (line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, ValueError):
        return allowed
    group = Path("/sys/fs/cgroup", own.lstrip("/"))
    for folder in (group, *group.parents):  # the quota of a group holds for all below it
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if quota != "max":
            allowed = min(allowed, max(1, int(quota) // int(period)))
    return allowed


def cores_per_rank(ranks: int) -> int:
    """Return this process's share of the cores where ``ranks`` of them run on this node. Slurm may have given a task
    its share already."""
    here = cores()
    return max(1, min(here, whole("SLURM_CPUS_ON_NODE", here, least=1) // ranks))


def processor() -> str:
    """Return the processor's model name, by which libraries choose their kernels; "" where it is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def installed(package: str) -> str | None:
    """Return the version of ``package``, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpus() -> list[Gpu]:
    """Return the GPUs that this process may use, as nvidia-smi lists them: no framework has to be loaded."""
    rows = _query("name", "memory.total", "driver_version", "compute_cap")
    return [Gpu(name, round(float(memory) / 1024, 1), driver, cap) for name, memory, driver, cap in rows]


def gpu_errors() -> list[str]:
    """Return what nvidia-smi reports to be wrong with the GPUs that this process may use. A value that a GPU does not
    have is not a number, and passes."""
    problems = []
    rows = _query(
        "index", "memory.used", "ecc.errors.uncorrected.volatile.total", "clocks_throttle_reasons.hw_slowdown"
    )
    for index, used, errors, slowdown in rows:
        if used.isdigit() and int(used) > IDLE_MIB:
            problems.append(f"GPU {index}: another process uses {int(used) / 1024:.1f} GiB of its memory")
        if errors.isdigit() and int(errors):
            problems.append(f"GPU {index}: {errors} uncorrected errors of its memory since it was reset")
        if slowdown == "Active":
            problems.append(f"GPU {index}: its clock is reduced because of heat or power (hw_slowdown)")
    return problems


def _query(*fields: str) -> list[list[str]]:
    """Return these fields of the GPUs that this process may use, as nvidia-smi prints them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "" or shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    query += ["-i", visible] if visible else []
    done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        return []
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def write_environment(run_dir: Path, task: str) -> None:
    write_whole(run_dir / ENVIRONMENT_FILE, msgspec.json.format(msgspec.json.encode(environment(task))))


def read_environment(run_dir: Path) -> Environment | None:
    try:
        return msgspec.json.decode((run_dir / ENVIRONMENT_FILE).read_bytes(), type=Environment)
    except (OSError, msgspec.DecodeError):
        return None
