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

ENVIRONMENT_FILE = "environment.json"
# The versions that are tested together; on a GPU also those of CUDA_PINS.
PINS = {"megatron-core": "0.16.1", "sglang": "0.5.16", "transformers": "5.12.1", "torchft": "0.2.0"}
CUDA_PINS = {"sglang-kernel": "0.4.5", "sgl-deep-gemm": "0.1.4.post1", "torch_memory_saver": "0.0.10"}
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
        cores=len(os.sched_getaffinity(0)),  # os.cpu_count() ignores affinity and cgroups
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        gpus=gpus(),
        packages={name: version for name in PACKAGES if (version := installed(name)) is not None},
        cpu=processor(),
        task=task,
    )


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
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "" or shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader,nounits"]
    query += ["-i", visible] if visible else []
    done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [Gpu(name, round(float(memory) / 1024, 1), driver, cap) for name, memory, driver, cap in rows]


def write_environment(run_dir: Path, task: str) -> None:
    write_whole(run_dir / ENVIRONMENT_FILE, msgspec.json.format(msgspec.json.encode(environment(task))))


def read_environment(run_dir: Path) -> Environment | None:
    try:
        return msgspec.json.decode((run_dir / ENVIRONMENT_FILE).read_bytes(), type=Environment)
    except (OSError, msgspec.DecodeError):
        return None
