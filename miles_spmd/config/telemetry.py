"""`[telemetry]`: what a run shows of itself."""

from __future__ import annotations

import importlib.util
from typing import Literal

from miles_spmd.config.rules import ERRORS, Messages, Settings, rule
from miles_spmd.config.table import NonNegativeInt, Table


class TelemetryConfig(Table):
    progress: Literal["auto", "rich", "plain", "none"] = "auto"
    """Progress on the terminal: a live bar, lines, or nothing. `auto`: `rich` on a terminal, else `plain`.
    """
    use_tensorboard: bool = False
    """Also write metrics as TensorBoard events into the run folder."""
    use_wandb: bool = False
    """Also send metrics to Weights & Biases, which needs the package wandb."""
    wandb_project: str = "miles-spmd"
    """Project of Weights & Biases that the run belongs to."""
    num_transcripts: NonNegativeInt = 8
    """Number of samples kept of each evaluation for the report."""


@rule(ERRORS)
def _wandb_is_installed(s: Settings) -> Messages:
    if s.use_wandb and importlib.util.find_spec("wandb") is None:
        yield "telemetry.use_wandb: the package wandb is not installed: pip install 'miles-spmd[wandb]'"
