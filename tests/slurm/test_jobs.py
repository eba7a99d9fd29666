"""Jobs of a real Slurm: they train, are stopped in every phase, are requeued and finish; and what is refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from miles_spmd.controller.journal.stopping import SAME
from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.compare import compare
from tests import forked
from tests.slurm.cluster import LIMIT, REPOSITORY, Cluster, Job, wait_for
from tests.slurm.conftest import Submit, submit_from, write_job

END_SECONDS = 20.0  # in which Slurm ends the processes of a job that has no others
pytestmark = pytest.mark.timeout(900)  # a job starts ten interpreters


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """The folder of the same run on two ranks, which nothing has stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = forked.run("-m", "miles_spmd", "train", write_job(folder, checkpoint), "--nproc-per-node=2", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "tiny"


def processes(job: Job) -> list[int]:
    """All living processes of this job."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"\0SLURM_JOB_ID={job.id}\0" in (entry / "environ").read_text(errors="replace"):
                config = f"SLURM_CONF={job.cluster.environment['SLURM_CONF']}"
                if config in (entry / "environ").read_text(errors="replace"):
                    found.append(int(entry.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def wait_until_gone(job: Job) -> None:
    try:
        wait_for(lambda: not processes(job), END_SECONDS)
    except AssertionError:
        left = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")[:200] for pid in processes(job)]
        raise AssertionError(f"after {END_SECONDS} s there are {left}") from None


def held_job(
    submit: Submit, folder: Path, config: Path, command: str, *, arguments: tuple[str, ...] = (), **options: Any
) -> Job:
    """A job of two ranks that waits before that command in its third step."""
    (folder / "hold").write_text(command)
    job = submit(config, *arguments, **options)
    job.wait_for((folder / "held").exists)
    return job


def check_equal(run: Path, uninterrupted: Path, job: Job) -> None:
    found = compare(verify(run), verify(uninterrupted))
    assert found.equal, found.difference
    assert len(found.steps) == 4
    assert not list((run / "checkpoints").glob("*.incomplete"))
    wait_until_gone(job)


def stop_by_signal(job: Job) -> None:
    """What Slurm does some minutes before the time limit, now; and a minute before it, as the held run cannot obey."""
    told = job.log().count("stopping: ")
    job.signal(signal.SIGUSR1, "--batch")
    job.wait_for(lambda: job.log().count("stopping: ") > told)
    time.sleep(SAME)
    job.signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("nodes", "ranks", "launch", "command"),
    [
        pytest.param(2, 1, "tasks", "TrainStep"),
        pytest.param(1, 2, "tasks", "Generate", marks=pytest.mark.slow),
        pytest.param(1, 2, "torchrun", "Generate", marks=pytest.mark.slow),
        pytest.param(1, 2, "torchrun", "TrainStep", marks=pytest.mark.slow),
        pytest.param(1, 2, "torchrun", "SaveCheckpoint", marks=pytest.mark.slow),
        pytest.param(2, 1, "torchrun", "Generate", marks=pytest.mark.slow),
    ],
)
def test_a_job_asked_to_stop_is_requeued_and_has_the_ledger_of_an_uninterrupted_run(
    submit: Submit,
    folder: Path,
    checkpoint: Path,
    uninterrupted: Path,
    nodes: int,
    ranks: int,
    launch: str,
    command: str,
) -> None:
    config = write_job(folder, checkpoint)
    job = held_job(submit, folder, config, command, nodes=nodes, ranks=ranks, MILES_SPMD_LAUNCH=launch)
    stop_by_signal(job)
    job.wait_for(lambda: job.state == "PENDING")
    wait_until_gone(job)
    (folder / "hold").unlink()
    assert job.wait() == "COMPLETED", job.log()
    assert job.show()["Restarts"] == "1"
    assert "restart 1: train" in job.log()
    check_equal(folder / "runs" / "tiny", uninterrupted, job)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["Generate", "TrainStep", "SaveCheckpoint"])
def test_a_job_requeued_by_slurm_finishes(
    submit: Submit, cluster: Cluster, folder: Path, checkpoint: Path, uninterrupted: Path, command: str
) -> None:
    job = held_job(submit, folder, write_job(folder, checkpoint), command, ranks=2)
    cluster.command("scontrol", "requeue", job.id)
    job.wait_for(lambda: job.state == "PENDING")
    (folder / "hold").unlink()
    assert job.wait() == "COMPLETED", job.log()
    check_equal(folder / "runs" / "tiny", uninterrupted, job)


@pytest.mark.slow
def test_an_evaluation_requeued_by_slurm_begins_anew(
    submit: Submit, cluster: Cluster, folder: Path, checkpoint: Path
) -> None:
    config = write_job(folder, checkpoint, run={"num_rollout": 2})
    trained = submit(config)
    assert trained.wait() == "COMPLETED", trained.log()
    script = {"script": REPOSITORY / "slurm" / "eval.sh"}
    sets = f"eval_prompt_data.held={folder}/data.jsonl"
    job = held_job(submit, folder, config, "Generate", arguments=("checkpoint.resume=true", sets), **script)
    cluster.command("scontrol", "requeue", job.id)
    job.wait_for(lambda: job.state == "PENDING")
    (folder / "hold").unlink()
    assert job.wait() == "COMPLETED", job.log()
    assert job.show()["Restarts"] == "1"
    assert (folder / "runs" / "tiny-eval" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["Generate", "TrainStep", "SaveCheckpoint"])
def test_a_job_at_its_time_limit_is_requeued(
    submit: Submit, cluster: Cluster, folder: Path, checkpoint: Path, uninterrupted: Path, command: str
) -> None:
    """A run that cannot stop by itself has its ranks stopped while there is time to requeue the job."""
    limits = "--signal=B:USR1@60"
    job = held_job(submit, folder, write_job(folder, checkpoint), command, ranks=2, options=(limits,))
    ran = int(cluster.command("squeue", "-h", "-j", job.id, "-o", "%M").strip().split(":")[0])
    cluster.command("scontrol", "update", f"JobId={job.id}", f"TimeLimit={ran + 3}")
    job.wait_for(lambda: job.state == "PENDING")
    (folder / "hold").unlink()
    cluster.command("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    assert job.wait() == "COMPLETED", job.log()
    check_equal(folder / "runs" / "tiny", uninterrupted, job)


@pytest.mark.slow
def test_a_job_without_progress_is_not_requeued_for_ever(submit: Submit, folder: Path, checkpoint: Path) -> None:
    job = held_job(submit, folder, write_job(folder, checkpoint), "Generate")
    for restart in range(1, 4):
        stop_by_signal(job)
        if restart < 3:
            job.wait_for(lambda: job.state == "PENDING")
            (folder / "held").unlink()
            job.begin_now()
            job.wait_for((folder / "held").exists)
    assert job.wait() == "FAILED"
    assert "not requeued: three attempts ended without a new checkpoint" in job.log()


@pytest.mark.slow
def test_a_run_that_fails_is_not_requeued(submit: Submit, folder: Path, checkpoint: Path) -> None:
    """Its checkpoint is of another model."""
    first = submit(write_job(folder, checkpoint, run={"num_rollout": 1}))
    assert first.wait() == "COMPLETED", first.log()
    job = submit(write_job(folder, half_of(checkpoint, folder / "half")))
    assert job.wait() == "FAILED", job.log()
    assert "step_000001" in job.log()
    assert job.show()["Restarts"] == "0"


def half_of(checkpoint: Path, folder: Path) -> Path:
    """A model with half of the layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(checkpoint, folder)
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers, config.layer_types = 1, config.layer_types[:1]
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_jobs_of_two_users_share_a_node(submit: Submit, folder: Path, checkpoint: Path) -> None:
    jobs = []
    for user in ("daemon", "nobody"):
        own = folder / user
        own.mkdir()
        model = shutil.copytree(checkpoint, own / "model")
        config = write_job(own, model)
        for path in (own, *own.rglob("*")):  # of the weights others cannot read anything
            shutil.chown(path, user)
        options = (f"--uid={user}", f"--chdir={own}", f"--output={own}/%j.log", "--oversubscribe", "--nodelist=node0")
        home = {"HOME": str(own), "XDG_CACHE_HOME": str(own / "cache"), "TMPDIR": "/tmp"}
        jobs.append(submit(config, ranks=1, options=(*options, "--cpus-per-task=1"), **home))
    for job in jobs:
        job.wait_for(lambda job=job: job.state == "RUNNING")
    assert {job.show()["NodeList"] for job in jobs} == {"node0"}
    for job in jobs:
        assert job.wait() == "COMPLETED", job.log()


@pytest.mark.slow
def test_an_array_has_a_folder_for_each_task(submit: Submit, folder: Path, checkpoint: Path) -> None:
    config = write_job(folder, checkpoint, run={"num_rollout": 1})
    options = ("--array=1-2", "--oversubscribe", "--cpus-per-task=1", f"--output={folder}/%A_%a.log")
    job = submit(config, "run.name=tiny-%a", "run.seed=%a", options=options)
    tasks = [Job(job.cluster, f"{job.id}_{number}") for number in (1, 2)]
    assert [task.wait() for task in tasks] == ["COMPLETED", "COMPLETED"]
    assert all((folder / "runs" / f"tiny-{number}" / "metrics.jsonl").exists() for number in (1, 2))


@pytest.mark.slow
def test_a_task_of_an_array_is_stopped_and_requeued_alone(submit: Submit, folder: Path, checkpoint: Path) -> None:
    """The last one, whose number is that of the array."""
    options = ("--array=1-2", "--oversubscribe", "--cpus-per-task=1", f"--output={folder}/%A_%a.log")
    (folder / "hold").write_text("Generate")
    job = submit(write_job(folder, checkpoint), "run.name=tiny-%a", options=options)
    tasks = [Job(job.cluster, f"{job.id}_{number}") for number in (1, 2)]
    wait_for(lambda: all((folder / f"runs/tiny-{n}/checkpoints/step_000002").exists() for n in (1, 2)), LIMIT)
    stop_by_signal(tasks[1])
    wait_for(lambda: tasks[1].state == "PENDING", LIMIT)
    assert tasks[0].state == "RUNNING"
    (folder / "hold").unlink()
    assert [task.wait() for task in tasks] == ["COMPLETED", "COMPLETED"], [task.log() for task in tasks]
    assert [task.show()["Restarts"] for task in tasks] == ["0", "1"]
    assert "stopping: " not in tasks[0].log()


@pytest.mark.slow
def test_a_chain_of_jobs_continues_one_run(submit: Submit, folder: Path, checkpoint: Path, uninterrupted: Path) -> None:
    config = write_job(folder, checkpoint)
    first = submit(config, "run.num_rollout=2", ranks=2)
    second = submit(config, ranks=2, options=(f"--dependency=afterok:{first.id}",))
    assert second.show()["Reason"] == "Dependency"
    assert (first.wait(), second.wait()) == ("COMPLETED", "COMPLETED"), second.log()
    check_equal(folder / "runs" / "tiny", uninterrupted, second)


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["tasks", "torchrun"])
def test_a_cancelled_job_leaves_no_process_and_no_second_run_joins_it(
    submit: Submit, cluster: Cluster, folder: Path, checkpoint: Path, launch: str
) -> None:
    config = write_job(folder, checkpoint)
    options = {"options": ("--oversubscribe", "--cpus-per-task=1"), "MILES_SPMD_LAUNCH": launch}
    job = held_job(submit, folder, config, "Generate", **options)
    second = submit(config, **options)
    assert second.wait() == "FAILED"
    assert f"another run is writing into {folder}/runs/tiny (Slurm job {job.id}, pid" in second.log()
    assert processes(job)
    cluster.command("scancel", job.id)
    assert job.wait() == "CANCELLED"
    wait_until_gone(job)
    assert "requeueing" not in job.log()


