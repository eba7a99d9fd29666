"""The verb ``slurm``: the script that it renders, and what it says where a job cannot be submitted."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from miles_spmd.config.load import ConfigError, load_config
from miles_spmd.slurm import SubmitError, load, render, submit
from tests.slurm.cluster import REPOSITORY, Cluster, Job
from tests.slurm.conftest import write_job

SCRIPTS = sorted(path for path in (REPOSITORY / "slurm").glob("*.sh") if "#SBATCH" in path.read_text())


def miles_spmd(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "miles_spmd", *map(str, arguments)],
        cwd=REPOSITORY,
        env=variables,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_scripts_are_what_is_rendered(script: Path) -> None:
    """Except for values: the options of sbatch, in their order, and the last line, which calls the body."""
    recipe = re.search(r"configs/\w+\.toml", script.read_text())
    assert recipe
    own = render(Path(recipe[0]), load_config(REPOSITORY / recipe[0], check_files=False), [])
    options = [re.findall(r"^#SBATCH (--[\w-]+)", text, re.MULTILINE) for text in (script.read_text(), own)]
    assert options[0] == options[1]
    assert script.read_text().splitlines()[-1].startswith('source "$job" ')
    assert own.splitlines()[-1] == f"source {REPOSITORY}/slurm/job.sh train {REPOSITORY / recipe[0]}"


def test_there_are_four_scripts() -> None:
    assert [script.stem for script in SCRIPTS] == ["eval", "grpo_qwen3", "grpo_qwen3_moe", "sft"]


def test_every_setting_is_in_the_script(tmp_path: Path) -> None:
    settings = {
        "partition": "gpu",
        "account": "me",
        "nodes": 3,
        "gpus_per_node": 4,
        "time": "2-00",
        "signal_seconds": 90,
    }
    settings |= {"launch": "tasks", "container": "pyxis:x y", "setup": ["module load cuda"], "options": ["--qos=long"]}
    config = load_config(write_job(tmp_path, tmp_path / "model", slurm=settings), check_files=False)
    lines = render(tmp_path / "config.toml", config, ["run.name=a b"]).splitlines()
    for line in (
        *("#SBATCH --partition=gpu", "#SBATCH --account=me", "#SBATCH --nodes=3", "#SBATCH --gpus-per-node=4"),
        *("#SBATCH --time=2-00", "#SBATCH --signal=B:USR1@90", "#SBATCH --qos=long", "#SBATCH --requeue"),
        *("export MILES_SPMD_LAUNCH=tasks", "export MILES_SPMD_CONTAINER='pyxis:x y'"),
        "{ module load cuda",
        "} || { echo 'slurm.setup: this failed: module load cuda' >&2; exit 2; }",
    ):
        assert line in lines
    assert lines[-1].endswith(f"train {tmp_path}/config.toml 'run.name=a b'")
    done = subprocess.run(["bash", "-n"], input="\n".join(lines), text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("5", 300), ("4:30", 270), ("0:4:30", 270), ("0-0:4", 240), ("10", 0), ("1-0", 0), ("0", 0), ("UNLIMITED", 0)],
)
def test_a_job_that_would_be_stopped_before_it_begins(tmp_path: Path, time: str, seconds: int) -> None:
    """``seconds``: 0: it is not."""
    config = write_job(tmp_path, tmp_path / "model", slurm={"time": time, "signal_seconds": 300})
    with pytest.raises(ConfigError) if seconds else nullcontext() as found:
        load_config(config, check_files=False)
    if found is not None:
        assert (
            f"slurm.signal_seconds: must be shorter than slurm.time, or the job is stopped before it begins, got "
            f"300 s of {seconds} s" in str(found.value)
        )


@pytest.mark.parametrize("line", ["echo $(", "if true; then", "}", "echo 'a"])
def test_a_line_of_setup_is_a_whole_command(tmp_path: Path, line: str) -> None:
    setup = {"setup": ["true # comment", line]}
    with pytest.raises(ConfigError) as found:
        load(write_job(tmp_path, tmp_path / "model", slurm=setup), [], dry_run=True)
    assert f"slurm.setup.1: {line!r} cannot be read by bash: " in str(found.value)
    assert "slurm.setup.0" not in str(found.value)


@pytest.mark.parametrize(
    ("line", "status"),
    [("false # comment", 2), ("true; false", 2), ("export A=1 # comment", 0), ("[[ -n a ]] && A=1", 0)],
)
def test_a_line_of_setup_that_fails_ends_the_job(tmp_path: Path, line: str, status: int) -> None:
    config = load_config(write_job(tmp_path, tmp_path / "model", slurm={"setup": [line]}), check_files=False)
    script = render(tmp_path / "config.toml", config, []).rpartition("source ")[0]
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (status, f"slurm.setup: this failed: {line}\n" if status else "")


def test_an_sbatch_that_submits_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'Job 5 to start at noon' >&2\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(SubmitError, match=r"^sbatch has submitted no job, and printed: Job 5 to start at noon$"):
        submit("")


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    settings = {"time": "soon", "signal_seconds": 5, "container": "docker:x"}
    settings |= {"options": ["qos", "--time=3", "-N4", "--test-only", "--qos=long"]}
    config = write_job(tmp_path, tmp_path / "model", slurm=settings)
    done = miles_spmd("slurm", config, "nodse=2", PATH="/nowhere")
    assert done.returncode == 2
    assert done.stdout == ""
    for part in (
        "slurm.time: must be minutes, hours:minutes:seconds or days-hours, got 'soon'",
        "slurm.signal_seconds: must be between 60 and 65535, got 5",
        "slurm.container: must be apptainer:IMAGE or pyxis:IMAGE, got 'docker:x'",
        "slurm.options.0: 'qos' is not an option of sbatch",
        "slurm.options.1: --time is set by",
        "slurm.options.2: --nodes is set by",
        "slurm.options.3: --test-only has no use here",
        "nodse=2: unknown setting",
        f"model.hf_checkpoint: no folder {tmp_path}/model",
        "no Slurm here: sbatch is not in PATH",
    ):
        assert part in done.stderr
    assert done.stderr.count("miles-spmd: error:") == 1


@pytest.mark.timeout(900)
def test_submitted(cluster: Cluster, folder: Path, checkpoint: Path) -> None:
    config = write_job(folder, checkpoint, slurm={"gpus_per_node": 0, "setup": ["sleep 600"]})
    refused = miles_spmd("slurm", config, "slurm.partition=nowhere", **cluster.environment)
    assert refused.returncode == 2
    assert "Slurm has refused the job: " in refused.stderr
    assert refused.stderr.strip().endswith("; set slurm.partition to one of: main")
    done = miles_spmd("slurm", config, "--nodes", 2, **cluster.environment)
    assert done.returncode == 0, done.stderr
    number = re.match(r"job (\d+)\n", done.stdout)
    assert number
    job = Job(cluster, number[1])
    shown = job.show()
    cluster.command("scancel", job.id)
    assert shown["NumNodes"] in ("2", "2-2")  # a range while the job is pending
    assert (shown["JobName"], shown["Requeue"]) == ("tiny", "1")
    assert f"log:        {shown['StdOut']}" in done.stdout
    assert f"run folder: {folder}/runs/tiny" in done.stdout
    assert job.wait() == "CANCELLED"
    Path(shown["StdOut"]).unlink(missing_ok=True)
