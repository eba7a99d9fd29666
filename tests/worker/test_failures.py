"""A run in which something dies, hangs or raises: one clear line, a status of not 0, no process left, no long wait.

Real launcher, real processes. A run is held in a known phase by tests/worker/held.py, or by a reward that hangs, and
then hurt.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from miles_spmd.types.phase import Phase
from tests import forked
from tests.worker.tiny_run import REFERENCE_ENGINE, write_checkpoint, write_config

REPOSITORY = Path(__file__).parents[2]
START_SECONDS, END_SECONDS = 120, 20  # generous: other tests may use the machine


class Launched:
    """One run: with a ``deed`` under torchrun and held.py, without one by ``miles-spmd train``. Its processes are
    forked from one with all imports, or ``preloaded`` is false and it starts as a user starts it. They are found by
    their working directory, which each inherits."""

    def __init__(
        self,
        folder: Path,
        config: Path,
        *deed: str,
        preloaded: bool = True,
        ranks: int = 2,
        file_kib: int = 0,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.run_dir = folder, folder / "runs" / "tiny"
        command = ["-m", "miles_spmd", "train", str(config), "--nproc-per-node", str(ranks)]
        if deed:
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            command = [*torchrun, str(Path(__file__).with_name("held.py")), str(config), *deed]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HELD_FILE": str(folder / "held")}
        environment |= variables or {}
        self.launcher: forked.Program | subprocess.Popen[bytes]
        if preloaded:
            self.launcher = forked.start(command, folder, environment, folder / "stdout", folder / "stderr")
            return
        with (folder / "stderr").open("wb") as stderr, (folder / "stdout").open("wb") as stdout:
            limit = f"ulimit -f {file_kib}; " if file_kib else ""
            self.launcher = subprocess.Popen(
                ["bash", "-c", f'{limit}exec "$0" "$@"', sys.executable, *command],
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    def processes(self) -> list[int]:
        """All living processes of this run."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if entry.name.isdigit() and os.readlink(entry / "cwd") == str(self.folder):
                    found.append(int(entry.name))
        return found

    def controller(self) -> int | None:
        for pid in self.processes():
            if b"miles_spmd.controller" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        return None

    def wait_until_held(self) -> int:
        """The process that says so."""
        held = self.folder / "held"
        self._wait_for(lambda: held.exists() or self.launcher.poll() is not None, START_SECONDS)
        assert held.exists(), self.report()
        return int(held.read_text())

    def wait_for_steps(self, steps: int) -> None:
        metrics = self.run_dir / "metrics.jsonl"
        self._wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > steps, START_SECONDS)

    def wait_for_process(self, rank: int | None) -> int:
        """The process of this rank as soon as there is one; None: the controller."""

        def look() -> list[int]:
            found = []
            for pid in self.processes():
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    command, environment = (Path(f"/proc/{pid}/{n}").read_bytes() for n in ("cmdline", "environ"))
                    of_rank = b"miles_spmd\0train" in command and f"\0RANK={rank}\0".encode() in environment
                    if of_rank or (rank is None and b"miles_spmd.controller" in command):
                        found.append(pid)
            return found

        self._wait_for(lambda: bool(look()), START_SECONDS)
        return look()[0]

    def wait_for_ranks(self) -> list[int]:
        """The processes of all ranks as soon as they take care of signals."""
        found: dict[int, int] = {}

        def look() -> bool:
            for log in self.run_dir.glob("logs/**/rank-*.log"):
                started = re.match(r"--- .* pid (\d+)\n", log.read_text())
                if started:
                    status = Path(f"/proc/{started[1]}/status").read_text()
                    caught = re.search(r"SigCgt:\s*(\w+)", status)
                    assert caught
                    if int(caught[1], 16) >> (signal.SIGTERM - 1) & 1:
                        found[int(log.name.removeprefix("rank-").split(".")[0])] = int(started[1])
            return len(found) == 2

        self._wait_for(look, START_SECONDS)
        return [found[0], found[1]]

    def finish(self, seconds: float = END_SECONDS) -> str:
        """Waits for the end; checks what holds for every failure; returns the one message."""
        status = self.launcher.wait(seconds)
        assert status != 0, self.report()
        self._wait_for(lambda: not self.processes(), 5)
        lines = [line for line in self.stderr().splitlines() if line.startswith("miles-spmd: ")]
        assert len(lines) == 1, self.report()
        metrics = self.run_dir / "metrics.jsonl"
        if metrics.exists():  # each line whole, however the run ended
            assert all(isinstance(json.loads(line), dict) for line in metrics.read_text().splitlines())
        return lines[0].removeprefix("miles-spmd: ")

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def report(self) -> str:
        logs = sorted(self.run_dir.glob("logs/attempt_*/*"))
        return "\n".join([self.stderr(), *(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs)])

    def _wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{self.processes()}\n{self.report()}"
            time.sleep(0.05)

    def clean_up(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.launcher.wait()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def launch(tmp_path: Path, checkpoint: Path) -> Iterator[Callable[..., Launched]]:
    launched: list[Launched] = []

    def start(
        *deed: object, preloaded: bool = True, ranks: int = 2, file_kib: int = 0, **changes: dict[str, Any]
    ) -> Launched:
        changes["rollout"] = {"engine": REFERENCE_ENGINE} | changes.get("rollout", {})
        changes["determinism"] = {"parity": "off"}  # not for that engine, and a run would say so
        config = write_config(tmp_path, checkpoint, **changes)
        more: dict[str, Any] = {"preloaded": preloaded, "ranks": ranks, "file_kib": file_kib}
        launched.append(Launched(tmp_path, config, *map(str, deed), **more))
        return launched[-1]

    yield start
    for run in launched:
        run.clean_up()


Launch = Callable[..., Launched]


@pytest.mark.parametrize("engines", [0, 1], ids=["colocated", "disaggregated"])
def test_without_a_failure_all_is_quiet(launch: Launch, engines: int) -> None:
    run = launch(rollout={"rollout_num_gpus": engines}, preloaded=False)
    assert run.launcher.wait(START_SECONDS) == 0, run.report()
    assert "miles-spmd: " not in run.stderr()
    assert not run.processes()
    metrics = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 3
    assert not (run.run_dir / "logs" / "latest" / "controller.log").exists()


# --- a process dies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "rank", "place"),
    [
        (Phase.START, 1, "start"),
        (Phase.ROLLOUT, 1, "rollout, step 0"),
        (Phase.TRAIN, 0, "train, step 0"),
        (Phase.TRAIN, 1, "train, step 0"),
        (Phase.REFIT, 1, "refit, step 0"),
    ],
)
def test_a_killed_worker_is_named(launch: Launch, phase: Phase, rank: int, place: str) -> None:
    run = launch(phase, rank, "hang")
    pid = run.wait_until_held()
    time.sleep(1)  # until it has sent a heartbeat
    os.kill(pid, signal.SIGKILL)
    message = run.finish()
    assert message.startswith(f"rank {rank} ")
    assert f"died: {place}" in message