# --- what is refused before anything starts --------------------------------------------------------------------------


REFUSALS = (
    ({"CONFIG": "missing.toml"}, "no file missing.toml in "),
    ({"NPROC_PER_NODE": ""}, "the job has no GPU (--gpus-per-node); on CPUs set NPROC_PER_NODE"),
    ({"MILES_SPMD_CONTAINER": "docker:x"}, "apptainer:IMAGE or pyxis:IMAGE, not 'docker:x'"),
    ({"MILES_SPMD_CONTAINER": "pyxis:x"}, "this Slurm has no pyxis"),
    ({"MILES_SPMD_CONTAINER": "apptainer:x", "PATH": "/usr/bin:/bin"}, "apptainer is not in PATH"),
    ({"MILES_SPMD_LAUNCH": "mpirun"}, "MILES_SPMD_LAUNCH is torchrun or tasks, not 'mpirun'"),
    ({"MILES_SPMD_ROOT": "/nowhere"}, "no file /nowhere/slurm/job.sh"),
    ({"site": "if true; then"}, "the site file has an error: "),
    ({"site": "export A=1\nfalse"}, 'site.sh, line 2: "false" ended with status 1'),
    ({"site": "true\nexit 0"}, "site.sh has ended the job with status 0; the job begins after it"),
    ({"site": "true\nreturn 3"}, "site.sh has returned with status 3"),
    ({"site": "set -e; root=/x verb=y config=z; export A=$UNSET NPROC_PER_NODE=1x"}, "ranks of a node, not '1x'"),
)


