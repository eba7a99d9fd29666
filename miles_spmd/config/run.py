"""The run (`[run]`), what it saves (`[checkpoint]`) and shows (`[telemetry]`), how long it waits (`[deadlines]`)."""

import importlib.util
from pathlib import Path
from typing import Literal

from miles_spmd.config.checks import ERRORS, FILES, Messages, Settings, rule
from miles_spmd.config.table import NonNegativeInt, PositiveFloat, PositiveInt, Table


class RunConfig(Table):
    mode: Literal["rl", "sft", "dpo", "rm"] = "rl"
    """`rl` generates responses and trains on their rewards; `sft` trains on the responses in the data; `dpo` trains the
    policy, and `rm` a reward model, on pairs of a preferred and a rejected response."""
    name: str = "run"
    """Name of the run and of its folder."""
    output_dir: Path = Path("runs")
    """The run writes everything into `output_dir/name`: resolved configuration, metrics.jsonl, checkpoints, report."""
    seed: int = 1234
    """All randomness (data order, sampling, initialisation) is a function of this number and of identities."""
    num_rollout: PositiveInt = 100
    """Number of rollouts (`rl`) or of optimizer steps (other modes) in the run."""


class CheckpointConfig(Table):
    save_interval: NonNegativeInt = 0
    """Write a resumable checkpoint every n rollouts; 0: only where `save_final` asks for one."""
    save_final: bool = False
    """Write a resumable checkpoint at the end of the run."""
    export_final: bool = True
    """Write a Hugging Face checkpoint at the end of the run."""
    export_dir: Path | None = None
    """Folder of the Hugging Face checkpoint; the default is `export/` in the run folder."""
    load: Path | None = None
    """A checkpoint folder of this project to resume from; `latest` inside the run folder when the run is restarted."""
    resume: bool = False
    """Continue from the run folder's newest checkpoint if there is one."""


@rule(FILES)
def _resumable(s: Settings) -> Messages:
    if s.load is not None and not s.load.is_dir():
        yield f"checkpoint.load: no folder {s.load}"


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


class DeadlinesConfig(Table):
    """Seconds after which the wait for something ends the run with a report of where each rank stands."""

    start_timeout: PositiveFloat = 900.0
    """Seconds until all ranks have joined the run and built trainer and engine."""
    rollout_timeout: PositiveFloat = 3600.0
    """Seconds of one rollout or evaluation."""
    train_timeout: PositiveFloat = 1800.0
    """Seconds of the training phase of one step, and of one call of your own function by the controller."""
    refit_timeout: PositiveFloat = 600.0
    """Seconds of one refit."""
    checkpoint_timeout: PositiveFloat = 1800.0
    """Seconds in which a checkpoint is written, loaded or exported."""
    heartbeat_timeout: PositiveFloat = 60.0
    """Seconds without a heartbeat of a rank after which it counts as lost."""