@pytest.mark.parametrize(
    ("phase", "rank", "place"),
    [
        (Phase.TRAIN, 0, "train, step 0"),  # while the engine is idle
        (Phase.REFIT, 0, "refit, step 0"),
        (Phase.REFIT, 1, "refit, step 0"),  # while the trainer sends to it
    ],
)
def test_a_killed_rank_of_either_side_is_named(launch: Launch, phase: Phase, rank: int, place: str) -> None:
    run = launch(phase, rank, "hang", rollout={"rollout_num_gpus": 1})
    pid = run.wait_until_held()
    time.sleep(1)  # until it has sent a heartbeat
    os.kill(pid, signal.SIGKILL)
    message = run.finish()
    assert message.startswith(f"rank {rank} ")
    assert f"died: {place}" in message


def test_an_engine_that_cannot_start_is_named(launch: Launch) -> None:
    """Its trainers, which wait for it to meet in a refit, end too."""
    run = launch(Phase.START, 1, "raise", rollout={"rollout_num_gpus": 1})
    assert "start: RuntimeError: the deed is done" in run.finish(START_SECONDS)


def test_a_worker_killed_before_it_could_connect(launch: Launch) -> None:
    run = launch(preloaded=False)  # with imports, it is long before it connects
    os.kill(run.wait_for_ranks()[1], signal.SIGKILL)
    message = run.finish()
    assert message.startswith("start: stopped by SIGTERM; rank ")
    assert message.endswith("1 had not connected")


