"""Steps of a finished or stopped run, done again: from which checkpoint, and with what changed in its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from miles_spmd.controller import checkpoints
from miles_spmd.ledger import step_data
from miles_spmd.ledger.chain import LedgerError, links
from miles_spmd.ledger.entries import Step
from miles_spmd.protocol.order import Replay


def plan(run_dir: Path, step: int, phase: Literal["rollout", "train"] | None) -> tuple[Replay, list[str]]:
    """What to do, and the overrides of the run's configuration for it. Raises LedgerError where that cannot be."""
    done = [link.entry.step for link in links(run_dir) if isinstance(link.entry, Step)]
    if step not in done:
        has = f"steps {done[0]} to {done[-1]}" if done else "no complete step"
        raise LedgerError(f"{run_dir} has no step {step}: its ledger has {has}")
    checkpoint = checkpoints.newest(run_dir, up_to=step)
    first = done[0] if checkpoint is None else checkpoints.read(checkpoint).step
    missing = [s for s in range(first, step + 1) if phase == "train" and not step_data.path_of(run_dir, s).is_file()]
    if missing:
        raise LedgerError(
            f"{run_dir}: the answers of step {missing[0]} were not kept, see determinism.ledger_data_gib; leave out "
            "--phase"
        )
    return Replay(str(run_dir), first, step, phase), _overrides(run_dir, f"replay-{step}", checkpoint)


def plan_bisection(run_dir: Path, step: int) -> tuple[Replay, list[str]]:
    """As :func:`plan`, of the steps before ``step``, which need not have ended, and of its rollout."""
    checkpoint = checkpoints.newest(run_dir, up_to=step)
    first = 0 if checkpoint is None else checkpoints.read(checkpoint).step
    graphs = ["sglang.disable_cuda_graph=true", "megatron.sequence_parallel=false"]  # of which no module is told
    overrides = [*_overrides(run_dir, f"bisect-{step}", checkpoint), *graphs, "determinism.parity_gate=warn"]
    return Replay(str(run_dir), first, step, "rollout"), overrides


def _overrides(run_dir: Path, name: str, checkpoint: Path | None) -> list[str]:
    overrides = [
        f"run.output_dir={run_dir.absolute().parent}",
        f"run.name={run_dir.absolute().name}-{name}",
        "telemetry.use_tensorboard=false",
        "telemetry.use_wandb=false",
        "eval.eval_interval=0",
        "checkpoint.save_interval=0",
        "checkpoint.save_final=false",
        "checkpoint.export_final=false",
        "checkpoint.resume=false",
        "determinism.ledger=true",
    ]
    if checkpoint is not None:
        overrides.append(f"checkpoint.load={checkpoint.absolute()}")
    return overrides
