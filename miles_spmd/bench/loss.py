"""Memory and time of the loss part of a step, from hidden states to their gradient, compared with full logits.

Measured is the peak memory on top of the inputs (hidden states, output weight, targets), and in the backward pass on
top of their gradients: resident memory on a CPU, memory allocated by torch on a GPU. Seconds are CPU time on a CPU,
which other processes may share, and wall time on a GPU. Every row comes from a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from miles_spmd.training.log_probs import Distribution, linear_log_probs
from miles_spmd.training.output_layer import OutputLayer

CHUNKS, FULL = "chunks", "full logits"
FULL_COPIES = 3  # alive at once with full logits: log-probs, their gradient and that of the logits, in fp32
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    vocabulary: int
    tokens: int
    hidden: int
    dtype: str
    top_p: float
    top_k: int


@dataclass(frozen=True)
class Row:
    way: str
    extra_gib: float
    seconds: float | None  # None: does not fit here, so that the size is computed


def bench_loss(shape: Shape) -> list[Row]:
    """Measure the chunked loss, and full logits (without top-p and top-k) where these fit into memory."""
    least = FULL_COPIES * 4 * shape.vocabulary * shape.tokens
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    full = _measured(FULL, shape) if 2 * least < free else Row(FULL, least / GIB, None)
    return [_measured(CHUNKS, shape), full]


def show(shape: Shape, rows: list[Row], console: Console) -> None:
    """Print a table for people, then one JSON object per row."""
    table = Table("way", "extra memory GiB", "forward and backward s")
    for row in rows:
        seconds = "does not fit; size computed" if row.seconds is None else f"{row.seconds:.2f}"
        table.add_row(row.way, f"{row.extra_gib:.2f}", seconds)
    console.print(table)
    for row in rows:
        console.print_json(json.dumps(asdict(shape) | asdict(row)), indent=None)


def _measured(way: str, shape: Shape) -> Row:
    command = [sys.executable, "-m", "miles_spmd.bench.loss", way, json.dumps(asdict(shape))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Row(way, **json.loads(done.stdout))


def _measure(way: str, shape: Shape) -> dict[str, float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = {"device": device, "dtype": getattr(torch, shape.dtype)}
    hidden = torch.randn(shape.tokens, shape.hidden, **kind)
    weight = torch.randn(shape.vocabulary, shape.hidden, **kind).div_(shape.hidden**0.5)
    targets = torch.randint(shape.vocabulary, (shape.tokens,), device=device)
    loss = _chunks if way == CHUNKS else _full
    # Warm up: libraries initialise once, and kernels are compiled for this vocabulary.
    loss(hidden[:2].clone().requires_grad_(), weight.detach().requires_grad_(), targets[:2], shape).backward()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else psutil.Process().memory_info().rss
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    result = loss(hidden.requires_grad_(), weight.requires_grad_(), targets, shape)
    forward = _most_memory(device) - before
    result.backward()
    backward = _most_memory(device) - before - hidden.nbytes - weight.nbytes
    return {"extra_gib": max(forward, backward) / GIB, "seconds": clock() - start}


def _chunks(hidden: Tensor, weight: Tensor, targets: Tensor, shape: Shape) -> Tensor:
    distribution = Distribution(top_p=shape.top_p, top_k=shape.top_k)
    return linear_log_probs(hidden, OutputLayer(weight, len(weight)), targets, distribution)[0].mean()


def _full(hidden: Tensor, weight: Tensor, targets: Tensor, shape: Shape) -> Tensor:
    log_p = F.linear(hidden, weight).float().log_softmax(-1)
    with torch.no_grad():
        log_p.exp().mul_(log_p).sum(-1)  # the entropy
    return log_p.gather(1, targets[:, None]).mean()


def _most_memory(device: torch.device) -> int:
    if device.type == "cpu":
        # VmHWM: the peak of getrusage is inherited from the parent process.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], Shape(**json.loads(sys.argv[2])))))
