"""Speed of generation, compared with plain ``sglang.Engine`` and its own processes on the same requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from miles_spmd.bench.machine import slowest, stage, timed
from miles_spmd.bench.result import Row
from miles_spmd.bench.workload import generate, random_requests
from miles_spmd.config import Config
from miles_spmd.generation.engine import Engine
from miles_spmd.models import load_family


def measure(
    config: Config,
    make_engine: Callable[[Config], Engine],
    prompts: int,
    prompt_tokens: int,
    response_tokens: int,
    repeats: int,
    peer: bool,
) -> list[Row]:
    """Measure the tokens per second of one engine; the other engines run the same requests. Collective. The engine has
    released its memory afterwards."""
    vocab_size = load_family(config.model.hf_checkpoint).vocab_size
    requests = random_requests(prompts, prompt_tokens, response_tokens, vocab_size)
    stage("building the engine")
    engine = make_engine(config)
    stage(f"generating {prompts} x {response_tokens} tokens")
    generate(engine, requests[:4])
    seconds = []
    for _ in range(repeats):
        engine.commit(0)  # empties the prefix cache
        seconds.append(timed(lambda: generate(engine, requests))[0])
    engine.release()
    ours = slowest(seconds)
    rows: list[Row] = [{"system": "miles_spmd", "s": ours, "tokens/s": prompts * response_tokens / ours, "ratio": 1.0}]
    if peer:
        stage("the same with plain sglang.Engine")
        dist.barrier()
        if dist.get_rank() == 0:
            job = {
                "server_args": config.sglang
                | {"model_path": str(config.model.hf_checkpoint), "dtype": config.model.dtype},
                "prompts": [request.input_ids for request in requests],
                "response_tokens": response_tokens,
                "repeats": repeats,
            }
            theirs = _peer(job)
            rows.append(
                {
                    "system": "sglang.Engine",
                    "s": theirs,
                    "tokens/s": prompts * response_tokens / theirs,
                    "ratio": ours / theirs,
                }
            )
        dist.barrier()
    return rows


def _peer(job: dict[str, object]) -> float:
    """Return the median seconds of ``sglang.Engine`` in a process without the variables of our launchers."""
    script = Path(__file__).with_name("peer_sglang.py")
    launcher = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL",
        "GROUP",
        "ROLE",
        "MASTER",
        "TORCHELASTIC",
        "LD_PRELOAD",
        "CUDA_DEVICE_MAX",
        "NCCL_",
        "PYTORCH_",
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        command = [sys.executable, str(script), file.name]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])
