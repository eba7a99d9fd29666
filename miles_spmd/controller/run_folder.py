"""The folder of a run before anything is written into it: whether a run may begin there, and the lock that holds it.

A folder with results of an earlier run is not touched unless the configuration says what is to become of them:
``checkpoint.resume`` continues them, ``run.overwrite`` deletes them. What a run left that failed before its first
result is in nobody's way.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import socket
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any, TextIO

from miles_spmd.config import Config
from miles_spmd.config.load import dump_config, load_config
from miles_spmd.config.second_policy import SecondPolicyConfig
from miles_spmd.controller.attempts import LOGS, leftovers, slurm_job
from miles_spmd.controller.checkpoint_folders import EXPORT, INCOMPLETE, STATE_FILE, newest, unfinished
from miles_spmd.controller.checkpoint_folders import FOLDER as CHECKPOINTS
from miles_spmd.ledger.chain import FOLDER as LEDGER
from miles_spmd.ledger.compare import LAYOUT
from miles_spmd.platform.kernel_cache import shared_folder
from miles_spmd.telemetry.environment import ENVIRONMENT_FILE, read_environment, write_environment
from miles_spmd.telemetry.report import REPORT_FILE, write_report
from miles_spmd.telemetry.responses import RESPONSES_FILE
from miles_spmd.telemetry.stragglers import STRAGGLERS_FILE
from miles_spmd.telemetry.trackers import TENSORBOARD_FOLDER, read_metrics
from miles_spmd.telemetry.transcripts import ROLLOUTS_FILE, TRANSCRIPTS_FILE
from miles_spmd.types.files import naming, write_whole
from miles_spmd.types.run_files import CONFIG_FILE, ENGINES_ALONE, METRICS_FILE, NEXT_CONFIG, TURNS
from miles_spmd.types.secrets import scrub

LOCK_FILE = "lock"
# All that a run writes, except for its attempts and their logs: those of a start that failed are worth keeping.
WRITTEN = (
    *(METRICS_FILE, TRANSCRIPTS_FILE, ROLLOUTS_FILE, RESPONSES_FILE, REPORT_FILE, STRAGGLERS_FILE),
    *(LEDGER, CHECKPOINTS, TURNS, TENSORBOARD_FOLDER, EXPORT),
)
RESUMED = ("train", "generate")  # by checkpoint.resume
_OF_SAMPLES = ("model", "data", "rollout", "environment", "algorithm", "reward", "determinism", "sglang")  # tables
HAS_RESULTS = (*RESUMED, "eval", "chaos")  # the others: an export, and repetitions in folders named after a run's


class RunFolderError(RuntimeError):
    """A run cannot begin in its folder: why, and what to do."""


def of_task(config: Config, task: str) -> Config:
    """Return ``config`` with the folder and the checkpoint that ``task`` works with. An evaluation stands beside the
    training run of the same recipe, and scores that run's newest checkpoint where it is to resume. So does what warms
    the caches, which keeps no results, a run that faults are injected into, which begins anew, and one that only
    generates."""
    if task not in ("eval", *ENGINES_ALONE, "warm", "chaos"):
        return config
    tables: dict[str, Any] = {"run": config.run.model_copy(update={"name": f"{config.run.name}-{task}"})}
    if task in ENGINES_ALONE:
        if config.run.mode != "rl":
            raise RunFolderError(f"run.mode: responses are generated in mode 'rl', not {config.run.mode!r}")
        if config.checkpoint.load is not None:
            raise RunFolderError(
                "checkpoint.load: no rank trains here, and engines read Hugging Face checkpoints alone; write one with "
                "`miles-spmd export`, and name it with model.hf_checkpoint"
            )
        if task == "serve":  # one policy, which nobody judges
            unjudged = config.reward.model_copy(update={"judge_num_gpus": 0, "judge_hf_checkpoint": None})
            tables |= {"second_policy": SecondPolicyConfig(), "reward": unjudged}
    elif task in ("warm", "chaos"):
        tables |= {"checkpoint": config.checkpoint.model_copy(update={"load": None, "resume": False})}
    elif config.checkpoint.resume:
        load = newest(config.run_dir)
        if load is None:
            raise RunFolderError(
                f"checkpoint.resume: {config.run_dir} has no checkpoint to evaluate; name one with checkpoint.load, or "
                "leave checkpoint.resume out to evaluate model.hf_checkpoint"
            )
        tables |= {"checkpoint": config.checkpoint.model_copy(update={"load": load, "resume": False})}
    return config.model_copy(update=tables)


def in_folder(run_dir: Path, suffix: str = "") -> list[str]:
    """Return the overrides by which the configuration in ``run_dir`` means that folder, wherever it was copied or moved
    to, or the one beside it with ``suffix`` in its name."""
    folder = run_dir.absolute()
    return [override("run.output_dir", folder.parent), override("run.name", folder.name + suffix)]


def override(setting: str, path: Path | str) -> str:
    """Return an override that is read as text, also where a path looks like a number or a list."""
    return f"{setting}={json.dumps(str(path), ensure_ascii=False)}"


def check_recipe(config: Config, recipe: Path) -> None:
    """Raise RunFolderError where a run is to be continued by the config.toml of a folder that was moved or copied, and
    which still names the folder that it was written in."""
    folder = recipe.absolute().parent
    is_run = recipe.name == CONFIG_FILE and (folder / LOCK_FILE).exists()
    if not config.checkpoint.resume or not is_run or folder.resolve() == config.run_dir.resolve():
        return
    written = load_config(recipe, check_files=False, trains=False).run
    if (written.output_dir, written.name) == (config.run.output_dir, config.run.name):
        own = " ".join(map(shlex.quote, in_folder(folder)))
        raise RunFolderError(
            f"run.name: {recipe} was moved or copied, and names {config.run_dir.absolute()}, which is another folder; "
            f"to continue the run beside it, add {own}"
        )


def check(config: Config, task: str) -> None:
    """Raise RunFolderError where ``task`` may not begin, or could not write what it has to. Touches nothing."""
    folder = config.run_dir
    # An export only reads the run's folder. What is in it may be a link to another disk, so each is tried.
    own = [] if task == "export" else [folder, *(folder / name for name in (CHECKPOINTS, LEDGER, LOGS))]
    places = [("run.output_dir and run.name", place) for place in own]
    if task == "export" or (task == "train" and config.checkpoint.export_final):
        places.append(("checkpoint.export_dir", config.checkpoint.export_dir or folder / EXPORT))
    if task == "warm":  # other tasks do without
        places.append(("run.kernel_cache", config.run.kernel_cache or shared_folder()))
    for setting, place in places:
        try:
            _try_to_write(place)
        except OSError as error:
            raise RunFolderError(f"{setting}: cannot write into {place}: {error.strerror}") from None
    if task == "export":
        return
    _lock(folder, keep=False)
    _check_owner(folder, task)
    if task in HAS_RESULTS and config.run.overwrite:
        _check_inputs(config)
    check_results(config, task)


def check_results(config: Config, task: str) -> None:
    """Raise RunFolderError where ``task`` would mix its results with those of an earlier run. Until all ranks have met,
    the first rank writes nothing that counts as one, so that every rank comes to the same decision."""
    folder, keeps = config.run_dir, task in HAS_RESULTS and not config.run.overwrite
    if task in RESUMED and config.checkpoint.resume and config.run.overwrite:
        raise RunFolderError("checkpoint.resume continues what run.overwrite would delete: set one of them")
    if keeps and not _continues(config, task) and (found := results(folder) or _finished_responses(folder)):
        proceed = "set checkpoint.resume=true to continue it, " if task in RESUMED else ""
        raise RunFolderError(
            f"run.name: {folder} has {found} of an earlier run; {proceed}choose another run.name to keep it, or set "
            "run.overwrite=true to delete it"
        )
    if task == "train" and config.checkpoint.resume:
        _check_beginning(folder)


def claim(config: Config, task: str) -> TextIO | None:
    """Check, make the folder, and delete what is not to be continued. Returns a lock, which ends with this process at
    the latest. Raises RunFolderError."""
    check_results(config, task)
    folder = config.run_dir
    with contextlib.suppress(OSError):  # which the check explains
        folder.mkdir(parents=True, exist_ok=True)  # to stay: other ranks make their logs in it meanwhile
    check(config, task)
    lock = _lock(folder, keep=True)
    gone = [] if _continues(config, task) else [folder / name for name in WRITTEN]
    for path in [*gone, *(leftovers(folder) if config.run.overwrite else [])]:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return lock


def describe(config: Config, task: str) -> None:
    """Write the resolved configuration, from which the run can be repeated, and its environment. Raises OSError.

    Where a run is continued its configuration stays what it is until the checkpoint was loaded: settings that do not
    fit it must not replace those with which the run can be continued.
    """
    folder = config.run_dir
    (folder / NEXT_CONFIG).unlink(missing_ok=True)
    name = NEXT_CONFIG if _continues(config, task) and (folder / CONFIG_FILE).exists() else CONFIG_FILE
    once = config.model_copy(update={"run": config.run.model_copy(update={"overwrite": False})})
    write_whole(folder / name, scrub(dump_config(once)).encode())
    write_environment(folder, task)


def changed_settings(folder: Path) -> list[str]:
    """Return the settings that decide the samples and with which the run in ``folder`` is continued, but was not begun.
    Raises OSError."""
    if not (folder / NEXT_CONFIG).exists():
        return []
    before, after = (
        {
            f"{table}.{name}": value
            for table, values in tomllib.loads((folder / file).read_text()).items()
            for name, value in values.items()
            if (table in _OF_SAMPLES or (table, name) == ("run", "seed")) and not LAYOUT.fullmatch(name)
        }
        for file in (CONFIG_FILE, NEXT_CONFIG)
    )
    return [name for name in sorted(before | after) if before.get(name) != after.get(name)]


def results(folder: Path) -> str:
    """Return in words what a run has left in ``folder`` that is worth keeping, "" if nothing."""
    found = []
    metrics = folder / METRICS_FILE
    if steps := read_metrics(metrics) if metrics.is_file() else {}:
        found.append(f"the metrics of {max(steps)} steps" if max(steps) else "metrics")
    if saved := sorted(path.name for path in (folder / CHECKPOINTS).glob("step_*")):
        found.append(f"checkpoints up to {saved[-1]}")
    if any((folder / EXPORT).glob("*")):
        found.append("an export")
    return " and ".join(filter(None, [", ".join(found[:-1]), *found[-1:]]))


def _finished_responses(folder: Path) -> str:
    """Return in words what ``rollout.durable`` has kept in ``folder`` of steps without a checkpoint, "" if nothing."""
    count = len([*(folder / TURNS).glob("step_*")])
    return f"the finished responses of {count} step{'s' if count > 1 else ''}" if count else ""


def outcome(config: Config, task: str, world_size: int, *, finished: bool) -> list[str]:
    """Write the report of a run that has ended, and return the lines that say what it leaves and how it goes on."""
    folder, lines = config.run_dir, []
    if task in HAS_RESULTS and results(folder):
        try:
            report = write_report(folder, lambda problem: lines.append(f"damaged:    {problem}"))
            lines.append(f"report:     {report}")
        except Exception as error:  # whatever it is, the run has ended as it did
            lines.append(f"no report:  {error}; `miles-spmd report {folder}` tries again")
    if task == "generate" and (folder / RESPONSES_FILE).exists():
        lines.append(f"responses:  {folder / RESPONSES_FILE}")
    if finished and task == "train" and config.checkpoint.export_final:
        lines.append(f"export:     {config.checkpoint.export_dir or folder / EXPORT}")
    responses = "" if finished else _finished_responses(folder)
    if task != "train" or not (lines or responses):
        return lines
    resume = f"miles-spmd train {shlex.quote(str(folder / CONFIG_FILE))} checkpoint.resume=true"
    if (of_cell := world_size // config.resilience.cells) > 1 or config.resilience.cells > 1:
        resume += f" --nproc-per-node {of_cell}"
    if checkpoint := newest(folder):
        lines.append(f"checkpoint: {checkpoint}")
        lines.append(f"continue:   {resume}{' num_rollout=N' if finished else ''}")
    elif responses:
        lines.append(f"checkpoint: none; the run begins anew with {responses}")
        lines.append(f"continue:   {resume}")
    elif not finished:
        interval = config.checkpoint.save_interval
        due = f"the first was due after step {interval}, as checkpoint.save_interval says"
        advice = due if interval else "checkpoint.save_interval asks for some"
        lines.append(f"checkpoint: none, so the run cannot be continued; {advice}")
    return lines


def _continues(config: Config, task: str) -> bool:
    """Return whether the results in the folder are those that the run goes on from."""
    load, folder = config.checkpoint.load, config.run_dir
    own = load is not None and load.absolute().is_relative_to(folder.absolute())
    return task in RESUMED and (config.checkpoint.resume or own) and not config.run.overwrite


def _check_owner(folder: Path, task: str) -> None:
    """Raise RunFolderError where ``task`` would replace what is not its own: a recipe that a user has put there, or, in
    a folder with a name that a repetition derives from a run's, another run."""
    described, environment = (folder / CONFIG_FILE).exists(), read_environment(folder)
    if task not in HAS_RESULTS:
        if (described or results(folder)) and (environment is None or environment.task != task):
            raise RunFolderError(
                f"{folder} was not made by `miles-spmd {task}`, which would replace what is in it; move it away"
            )
        return
    own = [folder / name for name in (ENVIRONMENT_FILE, LOCK_FILE)]  # the lock is a run's first file
    if described and not any(path.exists() for path in own):
        raise RunFolderError(
            f"run.name: {folder} is not the folder of a run, but has a {CONFIG_FILE}, which the run would overwrite; "
            "choose another run.name"
        )


