"""The quickstart's recipes on GPUs, through the command line: it learns, and engine and trainer agree meanwhile."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from miles_spmd.config.load import load_config
from miles_spmd.quickstart.__main__ import GRPO
from miles_spmd.telemetry.metrics import phase_times
from miles_spmd.telemetry.trackers import METRICS_FILE, read_metrics
from tests.gpu import machine
from tests.ranks import free_port

STEPS = 30
TP2 = ["megatron.tensor_model_parallel_size=2"]
BOTH_TP2 = [*TP2, "megatron.sequence_parallel=true", "sglang.tp_size=2"]
# |engine - trainer| log-prob. fp32: two programs; bf16: a logit of 16 is rounded by up to 0.06, and how far the few
# least likely of 40,000 tokens are apart differs between runs by a factor of three, so the mean is bounded alone.
MEAN = {"float32": 1e-6, "bfloat16": 0.01}
LARGEST_FP32 = 1e-4


def train(recipe: Path, folder: Path, name: str, ranks: int, *overrides: str) -> dict[int, dict[str, float]]:
    """The metrics of a run in ``folder``/``name``."""
    command = [sys.executable, "-m", "miles_spmd", "train", str(recipe), f"--nproc-per-node={ranks}"]
    settings = [*run_settings(folder, name), *overrides]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}\n{logs(folder / name)}"
    return read_metrics(folder / name / METRICS_FILE)


def run_settings(folder: Path, name: str) -> list[str]:
    return [f"run.output_dir={folder}", f"run.name={name}", "telemetry.progress=plain"]


def logs(run: Path) -> str:
    return "".join(f"{log.name}:\n{log.read_text()[-3000:]}\n" for log in (run / "logs" / "latest").glob("*.log"))


@pytest.mark.parametrize(
    ("ranks", "dtype", "layout"),
    [
        pytest.param(1, "bfloat16", [], marks=machine.needs(1)),
        pytest.param(1, "float32", [], marks=machine.needs(1)),
        pytest.param(2, "bfloat16", BOTH_TP2, marks=machine.needs(2)),
        pytest.param(2, "float32", TP2, marks=machine.needs(2)),
        pytest.param(2, "float32", ["megatron.use_distributed_optimizer=true"], marks=machine.needs(2)),
        pytest.param(2, "bfloat16", ["megatron.context_parallel_size=2"], marks=machine.needs(2)),
        pytest.param(2, "float32", ["megatron.pipeline_model_parallel_size=2"], marks=machine.needs(2)),
    ],
)
def test_grpo_learns(warm: Path, ranks: int, dtype: str, layout: list[str]) -> None:
    learns(warm, ranks, dtype, layout)


def learns(warm: Path, ranks: int, dtype: str, layout: list[str]) -> None:
    """Train, show what was measured, and check that it went as it must."""
    name = "-".join(["grpo", str(ranks), dtype, *(word.partition(".")[2].replace("=", "") for word in layout)])
    metrics = grpo(warm, name, ranks, STEPS, f"model.dtype={dtype}", *layout)
    rewards, scores = series(metrics, "rollout/raw_reward"), series(metrics, "eval/heldout")
    largest, mean = (series(metrics, f"train/train_rollout_logprob_abs_diff{kind}") for kind in ("_max", ""))
    times: list[dict[str, Any]] = [phase_times(m) for step, m in metrics.items() if step > 5]
    machine.measured(
        f"GRPO of the quickstart, {name}",
        {
            "reward, first 5 steps": statistics.mean(rewards[:5]),
            "reward, last 5 steps": statistics.mean(rewards[-5:]),
            "held out, before": scores[0],
            "held out, after": scores[-1],
            "largest |engine - trainer| log-prob": max(largest),
            "mean |engine - trainer| log-prob": statistics.mean(mean),
            "start, s": metrics[0]["perf/start_time"],
            "step, s": statistics.median(series(metrics, "perf/step_time")[5:]),
        }
        | {f"{phase}, s": statistics.median(t[phase] for t in times) for phase in ("rollout", "train", "refit")},
    )
    assert len(rewards) == STEPS
    assert statistics.mean(rewards[-5:]) > statistics.mean(rewards[:5]) + 0.2
    assert scores[-1] > scores[0] + 0.3
    if load_config(warm / name / "config.toml").determinism.parity == "bitwise":
        assert min(series(metrics, "parity/tokens")) > 0
        assert max(series(metrics, "parity/mismatches")) == max(largest) == 0
    else:
        assert 0 < statistics.mean(mean) < MEAN[dtype]
        assert dtype != "float32" or max(largest) < LARGEST_FP32
    assert set(series(metrics, "refit/checksum_mismatches")) == {0.0}
    assert (warm / name / "export" / "model.safetensors").is_file()


@machine.needs(2)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a process another host name")
def test_two_nodes(warm: Path) -> None:
    """On one machine: a launcher for each, with a GPU and a host name of its own, so that weights cross by NCCL."""
    meet = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    meet |= {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    renamed = ["unshare", "--uts", "bash", "-c", 'hostname "$0" && exec "$@"']
    command = ["launch/torchrun.sh", str(GRPO), *grpo_settings(warm, 4), *TP2, "model.dtype=float32"]
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    nodes = [
        subprocess.Popen(
            [*renamed, f"node{rank}", *command, *run_settings(warm, "nodes")],
            env=os.environ | meet | {"NODE_RANK": str(rank), "CUDA_VISIBLE_DEVICES": gpus[rank]},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for node in nodes:
        _, error = node.communicate(timeout=240)
        assert node.returncode == 0, error[-4000:] + logs(warm / "nodes")
    metrics = read_metrics(warm / "nodes" / METRICS_FILE)
    assert " node1 " in (warm / "nodes" / "logs" / "latest" / "rank-1.log").read_text()
    assert max(series(metrics, "train/train_rollout_logprob_abs_diff_max")) < LARGEST_FP32
    assert set(series(metrics, "refit/checksum_mismatches")) == {0.0}
    machine.measured(
        "GRPO of the quickstart, two nodes", {"refit, s": statistics.median(series(metrics, "perf/refit_time")[1:])}
    )


@machine.needs(1)
def test_resumes_where_it_was(warm: Path) -> None:
    stopped = grpo(warm, "resumed", 1, 2, "model.dtype=float32")
    resumed = grpo(warm, "resumed", 1, 4, "model.dtype=float32", "checkpoint.resume=true")
    assert list(resumed) == [0, 1, 2, 3, 4]
    assert resumed[2]["eval/heldout"] == stopped[2]["eval/heldout"]  # of the resumed run: the later line wins
    assert resumed[2]["time"] > stopped[2]["time"]
    assert max(series(resumed, "train/train_rollout_logprob_abs_diff_max")) < LARGEST_FP32


def grpo(warm: Path, name: str, ranks: int, steps: int, *overrides: str) -> dict[int, dict[str, float]]:
    """Train on the quickstart's prompts from its warmed-up model; evaluate and save at the end."""
    return train(GRPO, warm, name, ranks, *grpo_settings(warm, steps), *overrides)


def grpo_settings(warm: Path, steps: int) -> list[str]:
    return [
        f"model.hf_checkpoint={warm}/sft/export",
        f"data.prompt_data={warm}/assets/train.jsonl",
        f'eval.eval_prompt_data={{ heldout = "{warm}/assets/heldout.jsonl" }}',
        f"run.num_rollout={steps}",
        f"eval.eval_interval={steps}",
        f"checkpoint.save_interval={steps}",
        *(f"sglang.{key}={value}" for key, value in machine.ENGINE.items()),
    ]


def series(metrics: dict[int, dict[str, float]], name: str) -> list[float]:
    return [values[name] for values in metrics.values() if name in values]