def test_a_worker_killed_while_all_wait_for_a_reward(launch: Launch) -> None:
    """The controller hears of it from rank 0, which the launcher stops; the reward's process ends as well."""
    run = launch(reward={"rm_type": "tests.worker.rewards:hangs", "reward_workers": 1})
    run.wait_until_held()
    os.kill(run.wait_for_ranks()[1], signal.SIGKILL)
    message = run.finish()
    assert message.startswith("rank 1 (")
    assert "died: rollout, step 0" in message


def test_a_killed_controller_is_named(launch: Launch) -> None:
    run = launch(Phase.TRAIN, 1, "hang")
    run.wait_until_held()
    controller = run.controller()
    assert controller is not None
    os.kill(controller, signal.SIGKILL)
    message = run.finish()
    assert message.startswith("rank 0 (")
    assert message.endswith(f"train, step 0: the controller (pid {controller}) was killed by SIGKILL")


def test_a_killed_launcher_leaves_nothing_behind(launch: Launch) -> None:
    run = launch(Phase.TRAIN, 1, "hang")
    run.wait_until_held()
    run.launcher.kill()
    assert run.finish() == "train, step 0: the launcher died"


@pytest.mark.parametrize(
    ("rank", "ranks", "says"),
    [
        (None, 1, "start: the controller (pid {pid}) was killed by SIGKILL"),
        (0, 1, "rank 0 (pid {pid}) was killed by SIGKILL, and no process of the run said why"),
        pytest.param(1, 2, "rank 1 (pid {pid}) was killed by SIGKILL, ", marks=pytest.mark.slow),
    ],
)
def test_a_process_killed_while_it_imports_is_named(launch: Launch, rank: int | None, ranks: int, says: str) -> None:
    run = launch(preloaded=False, ranks=ranks)
    pid = run.wait_for_process(rank)
    os.kill(pid, signal.SIGKILL)
    assert says.format(pid=pid) in run.finish(START_SECONDS)


# --- the disk is full ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_kib", [8, pytest.param(20, marks=pytest.mark.slow)])
def test_a_full_disk_is_one_message(launch: Launch, file_kib: int) -> None:
    """Here a limit of every file's size. A message names the file, what is written is whole, nothing is a traceback."""
    many = {"num_rollout": 1000}
    run = launch(preloaded=False, ranks=1, file_kib=file_kib, run=many, telemetry={"use_tensorboard": True})
    message = run.finish(START_SECONDS)
    assert "OSError: [Errno 27] File too large: " in message
    assert message.split(" (traceback in ")[0].endswith("raise the limit, and continue with checkpoint.resume=true")
    assert "Traceback" not in run.stderr()
    settings = (run.run_dir / "config.toml").read_text()  # what the backends ran with is added to it, or is not
    assert settings.endswith("\n")
    ledger = run.run_dir / "ledger" / "chain.jsonl"
    chain = ledger.read_bytes() if ledger.exists() else b""
    assert chain.endswith(b"}\n") or not chain


def test_an_export_that_fails_leaves_a_checkpoint(launch: Launch, tmp_path: Path) -> None:
    """Something stands in its way that was not there at the start."""
    export = tmp_path / "export"
    run = launch(run={"num_rollout": 30}, checkpoint={"export_final": True, "export_dir": str(export)})
    run.wait_for_steps(1)
    (tmp_path / ".export.partial").write_text("a file in the place of a folder")
    message = run.finish()
    assert message.startswith(f"checkpoint, step 30: ExportError: {export}: export failed: ")
    saved = run.run_dir / "checkpoints" / "step_000030"
    assert f"`miles-spmd export {saved} OUT`" in message
    assert (saved / "controller.json").is_file()


