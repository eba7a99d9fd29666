"""The doctor: tries what this machine can run, and reports what it cannot and why."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from miles_spmd.sandbox.sandbox import problem
from miles_spmd.telemetry.environment import CUDA_PINS, PINS, Environment, cores, environment, installed

# The versions that are tested with the other pins.
TORCH_PINS = {"cpu": "2.13.0", "cuda": "2.11.0"}

ADAPTED = """
from miles_spmd.platform import cpu
adapted = cpu.install()
{}
print("on the CPU" if adapted else "on CUDA")"""
# Each program runs in a process of its own, so that a crash is a finding, too; its last line of output is the detail.
CPU_PROBES = {
    "collectives (gloo)": """
import os, torch, torch.distributed as dist
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(4))
print("torch", torch.__version__)""",
    "control plane (ZMQ with CURVE)": """
import zmq
assert zmq.has("curve"), "pyzmq was built without CURVE: install the pyzmq wheel"
print("libzmq", zmq.zmq_version())""",
    "trainer (Megatron-core)": ADAPTED.format("from megatron.core.models.gpt import GPTModel"),
    "engine (SGLang)": ADAPTED.format("from sglang.srt.managers.scheduler import Scheduler"),
    "attention kernel": """
import torch
from miles_spmd.invariant import compiled
built = compiled.takes(torch.float32, torch.device("cpu"), 64)
print("compiled" if built else "not compiled: torch operations replace it and are slower (docs/kernels.md)")""",
}
CUDA_PROBES = {
    "torch sees the GPU": """
import torch
assert torch.version.cuda, f"torch {torch.__version__} is built without CUDA: install torch==2.11.0"
assert torch.cuda.is_available(), "torch cannot open the GPU; is the driver new enough for CUDA " + torch.version.cuda
print("CUDA", torch.version.cuda, "NCCL", ".".join(map(str, torch.cuda.nccl.version())))""",
}


@dataclass(frozen=True)
class Finding:
    name: str
    good: bool | None  # None: for information only
    detail: str

    def __str__(self) -> str:
        mark = {True: "ok", False: "NO", None: "-"}[self.good]
        return f"  {mark:<3} {self.name:<32} {self.detail}"


def examine() -> tuple[dict[str, list[Finding]], bool]:
    """Return the findings by section, and whether at least one path, CPU or GPU, works."""
    here = environment()
    sections = {
        "Machine": list(_machine(here)),
        "Packages": list(_packages(cuda=bool(here.gpus))),
        "CPU path": [_python(), *_probe(CPU_PROBES)],
        "GPU path": list(_cuda_path(here)),
    }
    return sections, _works(sections["CPU path"]) or _works(sections["GPU path"])


def _works(path: list[Finding]) -> bool:
    return all(finding.good is not False for finding in path)


def render(sections: dict[str, list[Finding]], works: bool) -> str:
    """Return the findings of :func:`examine` as text."""
    blocks = ["\n".join([name, *map(str, findings)]) for name, findings in sections.items()]
    gpu = _works(sections["GPU path"])
    end = "This machine can train on its GPUs." if gpu else "This machine can run everything on its CPU."
    return "\n\n".join([*blocks, end if works else "This machine cannot run miles_spmd yet: see the lines marked NO."])


def _python() -> Finding:
    version = sys.version_info
    good = version[:2] == (3, 12)
    return Finding("Python", good, f"{version.major}.{version.minor}" + ("" if good else "; 3.12 is required"))


def _machine(here: Environment) -> Iterator[Finding]:
    yield Finding("system", None, here.system)
    yield Finding("cores for this process", None, str(here.cores))
    yield Finding("memory", None, f"{here.memory_gib:g} GiB")
    for index, gpu in enumerate(here.gpus):
        yield Finding(f"GPU {index}", None, f"{gpu.name}, {gpu.memory_gib:g} GiB, driver {gpu.driver}")
    if not here.gpus:
        yield Finding("GPUs", None, "none")
    lack = problem()
    yield Finding("sandbox for code", lack is None or None, lack or "works; reward.rm_type = 'code' runs in it")


def _packages(*, cuda: bool) -> Iterator[Finding]:
    """Compare the installed versions with those that are tested together."""
    pins = {"torch": TORCH_PINS["cuda" if cuda else "cpu"], **PINS, **(CUDA_PINS if cuda else {})}
    yield from map(_version, pins, pins.values())
    for package, use in (("transformer_engine", "a faster GPU trainer"), ("wandb", "Weights & Biases")):
        found = installed(package)
        yield Finding(package, None, f"{found}, for {use}" if found else f"not installed; required only for {use}")


def _version(package: str, pinned: str) -> Finding:
    found = installed(package)
    if found is None:
        return Finding(package, False, f"not installed; {pinned} is required")
    same = found.split("+")[0] == pinned
    return Finding(package, same or None, found if same else f"{found}; tested with {pinned}")


def _cuda_path(here: Environment) -> Iterator[Finding]:
    if not here.gpus:
        yield Finding("GPU", False, "none: nvidia-smi is missing or lists no GPU")
        return
    yield from _probe(CUDA_PROBES)
    yield from map(_version, CUDA_PINS, CUDA_PINS.values())
    for tool, use in (("nvcc", "FlashInfer compiles its kernels with it"), ("ninja", "FlashInfer builds with it")):
        path = shutil.which(tool)
        yield Finding(tool, path is not None, path or f"not in PATH; {use} at first use")


def _probe(programs: dict[str, str]) -> list[Finding]:
    with ThreadPoolExecutor(min(4, cores())) as pool:
        return list(pool.map(_try, programs, programs.values()))


def _try(name: str, program: str) -> Finding:
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        return Finding(name, False, "no result within 300 s")
    words = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or [f"exit {done.returncode}"]
    return Finding(name, done.returncode == 0, words[-1])
