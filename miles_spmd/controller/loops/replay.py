"""Steps of a finished or stopped run, done again: planning them, and the loops that do them."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Literal

from miles_spmd.config import Config
from miles_spmd.config.load import ConfigError, load_config
from miles_spmd.config.rollout import TIMED_ACCEPTANCE
from miles_spmd.controller.checkpoint_folders import newest, read
from miles_spmd.controller.journal import events
from miles_spmd.controller.loops.sync import advance
from miles_spmd.controller.parts import RunParts
from miles_spmd.controller.run_folder import in_folder, override
from miles_spmd.ledger import step_data
from miles_spmd.ledger.chain import LedgerError, links
from miles_spmd.ledger.entries import Step
from miles_spmd.protocol.pipe import Replay
from miles_spmd.telemetry.trackers import read_metrics
from miles_spmd.types.run_files import CONFIG_FILE, METRICS_FILE


def replay(run: RunParts, order: Replay) -> None:
    """Do the steps again, up to the one that was ordered, into a ledger of their own."""
    run.refit()
    for step in range(run.first, order.step + 1):
        if step == order.step and order.phase == "rollout":
            run.samples.rollout(step)
        else:
            advance(run, step)
        run.journal.publish(events.StepFinished(step))


def bisect(run: RunParts, order: Replay) -> None:
    """Do the steps before the ordered one again, and print the first operator whose output differs between engine and
    trainer, for the first token of its rollout whose log-probs differ."""
    run.refit()
    for step in range(run.first, order.step):
        advance(run, step)
    samples = list(chain.from_iterable(run.samples.rollout(order.step)))
    for policy in run.policies:
        print(policy.bisect(order.step, policy.own(samples), run.generation.request), flush=True)


def plan(run_dir: Path, step: int, phase: Literal["rollout", "train"] | None) -> tuple[Replay, list[str]]:
    """Return the order of a replay, and the overrides of the run's configuration for it. Raises LedgerError where the
    run cannot be replayed."""
    done = [link.entry.step for link in links(run_dir) if isinstance(link.entry, Step)]
    if step not in done:
        has = f"steps {done[0]} to {done[-1]}" if done else "no complete step"
        raise LedgerError(f"{run_dir} has no step {step}: its ledger has {has}")
    if phase == "rollout":
        _require_responses(run_dir, "leave out --phase")
    if phase != "train":
        _require_rollouts_that_repeat(run_dir)
    checkpoint = newest(run_dir, up_to=step)
    first = done[0] if checkpoint is None else read(checkpoint).step
    missing = [s for s in range(first, step + 1) if phase == "train" and not step_data.path_of(run_dir, s).is_file()]
    if missing:
        raise LedgerError(
            f"{run_dir}: the responses of step {missing[0]} were not kept, see determinism.ledger_data_gib; leave out "
            "--phase"
        )
    return Replay(str(run_dir), first, step, phase), _overrides(run_dir, f"replay-{step}", checkpoint)


def plan_bisection(run_dir: Path, step: int) -> tuple[Replay, list[str]]:
    """Return the same for the steps before ``step`` and its rollout; the run need not have finished that step. Raises
    LedgerError where it did not begin it."""
    _require_responses(run_dir, "bisect a run with run.mode = 'rl'")
    steps = _begun(run_dir)
    if step >= steps:
        raise LedgerError(f"{run_dir} has no step {step}: it has begun the steps 0 to {steps - 1}")
    checkpoint = newest(run_dir, up_to=step)
    first = 0 if checkpoint is None else read(checkpoint).step
    # Operators are observed by hooks of their modules, which neither CUDA graphs nor sharded activations call.
    observable = ["sglang.disable_cuda_graph=true", "megatron.sequence_parallel=false"]
    overrides = [*_overrides(run_dir, f"bisect-{step}", checkpoint), *observable, "determinism.parity_gate=warn"]
    return Replay(str(run_dir), first, step, "rollout"), overrides


def _begun(run_dir: Path) -> int:
    """Return how many steps the run in ``run_dir`` has begun, by its metrics."""
    try:
        reported = read_metrics(run_dir / METRICS_FILE)
    except OSError as error:
        raise LedgerError(f"{run_dir} has no metrics: {error}") from None
    # metrics are reported before the first step and after each; the step after the last report may have failed
    return min(max(reported, default=0) + 1, _config(run_dir).run.num_rollout)


def _require_rollouts_that_repeat(run_dir: Path) -> None:
    """Raise LedgerError where it depended on time which responses a step of the run in ``run_dir`` trained on."""
    rollout = _config(run_dir).rollout
    acceptance, partial = rollout.acceptance, rollout.partial_rollout
    if partial or acceptance in TIMED_ACCEPTANCE:
        raise LedgerError(
            f"{run_dir}: which responses a step trained on depended on time (rollout.acceptance = {acceptance!r}, "
            f"partial_rollout = {str(partial).lower()}); --phase train repeats its update with those that were kept"
        )


def _require_responses(run_dir: Path, remedy: str) -> None:
    """Raise LedgerError where the run in ``run_dir`` has generated none."""
    if (mode := _config(run_dir).run.mode) != "rl":
        raise LedgerError(f"{run_dir} is a run with run.mode = {mode!r}, which generates no responses; {remedy}")


def _config(run_dir: Path) -> Config:
    """Return a run's configuration. Raises LedgerError where it has errors or cannot be read."""
    try:
        return load_config(run_dir / CONFIG_FILE, check_files=False)
    except ConfigError as error:
        raise LedgerError(str(error)) from None


def _overrides(run_dir: Path, name: str, checkpoint: Path | None) -> list[str]:
    overrides = [
        *in_folder(run_dir, f"-{name}"),
        "telemetry.use_tensorboard=false",
        "telemetry.use_wandb=false",
        "eval.eval_interval=0",
        "eval.sets=[]",
        "checkpoint.save_interval=0",
        "checkpoint.save_final=false",
        "checkpoint.export_final=false",
        "checkpoint.resume=false",
        "determinism.ledger=true",
    ]
    if checkpoint is not None:
        overrides.append(override("checkpoint.load", checkpoint.absolute()))
    return overrides
