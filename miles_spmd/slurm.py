"""The batch script of a run, rendered from its configuration, and its submission.

The script has the lines of ``slurm/grpo_qwen3.sh`` with other values, and like it leaves the work to ``slurm/job.sh``.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Collection
from functools import partial
from pathlib import Path

from miles_spmd import launcher
from miles_spmd.config import Config
from miles_spmd.config.load import ConfigError, load_config
from miles_spmd.types.variables import VariableError, whole

ROOT = Path(__file__).parents[1]
BODY = Path("slurm", "job.sh")
LOG = "%x-%j.log"


class SubmitError(RuntimeError):
    """Slurm has not taken the job: why, and what to do."""


def load(recipe: Path, overrides: list[str], *, dry_run: bool) -> Config:
    """Return the configuration of a job. Raises ConfigError with all of its errors, and with what is missing here."""
    ranks = None
    with contextlib.suppress(ConfigError):  # which is raised again below, with all other errors
        config = load_config(recipe, overrides, check_files=False)
        job, cells = config.slurm, config.resilience.cells
        ranks = max(1, job.nodes * (job.gpus_per_node or whole("NPROC_PER_NODE", 1, least=1)) // cells)
    inputs = partial(_errors, dry_run=dry_run)
    return load_config(recipe, overrides, world_size=ranks, elsewhere=True, inputs=inputs)


def _errors(config: Config, without: Collection[str], *, dry_run: bool) -> list[str]:
    from miles_spmd.controller.inputs import errors

    here = []
    if not (ROOT / BODY).is_file():
        here.append(f"no file {ROOT / BODY}: call miles-spmd of a checkout, which has the body of every job")
    here += _cells(config)
    here += [
        f"slurm.setup.{number}: {line!r} cannot be read by bash: {problem}"
        for number, line in enumerate(config.slurm.setup)
        if (problem := _syntax_error(line))
    ]
    if not dry_run and shutil.which("sbatch") is None:
        here.append("no Slurm here: sbatch is not in PATH; call this on a login node, or see the script with --dry-run")
    return errors(config, without) + here


def _cells(config: Config) -> list[str]:
    """Return why the cells of a run cannot be steps of its job."""
    job, cells, found = config.slurm, config.resilience.cells, list[str]()
    if cells == 1:
        return found
    if cells % job.nodes:
        found.append(f"slurm.nodes: {cells} cells cannot be divided evenly over {job.nodes} nodes")
    if job.launch != "torchrun":
        found.append("slurm.launch: must be 'torchrun' with resilience.cells > 1: cells have launchers of their own")
    if job.container:
        found.append("slurm.container: must be empty with resilience.cells > 1: a container cannot start steps of srun")
    return found


def render(recipe: Path, config: Config, overrides: list[str]) -> str:
    """Return the batch script."""
    job = config.slurm
    given = {"partition": job.partition, "account": job.account}
    options = [f"--{option}={value}" for option, value in given.items() if value]
    options += ["--no-kill"] if config.resilience.cells > 1 else []  # one node's end is that of its cells alone
    options += [f"--job-name={_job_name(config)}", f"--nodes={job.nodes}"]
    options += [f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []
    options += ["--exclusive", "--mem=0", f"--time={job.time}", "--requeue", f"--signal=B:USR1@{job.signal_seconds}"]
    options += ["--open-mode=append", f"--output={LOG}", *job.options]
    variables = {"MILES_SPMD_ROOT": str(ROOT), "MILES_SPMD_LAUNCH": job.launch, "MILES_SPMD_CONTAINER": job.container}
    setup = [  # a comment in a line ends with the line
        f"{{ {line}\n}} || {{ echo {shlex.quote(f'slurm.setup: this failed: {line}')} >&2; exit 2; }}"
        for line in job.setup
    ]
    run = shlex.join([str(ROOT / BODY), "train", str(recipe.absolute()), *overrides])
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            "# Written by miles-spmd slurm; docs/slurm.md explains it.",
            *(f"#SBATCH {option}" for option in options),
            "",
            *(f"export {variable}={shlex.quote(value)}" for variable, value in variables.items() if value),
            *setup,
            f"source {run}",
            "",
        ]
    )


def _syntax_error(line: str) -> str:
    """Return what bash says about a line of a script, "" where it can read it, or is not here."""
    if shutil.which("bash") is None:
        return ""
    text = f"{{ {line}\n}} || true\n"
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    return done.stderr.strip().partition("\n")[0].rpartition(": ")[2] if done.returncode else ""


def _job_name(config: Config) -> str:
    return re.sub(r"[^\w.-]", "-", config.run.name)


def submit(script: str) -> str:
    """Submit the script and return the job's number. Raises SubmitError."""
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.removeprefix("sbatch: error: ") for line in done.stderr.splitlines() if "error" in line]
        raise SubmitError(f"Slurm has refused the job: {'; '.join(lines) or done.stderr.strip()}{_remedy(done.stderr)}")
    job = done.stdout.strip().partition(";")[0]
    if not job.isdecimal():  # an option or a variable asks sbatch for something else
        raise SubmitError(
            f"sbatch has submitted no job, and printed: {(done.stdout + done.stderr).strip() or 'nothing'}"
        )
    return job


def _remedy(message: str) -> str:
    if "partition" not in message.lower():
        return ""
    shown = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True, check=False).stdout.split()
    return f"; set slurm.partition to one of: {', '.join(sorted(set(shown)))}" if shown else ""


def run(recipe: Path, overrides: list[str], *, dry_run: bool) -> str:
    """Submit the job of ``recipe``, or only render its script if ``dry_run``. Returns what to print. Prints errors and
    exits where there are some."""
    with launcher.failing(ConfigError, SubmitError, VariableError, code=2):
        config = load(recipe, overrides, dry_run=dry_run)
        script = render(recipe, config, overrides)
        if dry_run:
            return script.rstrip("\n")
        job = submit(script)
    log = Path.cwd() / f"{_job_name(config)}-{job}.log"
    folder = config.run_dir.absolute()
    look = ("squeue", "-j", job), ("tail", "-F", str(log)), ("miles-spmd", "report", str(folder))
    return "\n".join(
        [
            f"job {job}",
            f"log:        {log}",
            f"run folder: {folder}",
            f"look:       {'; '.join(map(shlex.join, look))}",
            f"stop:       scancel --batch --signal=USR1 {job} saves and requeues; scancel {job} ends it",
        ]
    )