@pytest.fixture(scope="module")
def refused(cluster: Cluster) -> Iterator[dict[str, tuple[Path, Job]]]:
    """The folder and the job of each message. They are submitted together: Slurm takes seconds for each."""
    with tempfile.TemporaryDirectory(prefix="job-") as root:
        jobs = {}
        for number, (variables, message) in enumerate(REFUSALS):
            folder = Path(root, str(number))
            folder.mkdir()
            (folder / "config.toml").touch()
            if "site" in variables:
                (folder / "site.sh").write_text(variables["site"] + "\n")
                variables = {"MILES_SPMD_SITE": str(folder / "site.sh")}
            jobs[message] = folder, submit_from(cluster, folder, folder / "config.toml", **variables)
        yield jobs
        for _, job in jobs.values():
            job.wait()


@pytest.mark.parametrize("message", [message for _, message in REFUSALS])
def test_refusals(refused: dict[str, tuple[Path, Job]], message: str) -> None:
    folder, job = refused[message]
    assert job.wait() == "FAILED", job.log()
    errors = [line for line in job.log().splitlines() if line.strip()]
    assert message in errors[0]
    assert len(errors) <= 2
    assert not (folder / "runs").exists()


def test_what_a_container_is_given(submit: Submit, folder: Path) -> None:
    """There is no apptainer here: a program of that name prints its arguments."""
    (folder / "apptainer").write_text('#!/bin/sh\necho "apptainer $*"\n')
    (folder / "apptainer").chmod(0o755)
    (folder / "config.toml").touch()
    variables = {"MILES_SPMD_CONTAINER": "apptainer:/i.sif", "MILES_SPMD_MOUNTS": "/data,/tmp", "PYTHON": "python3"}
    job = submit(folder / "config.toml", "a=b c", PATH=f"{folder}:/usr/bin:/bin", **variables)
    assert job.wait() == "FAILED"
    mounts = ",".join(sorted([str(REPOSITORY), str(folder), "/data", "/tmp"]))
    command = f"python3 -m miles_spmd train {folder}/config.toml a=b c checkpoint.resume=true --dry-run"
    assert f"apptainer exec --bind {mounts} /i.sif {command}\n" in job.log()
    assert "python3 has printed no plan with the run folder" in job.log()


def test_a_run_without_a_model_or_a_place_to_write(submit: Submit, folder: Path, checkpoint: Path) -> None:
    config = write_job(folder, checkpoint, run={"output_dir": "/proc/runs"}, model={"hf_checkpoint": "Qwen/Qwen3-8B"})
    job = submit(config)
    assert job.wait() == "FAILED"
    assert "model.hf_checkpoint: no folder Qwen/Qwen3-8B" in job.log()
    assert "hf download Qwen/Qwen3-8B" in job.log()
    assert job.log().count("miles-spmd: error:") == 1


def test_a_script_outside_of_a_job_says_what_it_is_for() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    done = subprocess.run(
        [REPOSITORY / "slurm" / "sft.sh"], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "this runs in a job: sbatch slurm/" in done.stderr
