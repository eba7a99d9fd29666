"""Kernels of an engine that are compiled in parallel, before its first step needs them.

DeepGEMM chooses the tiles of a product by its shape and compiles a kernel for each choice when a product first needs
it, one after the other and four seconds each. The CUDA graphs of one model need about thirty, prefills and
micro-batches of training as many again. Several processes that only multiply fill the cache which the rank then reads.
They need a GPU, as DeepGEMM compiles nothing without one; this module therefore imports no more than they use.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

LONGEST = 120.0  # seconds, after which the engine compiles for itself what is missing
STRIDE = 8  # numbers between the beginnings of rows: the least that DeepGEMM accepts


class Product(NamedTuple):
    """A matrix [rows, inner] times the transpose of a weight [columns, inner], in bfloat16."""

    rows: int
    columns: int
    inner: int


def compile_products(products: Iterable[Product], device: int) -> None:
    """Let DeepGEMM's cache contain the kernels of ``products``. The first process of a node that asks for these
    compiles, on the GPU ``device``, and the others wait. What fails is left to be compiled when it is needed."""
    products = sorted(set(products))
    folder = Path(os.environ.get("DG_JIT_CACHE_DIR") or Path.home() / ".deep_gemm")
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / f"products-{hashlib.sha256(json.dumps(products).encode()).hexdigest()[:16]}"
    with done.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists() and _in_processes(products, device):
            done.touch()


def compile_beside(builds: Iterable[Callable[[], Any]]) -> list[threading.Thread]:
    """Call ``builds``, each of which waits for a compiler, in threads of their own."""
    threads = [threading.Thread(target=build, daemon=True) for build in builds]
    for thread in threads:
        thread.start()
    return threads


def _in_processes(products: list[Product], device: int) -> bool:
    """Divide ``products`` among as many processes as this one may use cores; return whether all of them succeeded."""
    # Products of nearly equal rows share a kernel, which processes that begin with them would compile at the same time.
    mixed = random.Random(0).sample(products, len(products))
    count = min(len(os.sched_getaffinity(0)), len(mixed))
    shares = [mixed[i::count] for i in range(count)]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment
        )
        for _ in shares
    ]
    until = time.monotonic() + LONGEST
    try:
        for worker, share in zip(workers, shares, strict=True):
            assert worker.stdin is not None
            with worker.stdin as pipe:
                pipe.write(json.dumps([device, share]).encode())
        return [worker.wait(max(0.0, until - time.monotonic())) for worker in workers] == [0] * count
    except (subprocess.TimeoutExpired, BrokenPipeError):
        return False
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def main() -> None:
    """Multiply once in each of the shapes that stdin names. Rows overlap, so that hardly any memory is needed."""
    device, products = json.load(sys.stdin)
    import deep_gemm
    import torch

    torch.cuda.set_device(device)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        numbers = torch.empty(rows * STRIDE + columns, dtype=torch.bfloat16, device="cuda")
        return numbers.as_strided((rows, columns), (STRIDE, 1))

    for product in map(Product._make, products):
        a, b = matrix(product.rows, product.inner), matrix(product.columns, product.inner)
        deep_gemm.bf16_gemm_nn(a, b.t(), matrix(product.rows, product.columns))


if __name__ == "__main__":
    main()
