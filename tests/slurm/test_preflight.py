"""The preflight: good nodes pass, and the bad one is named: what a table says of reports, and on a real Slurm."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from miles_spmd.preflight import Report, judge, preflight, render
from miles_spmd.telemetry import environment
from tests.slurm.cluster import REPOSITORY, Cluster

VERSIONS = {"torch": "2.11.0", "Python": "3.12.3"}


def nodes(count: int = 4) -> list[Report]:
    return [
        Report(f"n{i}", versions=dict(VERSIONS), gpus=8, skew=0.01 * i, local=400 + i, pairs=[50.0, 51.0], all=45.0)
        for i in range(count)
    ]


def test_good_nodes_pass() -> None:
    reports = nodes()
    assert judge(reports) == {}
    assert judge(reports, expected=40) == {}
    text = render(reports, {}, 12)
    assert "n3                   ok      8  +0.030 s        403         45" in text
    assert text.endswith("preflight: all nodes are as they should be; 4 examined in 12 s")


def test_each_problem_names_its_node() -> None:
    reports = nodes()
    reports[0].problems = ["GPU 3: 2 uncorrected errors of its memory since it was reset"]
    reports[1].versions["torch"] = "2.10.0"
    reports[2].skew = -30.0
    reports[3].local = 100.0
    bad = judge(reports)
    assert bad == {
        "n0": ["GPU 3: 2 uncorrected errors of its memory since it was reset"],
        "n1": ["torch 2.10.0, and 2.11.0 on other nodes"],
        "n2": ["its clock differs by -30.0 s from other nodes'"],
        "n3": ["all-reduce with its own ranks: 100 GB/s, and 401 on other nodes"],
    }
    assert "--exclude=n0,n1,n2,n3" in render(reports, bad, 1)


def test_the_node_between_two_slow_pairs_is_the_bad_one() -> None:
    reports = nodes(5)
    for report, pairs in zip(reports, ([50.0], [50.0, 5.0], [5.0, 5.0], [50.0, 5.0], [50.0])):
        report.pairs = pairs
    assert list(judge(reports)) == ["n2"]


def test_nodes_that_wait_for_a_bad_one_are_not_blamed() -> None:
    reports = nodes()
    for report in reports:
        report.stuck = "the all-reduce does not end"
    assert list(judge(reports)) == [""]
    reports[0].missing = [2]
    assert judge(reports) == {"n2": ["its ranks do not reach n0"]}
    reports[0].missing, reports[1].problems = [], ["no report within 55 s"]
    assert list(judge(reports)) == ["n1"]
    alone = nodes()
    alone[3].stuck = "all-reduce, rank 1 of the node: CUDA error"
    assert judge(alone) == {"n3": ["all-reduce, rank 1 of the node: CUDA error"]}


def test_a_slow_cluster_is_not_one_nodes_fault() -> None:
    assert judge(nodes(), expected=300) == {
        "": ["all-reduce over all nodes: 45 GB/s, expected 300 (MILES_SPMD_BANDWIDTH)"]
    }


def test_what_nvidia_smi_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [["0", "4", "0", "Not Active"], ["1", "40960", "3", "Active"], ["2", "[N/A]", "[N/A]", "[N/A]"]]
    monkeypatch.setattr(environment, "_query", lambda *fields: rows)
    assert environment.gpu_errors() == [
        "GPU 1: another process uses 40.0 GiB of its memory",
        "GPU 1: 3 uncorrected errors of its memory since it was reset",
        "GPU 1: its clock is reduced because of heat or power (hw_slowdown)",
    ]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MILES_SPMD_BANDWIDTH": "fast"}, "MILES_SPMD_BANDWIDTH in the environment has to be a finite number above 0"),
        ({"MILES_SPMD_PREFLIGHT": "on"}, "MILES_SPMD_PREFLIGHT in the environment has to be a finite number above 0"),
        ({"NPROC_PER_NODE": "2x"}, "NPROC_PER_NODE in the environment has to be a whole number, at least 1, got '2x'"),
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "4"}, "task 0 of 4 on 2 nodes: call srun with --nt"),
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "3"}, "task 3 of 1 on 2 nodes: call srun with --ntasks-per"),
    ],
)
def test_what_the_environment_must_have(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    variables: dict[str, str],
    message: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert preflight(tmp_path) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


SCRIPT = f"""#!/bin/bash
srun --nodes=2 --ntasks-per-node=1 bash -c '{{command}} exec {sys.executable} -m miles_spmd doctor --cluster {{folder}}'
echo "status $?"
"""
# The doctor's programs, whose imports take longest, are seen in tests/test_cli.py, and here on bad nodes.
QUICK = "from miles_spmd import doctor; doctor.CPU_PROBES = {'engine': 'print()'}"


@pytest.mark.parametrize(
    ("command", "status", "lines"),
    [
        (
            "",
            0,
            [
                "node0                ok",
                "node1                ok",
                "preflight: all nodes are as they should be; 2 exam",
            ],
        ),
        pytest.param(
            "[[ $SLURM_PROCID = 0 ]] || exit 1;",
            1,
            ["bad: node1: no report within 60 s: it has not begun", "node0                ok", "--exclude=node1,"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "[[ $SLURM_PROCID = 0 ]] || export SLURM_GPUS_ON_NODE=8;",
            1,
            ["bad: node1: 0 GPUs, and the job has 8 on this node", "--exclude=node1,"],
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.timeout(900)
def test_on_two_nodes(cluster: Cluster, tmp_path: Path, command: str, status: int, lines: list[str]) -> None:
    script = tmp_path / "preflight.sh"
    script.write_text(SCRIPT.format(command=command, folder=tmp_path / "runs" / "new"))
    # a minute is enough for nodes, and not always for two on a machine that is busy with other tests
    limit, path = ("60", "") if status else ("300", f"{tmp_path}:")
    (tmp_path / "sitecustomize.py").write_text(QUICK)
    variables = {"PYTHONPATH": f"{path}{REPOSITORY}", "MASTER_ADDR": "127.0.0.1", "MILES_SPMD_PREFLIGHT": limit}
    began = time.monotonic()
    job = cluster.submit("--nodes=2", "--exclusive", f"--output={tmp_path}/log", "--time=60", script, **variables)
    assert job.wait() == "COMPLETED", job.log()
    assert f"status {status}" in job.log()
    for line in lines:
        assert line in job.log()
    if status:
        assert time.monotonic() - began < 90
    assert not list((tmp_path / "runs" / "new").iterdir())


def test_cores_are_those_of_affinity_and_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    here = len(os.sched_getaffinity(0))
    assert 1 <= environment.cores() <= here
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", str(4 * here))
    assert environment.cores_per_rank(4) == environment.cores()
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "1")
    assert environment.cores_per_rank(4) == 1