# --- somebody stops it -----------------------------------------------------------------------------------------------


def test_ctrl_c_ends_the_run(launch: Launch) -> None:
    run = launch(reward={"rm_type": "tests.worker.rewards:hangs", "reward_workers": 1})
    run.wait_until_held()
    os.killpg(run.launcher.pid, signal.SIGINT)  # as a terminal does
    assert run.finish() == "rollout, step 0: stopped by SIGINT"
    assert "Traceback" not in run.stderr()
    assert run.launcher.returncode == 128 + signal.SIGINT


def test_ctrl_c_leaves_a_report_and_says_how_to_go_on(launch: Launch) -> None:
    run = launch(run={"num_rollout": 10000}, checkpoint={"export_final": False, "save_interval": 1})
    run.wait_for_steps(3)
    os.killpg(run.launcher.pid, signal.SIGINT)
    assert "stopped by SIGINT" in run.finish()
    said = (run.folder / "stdout").read_text()
    assert f"report:     {run.run_dir}/report.html\n" in said
    assert (run.run_dir / "report.html").is_file()
    assert f"checkpoint: {run.run_dir}/checkpoints/step_0" in said
    assert f"miles-spmd train {run.run_dir}/config.toml checkpoint.resume=true --nproc-per-node 2\n" in said
    assert len(run.stderr().splitlines()) == 1  # no library speaks


# --- something raises or hangs ---------------------------------------------------------------------------------------


def test_an_exception_in_a_worker_is_named(launch: Launch) -> None:
    run = launch(Phase.TRAIN, 1, "raise")
    message = run.finish(START_SECONDS)
    assert message.startswith("rank 1 (")
    assert "train, step 0: RuntimeError: the deed is done (traceback in " in message
    assert 'raise RuntimeError("the deed is done")' in (run.run_dir / "logs" / "latest" / "controller.log").read_text()


@pytest.mark.parametrize(("phase", "helps"), [(Phase.TRAIN, "train.max_tokens_per_gpu"), (Phase.ROLLOUT, "sglang.")])
def test_a_want_of_memory_is_explained(launch: Launch, phase: Phase, helps: str) -> None:
    run = launch(phase, 1, "exhaust")  # the other rank waits for it in a collective
    message = run.finish(START_SECONDS)
    assert message.startswith("rank 1 (")
    assert f"{phase}, step 0: DeviceMemoryError: no memory left on the host: [enforce fail" in message
    assert "; held: other tensors" in message
    assert f"What helps: {'lower' if phase is Phase.TRAIN else 'set'} {helps}" in message


def test_too_little_memory_is_said_at_the_start(launch: Launch) -> None:
    """What is only estimated is a warning, and the run goes on."""
    run = launch(train={"max_tokens_per_gpu": 2**40})
    assert run.launcher.wait(START_SECONDS) == 0, run.report()
    (warning,) = [line for line in run.stderr().splitlines() if line.startswith("miles-spmd: ")]
    assert warning.startswith("miles-spmd: warning: rank 0 (")
    assert "training takes at least" in warning
    assert "What helps: lower train.max_tokens_per_gpu" in warning
    for rank in (0, 1):
        assert "warning: training takes at least" in (run.run_dir / "logs" / "latest" / f"rank-{rank}.log").read_text()
    metrics = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 3


def test_an_exception_at_the_start_is_named(launch: Launch, checkpoint: Path, tmp_path: Path) -> None:
    truncated = tmp_path / "truncated"
    truncated.mkdir()
    for file in checkpoint.iterdir():
        (truncated / file.name).write_bytes(file.read_bytes()[: -100 if file.suffix == ".safetensors" else None])
    message = launch(model={"hf_checkpoint": str(truncated), "dtype": "float32"}).finish(START_SECONDS)
    assert message.startswith("rank ")
    assert "start: HuggingFaceCheckpointError: " in message


