"""The run (`[run]`), what it saves (`[checkpoint]`) and shows (`[telemetry]`), how long it waits (`[deadlines]`)."""

import importlib.util
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from miles_spmd.config.checks import ERRORS, FILES, Messages, Settings, rule
from miles_spmd.config.table import FolderName, NonNegativeInt, PositiveInt, Seconds, Table, plug_point, without_slice
from miles_spmd.models.export_folder import foreign_files

HEARTBEAT_EVERY = 1.0  # seconds between the heartbeats of a rank


class RunConfig(Table):
    mode: Literal["rl", "sft", "dpo", "rm"] = "rl"
    """`rl` generates responses and trains on their rewards; `sft` trains on the responses in the data; `dpo` trains the
    policy, and `rm` a reward model, on pairs of a preferred and a rejected response."""
    name: FolderName = "run"
    """Name of the run and of its folder, which is in `output_dir`."""
    output_dir: Path = Path("runs")
    """The run writes everything into `output_dir/name`: resolved configuration, metrics.jsonl, checkpoints, report."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    """All randomness (data order, sampling, initialisation) is a function of this number and of identities."""
    kernel_cache: Path | None = None
    """Folder that all nodes share, in which compiled kernels are kept for the next start; the default is in the user's
    cache directory (`XDG_CACHE_HOME`). Each node works with a copy on its own disk, in `TMPDIR`."""
    overwrite: bool = False
    """Delete what an earlier run has left in the run folder: results, checkpoints, export, and its attempts with their
    logs. Without it, and without `checkpoint.resume`, a run does not start in a folder that has results."""
    num_rollout: PositiveInt = 100
    """Number of rollouts (`rl`) or of optimizer steps (other modes) in the run."""
    phase_hook: Annotated[str, plug_point()] | None = None
    """Plug point: is called on the controller before and after each phase."""


class CheckpointConfig(Table):
    save_interval: NonNegativeInt = 0
    """Write a resumable checkpoint every n rollouts, beside the training; 0: only where `save_final`, or a file `save`
    in the run folder, asks for one."""
    save_final: bool = False
    """Write a resumable checkpoint at the end of the run."""
    keep_last: NonNegativeInt = 0
    """Keep the newest n checkpoints of the run and remove older ones; 0: keep all. With 1, a checkpoint that turns out
    damaged leaves nothing to resume from: prefer 2 or more."""
    keep_every: NonNegativeInt = 0
    """With `keep_last`, also keep checkpoints whose step is a multiple of n."""
    keep_best: str | None = None
    """With `keep_last`, also keep the checkpoint with the highest value of this metric of an evaluation, such as
    `eval/heldout`. Checkpoints of steps without an evaluation do not take part."""
    export_final: bool = True
    """Write a Hugging Face checkpoint at the end of the run."""
    export_dir: Path | None = None
    """Folder of the Hugging Face checkpoint; the default is `export/` in the run folder. An existing folder is replaced
    only if it is empty or holds nothing but an earlier export."""
    exporter: Annotated[str, plug_point()] | None = None
    """Plug point: is given the Hugging Face checkpoint at the end of the run, once it is complete."""
    load: Path | None = None
    """A checkpoint folder of this project to resume from. If it cannot be loaded, the run ends. With `resume`, only
    where the run folder has no checkpoint of its own."""
    resume: bool = False
    """Continue from the run folder's newest checkpoint that can be loaded, if it has one; what is wrong with newer ones
    is a warning. `miles-spmd eval` scores the newest checkpoint."""


@rule(ERRORS)
def _best_of_an_evaluation(s: Settings) -> Messages:
    if s.keep_best is None:
        return
    names = [f"eval/{name}" for name in (*s.eval_prompt_data, *(one.name for one in s["eval.sets"]))]
    if not any(s.keep_best == name or s.keep_best.startswith(f"{name}-") for name in names):
        known = ", ".join(names) or "none: set eval.eval_prompt_data"
        yield f"checkpoint.keep_best: {s.keep_best!r} is not a metric of an evaluation set (there are {known})"


@rule(FILES)
def _resumable(s: Settings) -> Messages:
    if s.load is not None and not s.load.is_dir():
        yield f"checkpoint.load: no folder {s.load}"


@rule(FILES)
def _export_folder(s: Settings) -> Messages:
    if s.export_final:
        yield from export_errors(s)


def export_errors(s: Settings) -> Messages:
    """Why the Hugging Face checkpoint cannot be written where it is to be. Paths are compared as the folders that they
    lead to, whatever they are called."""
    run_dir = s["run.output_dir"] / s["run.name"]
    folder = (s.export_dir or run_dir / "export").resolve()
    models = {f"model.{name}": s[name] for name in ("hf_checkpoint", "ref_load", "critic_load", "teacher_load")}
    read_only = models | {"checkpoint.load": s.load, "the run's checkpoints": run_dir / "checkpoints"}
    sets = {f"eval.eval_prompt_data.{name}": path for name, path in s.eval_prompt_data.items()}
    data = {"data.prompt_data": s.prompt_data} | sets
    holds = {"the run's folder": run_dir}
    holds |= {name: Path(without_slice(path)) for name, path in data.items()}
    for name, path in (holds | read_only).items():
        used = path and path.resolve()
        if used and (used == folder or folder in used.parents or (name in read_only and used in folder.parents)):
            yield f"checkpoint.export_dir: {folder} overlaps with {name}, {used}; name a folder of its own"
            return
    above = next(parent for parent in folder.parents if parent.exists())
    if not above.is_dir() or (folder.exists() and not folder.is_dir()):
        yield f"checkpoint.export_dir: {folder if folder.exists() else above} is a file; name a folder"
    elif not os.access(above, os.W_OK | os.X_OK):
        yield f"checkpoint.export_dir: {above} is not writable; name another folder or change its permissions"
    elif foreign := foreign_files(folder):
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        yield (
            f"checkpoint.export_dir: {folder} holds files that no export wrote or that were changed since "
            f"({', '.join(foreign[:3])}{more}); name a new or empty folder, or move them away"
        )


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
    tracker: Annotated[str, plug_point()] | None = None
    """Plug point: makes a further tracker of metrics."""
    num_transcripts: NonNegativeInt = 8
    """Number of samples kept of each evaluation set for the report. With 0 no training responses are kept either."""


@rule(ERRORS)
def _wandb_is_installed(s: Settings) -> Messages:
    if s.use_wandb and importlib.util.find_spec("wandb") is None:
        yield "telemetry.use_wandb: the package wandb is not installed: pip install 'miles-spmd[wandb]'"


class DeadlinesConfig(Table):
    """Seconds after which the wait for something ends the run with a report of where each rank stands."""

    start_timeout: Seconds = 900.0
    """Seconds until all ranks have joined the run and built trainer and engine."""
    rollout_timeout: Seconds = 3600.0
    """Seconds of one rollout or evaluation."""
    engine_step_timeout: Seconds = 300.0
    """Seconds of one step of an engine, which is one forward pass for all running requests."""
    train_timeout: Seconds = 1800.0
    """Seconds of the training phase of one step, and of one call of your own function by the controller."""
    refit_timeout: Seconds = 600.0
    """Seconds of one refit."""
    checkpoint_timeout: Seconds = 1800.0
    """Seconds in which a checkpoint is written, loaded or exported."""
    heartbeat_timeout: Seconds = 60.0
    """Seconds without a heartbeat of a rank after which it counts as lost."""


def too_short(silence: float) -> str:
    """Return in words why ranks would be lost that live, if a rank is after so many seconds of silence."""
    if silence >= 2 * HEARTBEAT_EVERY:
        return ""
    least, every = f"{2 * HEARTBEAT_EVERY:g}", f"{HEARTBEAT_EVERY:g}"
    return f"must be at least {least}, got {silence:g}: ranks send a heartbeat every {every} s"


@rule(ERRORS)
def _heartbeats_come_in_time(s: Settings) -> Messages:
    if problem := too_short(s.heartbeat_timeout):
        yield f"deadlines.heartbeat_timeout: {problem}"
