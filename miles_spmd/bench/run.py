"""Measurements of parts: each runs in ranks that a launcher has started, as training does."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from miles_spmd.bench.result import Result, make_result, show
from miles_spmd.config import Config
from miles_spmd.config.checks import decide_parity
from miles_spmd.config.load import make_tables
from miles_spmd.models.random import write_random_checkpoints
from miles_spmd.telemetry.environment import gpus
from miles_spmd.types.files import write_whole

ENGINES = ("refit", "sleep", "rollout")  # the measurements that build an engine


def bench_config(model: str, overrides: list[str], world_size: int) -> Config:
    """Return the configuration of a run without data. Raises ConfigError."""
    raw: dict[str, Any] = {
        "model": {"hf_checkpoint": model},
        "data": {"prompt_data": "none"},
        # Measurements have lengths of their own. An engine sizes its cache by these: 24 sequences of a micro-batch.
        "rollout": {"rollout_batch_size": 12, "n_samples_per_prompt": 2, "rollout_max_response_len": 1},
        "megatron": {"lr": 1e-6, "clip_grad": 1.0},
    }
    return make_tables(Config, raw, overrides, source="bench", world_size=world_size, check_files=False)


def run_bench(name: str, model: str, config: Config, options: dict[str, Any], out: Path | None) -> None:
    """Measure with ``miles_spmd.bench.NAME``; the first rank prints the result, and writes it to ``out`` as JSON."""
    from miles_spmd.bench import machine
    from miles_spmd.platform import cpu

    config, _ = decide_parity(config, {gpu.capability for gpu in gpus()})  # as a run does
    write_random_checkpoints(config.model.checkpoints)
    cpu.install()
    from miles_spmd.worker.worker import make_engine

    machine.join()
    with_engine = {"make_engine": make_engine} if name in ENGINES else {}
    rows = importlib.import_module(f"miles_spmd.bench.{name}").measure(config, **with_engine, **options)
    if os.environ["RANK"] == "0":
        decided = {"dtype": config.model.dtype, "parity": config.determinism.parity}
        settings = {**decided, "megatron": config.megatron, "sglang": config.sglang, **options}
        publish(make_result(name, model, int(os.environ["WORLD_SIZE"]), settings, rows), out)
    machine.leave()


def publish(result: Result, out: Path | None) -> None:
    show(result, Console())
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, msgspec.json.format(msgspec.json.encode(result)))