def test_a_raising_reward_is_named(launch: Launch) -> None:
    run = launch(reward={"rm_type": "tests.worker.rewards:raises"})
    message = run.finish(START_SECONDS)
    assert message.startswith("rollout, step 0: RewardError: ")
    assert "no such answer" in run.stderr()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reward_that_exits_is_named(launch: Launch, workers: int) -> None:
    run = launch(reward={"rm_type": "tests.worker.rewards:exits", "reward_workers": workers})
    message = run.finish(START_SECONDS)
    assert message.startswith("rollout, step 0: RewardError: reward 'tests.worker.rewards:exits' on prompt data.jsonl:")
    assert re.search(r"sample [01], called sys\.exit\(1\)", message)  # two processes may fail in any order


def test_a_filter_that_exits_is_named(launch: Launch) -> None:
    name = "tests.worker.rewards:filter_that_exits"
    message = launch(algorithm={"dynamic_sampling_filter": name}).finish(START_SECONDS)
    assert f"rollout, step 0: PlugInError: algorithm.dynamic_sampling_filter = {name!r} called sys.exit(0)" in message


def test_a_filter_that_hangs_is_named(launch: Launch) -> None:
    name = "tests.worker.rewards:filter_that_hangs"
    settings = {"algorithm": {"dynamic_sampling_filter": name}, "deadlines": {"train_timeout": 1.0}}
    message = launch(**settings).finish(START_SECONDS)
    assert f"algorithm.dynamic_sampling_filter = {name!r} took longer than deadlines.train_timeout = 1 s" in message


def test_a_label_that_the_reward_cannot_read_is_named_before_anything_starts(launch: Launch, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"{i} plus 1", "answer": str(i + 1)} for i in range(16)]
    rows[7]["answer"] = None
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"prompt_data": str(tmp_path / "bad.jsonl"), "label_key": "answer"}
    run = launch(data=data, reward={"rm_type": "math"})
    assert run.finish(START_SECONDS).endswith("config.toml: 1 error")
    expected = "bad.jsonl:8: the label None is neither a string nor a number (reward 'math'); correct it"
    assert expected in run.stderr()
    assert not (run.run_dir / "metrics.jsonl").exists() or not (run.run_dir / "metrics.jsonl").read_text()


def test_a_reward_that_is_no_number_is_named(launch: Launch) -> None:
    message = launch(reward={"rm_type": "tests.worker.rewards:not_a_number"}).finish(START_SECONDS)
    assert message.startswith("rollout, step 0: RewardError: ")
    assert "nan" in message


def test_equal_rewards_teach_nothing_and_stop_nobody(launch: Launch) -> None:
    run = launch(reward={"rm_type": "tests.worker.rewards:constant"}, run={"num_rollout": 2})
    assert run.launcher.wait(START_SECONDS) == 0, run.report()
    rows = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/loss" in row]
    assert len(steps) == 2
    for row in steps:
        assert (row["train/loss"], row["train/grad_norm"], row["train/skipped_steps"]) == (0, 0, 0)
        assert row["rollout/zero_std_groups"] == 4


def test_a_filter_that_leaves_nothing_ends_the_run(launch: Launch) -> None:
    filtering = {"dynamic_sampling_filter": "reward_nonzero_std"}
    message = launch(reward={"rm_type": "tests.worker.rewards:constant"}, algorithm=filtering).finish(START_SECONDS)
    assert message.startswith("rollout, step 0: FilterError: ")
    assert "kept fewer than 4 of 36 groups" in message


def test_a_missed_deadline_ends_the_run_with_stacks(launch: Launch) -> None:
    run = launch(Phase.TRAIN, 1, "hang", deadlines={"train_timeout": 2.0})
    run.wait_until_held()
    message = run.finish()
    assert message == "train, step 0: rank 0, 1 did not reply within 2 s"
    report = run.stderr()
    assert "do_deed (held.py:" in report  # where rank 1 is
    assert "rank 0 (" in report
    assert "do_deed" in (run.run_dir / "logs" / "latest" / "rank-1.stacks").read_text()
    assert "all_reduce" in (run.run_dir / "logs" / "latest" / "rank-0.stacks").read_text()  # where it waits for rank 1
