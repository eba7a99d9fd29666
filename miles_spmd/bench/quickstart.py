"""Time of a GRPO step on this machine, by phase, at two model sizes, and on request that of TRL; wall and CPU seconds.

A step has 16 prompts of 12 tokens, 8 samples each, 24 tokens per response and one optimizer step in fp32. No model has
an end-of-sequence token, so every response is 24 tokens long in both systems.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import tomli_w
from rich.console import Console
from rich.table import Table

from miles_spmd.bench.checkpoint import VOCABULARY, write_random_checkpoint
from miles_spmd.telemetry.metrics import phase_times
from miles_spmd.telemetry.trackers import read_metrics
from miles_spmd.types.run_files import METRICS_FILE

PROMPTS, SAMPLES, PROMPT_TOKENS, RESPONSE_TOKENS = 16, 8, 12, 24
WARM_UP_STEPS = 3
CPU_SECONDS_EVERY = 0.02  # seconds between looks at the processes' CPU time, a small part of a step


@dataclass(frozen=True)
class Size:
    name: str
    hidden_size: int
    num_layers: int
    intermediate_size: int


SIZES = (Size("0.2M", 64, 2, 256), Size("5M", 256, 6, 768))


@dataclass(frozen=True)
class Row:
    """Median seconds of a step: wall time, and CPU time of all processes and threads."""

    system: str
    size: str
    processes: int
    step: float
    cpu: float
    phases: dict[str, float]


def bench_quickstart(ranks: int, steps: int, trl_python: Path | None) -> list[Row]:
    """Measure every size with ``ranks`` ranks, and with TRL under the interpreter ``trl_python`` if given."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="miles-spmd-bench-") as scratch:
        for size in SIZES:
            folder = Path(scratch) / size.name
            write_random_checkpoint(folder / "model", size.hidden_size, size.num_layers, size.intermediate_size)
            _write_prompts(folder / "prompts.jsonl")
            rows.append(_ours(size, folder, ranks, steps))
            if trl_python is not None:
                rows.append(_trl(size, folder, trl_python, steps))
    return rows


def show(rows: list[Row], console: Console) -> None:
    """Print a table for people, then one JSON object per row."""
    phases = list(dict.fromkeys(phase for row in rows for phase in row.phases))
    header = (
        "model",
        "system",
        "processes",
        "step s",
        "CPU s",
        *(f"{phase} s" for phase in phases),
        "ratio",
        "CPU ratio",
    )
    table = Table(*header)
    ours = {row.size: row for row in rows if row.system == "miles_spmd"}
    for row in rows:
        cells = [f"{row.phases[phase]:.3f}" if phase in row.phases else "" for phase in phases]
        ratios = row.step / ours[row.size].step, row.cpu / ours[row.size].cpu
        times = f"{row.step:.3f}", f"{row.cpu:.3f}", *cells, *(f"{ratio:.2f}" for ratio in ratios)
        table.add_row(row.size, row.system, str(row.processes), *times)
    console.print(table)
    for row in rows:
        console.print_json(json.dumps(asdict(row)), indent=None)


def _ours(size: Size, folder: Path, ranks: int, steps: int) -> Row:
    config = folder / "config.toml"
    config.write_text(tomli_w.dumps(_config(folder, steps)))
    launched = [sys.executable, "-m", "miles_spmd", "train", str(config), f"--nproc-per-node={ranks}"]
    file = folder / "run" / METRICS_FILE
    spent: dict[int, float] = {}  # CPU seconds when a step was first seen to be finished
    with subprocess.Popen(launched, stdout=subprocess.DEVNULL) as process:
        tree: list[psutil.Process] = []
        while process.poll() is None:
            step = max(read_metrics(file), default=0) if file.exists() else 0
            if step and not tree:  # all processes are there
                tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            spent.setdefault(step, _cpu_seconds(tree))
            time.sleep(CPU_SECONDS_EVERY)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, launched)
    ends = [seconds for step, seconds in spent.items() if step >= WARM_UP_STEPS]
    cpu = statistics.median(after - before for before, after in pairwise(ends))
    measured = [metrics for step, metrics in read_metrics(file).items() if step > WARM_UP_STEPS]
    times: list[Mapping[str, float]] = [phase_times(metrics) for metrics in measured]
    phases = {phase: statistics.median(t[phase] for t in times) for phase in times[0]}
    return Row("miles_spmd", size.name, ranks, statistics.median(m["perf/step_time"] for m in measured), cpu, phases)


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _trl(size: Size, folder: Path, python: Path, steps: int) -> Row:
    script = Path(__file__).with_name("peer_trl.py")
    arguments = [str(folder / "model"), str(folder / "prompts.jsonl"), str(PROMPTS), str(SAMPLES), str(RESPONSE_TOKENS)]
    done = subprocess.run(
        [str(python), str(script), *arguments, str(steps + WARM_UP_STEPS)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    wall, cpu = zip(*json.loads(done.stdout.splitlines()[-1])[WARM_UP_STEPS - 1 :])
    return Row("TRL", size.name, 1, statistics.median(wall), statistics.median(cpu), {})


def _config(folder: Path, steps: int) -> dict[str, object]:
    return {
        "run": {"name": "run", "output_dir": str(folder), "num_rollout": steps + WARM_UP_STEPS},
        "model": {"hf_checkpoint": str(folder / "model"), "dtype": "float32"},
        "data": {"prompt_data": str(folder / "prompts.jsonl")},
        "rollout": {
            "rollout_batch_size": PROMPTS,
            "n_samples_per_prompt": SAMPLES,
            "rollout_max_response_len": RESPONSE_TOKENS,
        },
        "reward": {"rm_type": "exact"},
        "checkpoint": {"export_final": False},
        "telemetry": {"progress": "none"},
        "megatron": {"lr": 1e-4, "clip_grad": 1.0, "weight_decay": 0.0},
    }


def _write_prompts(path: Path) -> None:
    rows = [
        {"prompt": " ".join(str((i * 7 + j * 3) % VOCABULARY) for j in range(PROMPT_TOKENS)), "label": ""}
        for i in range(16 * PROMPTS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
