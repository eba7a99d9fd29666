"""Rollouts alone, with the weights of the checkpoint: no rank trains."""

from __future__ import annotations

from contextlib import closing

from miles_spmd.controller.cluster.errors import Unfinished
from miles_spmd.controller.journal import events
from miles_spmd.controller.parts import GenerationParts
from miles_spmd.telemetry.responses import ResponseWriter


def generate(run: GenerationParts, first: int) -> str:
    """Write the samples that training would generate in the steps from ``first`` on if the weights did not change.
    Returns "", or where the run was requested to stop what is written."""
    steps = run.config.run.num_rollout
    run.stopping.begin(first)
    run.tracker.rewind(first)
    with closing(ResponseWriter(run.config.run_dir, first)) as responses:
        for step in range(first, steps):
            try:
                run.stopping.check()
                groups = run.generation.rollout(step)
            except Unfinished:
                return f"stopped by {run.stopping.source} in step {step}: the responses of the steps before are written"
            responses.write(step, groups)
            run.generation.forget()
            run.journal.publish(events.StepFinished(step))
            run.journal.report(step + 1)
    return ""