def _check_beginning(folder: Path) -> None:
    """Raise RunFolderError where a run is to be continued, no checkpoint is there, and a run that begins anew would
    replace more than metrics: a run that is killed before its first checkpoint leaves only these."""
    if newest(folder) is not None:
        return
    remedy = "put it back, or leave checkpoint.resume out and choose another run.name, or set run.overwrite=true"
    if damaged := [path for path in unfinished(folder) if not path.name.endswith(INCOMPLETE)]:
        raise RunFolderError(
            f"checkpoint.resume: {damaged[-1]} is damaged: {STATE_FILE} is missing, and no other checkpoint is there; "
            f"{remedy}"
        )
    if any((folder / EXPORT).glob("*")):
        raise RunFolderError(
            f"checkpoint.resume: {folder} has {results(folder)} of an earlier run, but the checkpoint to continue "
            f"from is missing, and a run that begins anew would replace them; {remedy}"
        )


def _check_inputs(config: Config) -> None:
    """Raise RunFolderError where the run reads something that ``run.overwrite`` would delete."""
    sources = [config.data.prompt_data, *config.eval.eval_prompt_data.values()]
    read = [*config.checkpoints, *(Path(re.sub(r"@\[[^\]]*\]$", "", source)) for source in sources)]
    if config.checkpoint.load is not None:
        read.append(config.checkpoint.load)
    deleted = [(config.run_dir / name).resolve() for name in WRITTEN]
    for path in read:
        if any(path.resolve().is_relative_to(folder) for folder in deleted):
            raise RunFolderError(
                f"run.overwrite: would delete {path}, which this run reads; choose another run.name, or move it"
            )


def hold(folder: Path) -> TextIO | None:
    """Make ``folder``, which one process works in at a time, and return its lock, which ends with this process at the
    latest. Raises RunFolderError where another process has it, and OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    return _lock(folder, keep=True)


def _lock(folder: Path, *, keep: bool) -> TextIO | None:
    """Take the folder's lock, and return it unless it is not to be kept. Raises RunFolderError where another process
    has it."""
    path = folder / LOCK_FILE
    if not keep and not path.exists():
        return None
    lock = path.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        with lock:
            raise RunFolderError(
                f"run.name: another run is writing into {folder} ({lock.read().strip()}); wait for its end, or choose "
                "another run.name"
            ) from None
    except OSError:
        pass  # a file system without locks
    if not keep:
        lock.close()
        return None
    job = f"Slurm job {job}, " if (job := slurm_job()) else ""
    with naming(path):
        lock.truncate(0)
        lock.write(f"{job}pid {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}\n")
        lock.flush()
    return lock


def _try_to_write(folder: Path) -> None:
    """Write a file into ``folder`` or, where it does not exist, into the nearest folder above it that does. Nothing is
    made that another process of the same run could see. Raises OSError."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    with tempfile.TemporaryFile(dir=nearest) as file:
        file.write(b"\0")
