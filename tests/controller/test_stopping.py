"""A run that is requested to stop: what it decides in the time that is left, and that it equals, once it is continued,
a run that never stopped. The real loop in this process, real ranks beside it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from miles_spmd.config import Config
from miles_spmd.controller.checkpoint_folders import RESPONSES_FILE, newest, read
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.cluster.pending_call import PendingCall
from miles_spmd.controller.cluster.rollout_session import RolloutSession
from miles_spmd.controller.journal import events
from miles_spmd.controller.journal.stopping import Stopping
from miles_spmd.controller.learning.policy import Policy
from miles_spmd.ledger.chain import FILE, FOLDER, verify
from miles_spmd.protocol.commands import Command, Generate, SaveCheckpoint, TrainStep
from miles_spmd.protocol.messages import ReleasePasses
from miles_spmd.protocol.router import Router
from miles_spmd.telemetry.progress import KINDS, Progress
from miles_spmd.telemetry.trackers import read_metrics
from miles_spmd.types.variables import VariableError, job_end
from tests.controller.duel import TWO
from tests.ledger.runs import ended, train
from tests.ranks import Ranks
from tests.worker.test_judge import LONGEST_REPLY, REWARD, write_judge
from tests.worker.tiny_run import REFERENCE_ENGINE, write_checkpoint, write_config

STEPS = 4


# --- decisions -------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path: Path) -> Callable[..., Stopping]:
    """In step 5, and asked to stop with so many seconds left; the step before took 10 s of rollout and 20 s of
    training, and its checkpoint 4 s."""

    def make(seconds: float | None = None, *, measured: bool = True, **environment: str) -> Stopping:
        stopping = Stopping(tmp_path, environment)
        stopping.begin(4)
        if measured:
            for phase, spent in (("rollout", 10.0), ("train", 20.0)):
                stopping.observe(events.PhaseFinished(phase, spent))
            stopping.observe(events.StepFinished(4))
            stopping.observe(events.PhaseFinished("save", 1.0))
            stopping.observe(events.CheckpointCompleted(4, 3.0, 1))
        if seconds is not None:
            stopping._take("SIGUSR1", seconds, time.monotonic())
        return stopping

    return make


# 1.3 * (30 + 4) + 5 = 49.2
@pytest.mark.parametrize(("seconds", "leaves"), [(51.0, False), (48.0, True), (1.0, True), (float("inf"), False)])
def test_a_step_is_finished_where_that_and_a_checkpoint_fit(
    asked: Callable[..., Stopping], seconds: float, leaves: bool
) -> None:
    assert asked(seconds).must_leave(drains=True) is leaves
    assert asked(seconds).must_leave() is leaves


def test_what_is_done_of_a_step_does_not_count_again(asked: Callable[..., Stopping]) -> None:
    stopping = asked(38.0)
    stopping.observe(events.PhaseFinished("rollout", 7.0))  # 1.3 * (20 + 4) + 5 = 36.2
    assert not stopping.must_leave()
    stopping = asked(36.0)
    stopping.observe(events.PhaseFinished("rollout", 7.0))
    assert stopping.must_leave()


def test_before_a_measured_step_it_is_left(asked: Callable[..., Stopping]) -> None:
    assert asked(10000.0, measured=False).must_leave(drains=True)
    assert not asked(float("inf"), measured=False).must_leave(drains=True)  # by a file without seconds


def test_only_near_the_end_of_the_job_a_rollout_is_left_unasked(asked: Callable[..., Stopping]) -> None:
    """It goes on while a checkpoint still fits, because nothing of it is lost. Training that cannot end does not
    begin."""
    stopping = asked(SLURM_JOB_END_TIME=str(time.time() + 30))
    assert not stopping.must_leave(drains=True)
    assert stopping.source == ""
    assert stopping.must_leave()
    assert stopping.source == "the end of the job"
    assert asked(SLURM_JOB_END_TIME=str(time.time() + 9)).must_leave(drains=True)
    assert not asked(SLURM_JOB_END_TIME=str(time.time() + 60)).must_leave()


def test_the_end_of_the_job_limits_what_a_signal_leaves(asked: Callable[..., Stopping]) -> None:
    assert asked(300.0, MILES_SPMD_JOB_END=str(time.time() + 40)).must_leave()


@pytest.mark.parametrize(
    ("environment", "end"),
    [
        ({"SLURM_JOB_END_TIME": "1000", "MILES_SPMD_JOB_END": "2000"}, 1000.0),
        ({"SLURM_JOB_END_TIME": "", "MILES_SPMD_JOB_END": "2000"}, 2000.0),  # as Slurm 22.05 leaves it
        ({"SLURM_JOB_END_TIME": "Unknown"}, float("inf")),
        ({}, float("inf")),
    ],
)
def test_job_end(environment: dict[str, str], end: float) -> None:
    assert job_end(environment) == end


@pytest.mark.parametrize(
    ("content", "left"),
    [
        (b"", "no time limit"),
        (b" 120\n", "120 s left"),
        (b"soon", "no time limit"),
        (b"nan", "no time limit"),
        (b"\xff\xfe" * 2**20, "no time limit"),
        (b"-5", "0 s left"),
    ],
    ids=["empty", "seconds", "word", "nan", "binary", "negative"],
)
def test_what_a_stop_file_says(asked: Callable[..., Stopping], tmp_path: Path, content: bytes, left: str) -> None:
    stopping, lines = asked(), list[str]()
    stopping.show = lines.append
    (tmp_path / "stop").write_bytes(content)
    stopping._look()
    assert lines[0].startswith(f"stopping: {tmp_path}/stop, {left}: ")
    assert not (tmp_path / "stop").exists()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_stop_file(asked: Callable[..., Stopping], tmp_path: Path, make: Callable[[Path], None]) -> None:
    """A pipe would be waited for, and with it every other request to stop."""
    stopping = asked()
    make(tmp_path / "stop")
    stopping._look()
    assert not stopping.source


@pytest.mark.parametrize("value", ["soon", "2026-11-30T10:00", "-5", "0", "nan", "1e400"])
def test_an_end_of_the_job_that_is_none(value: str) -> None:
    with pytest.raises(VariableError, match=r"MILES_SPMD_JOB_END in the environment has to be a finite number above 0"):
        job_end({"SLURM_JOB_END_TIME": "1000", "MILES_SPMD_JOB_END": value})


def test_signals_of_all_processes_are_one_request(asked: Callable[..., Stopping]) -> None:
    stopping, now = asked(100.0), time.monotonic()
    stopping._take("SIGUSR1", None, now + 0.1)
    assert not stopping.hurried
    assert 95 < stopping.left <= 100
    stopping._take("SIGTERM", None, now + 0.2)  # in 30 s its sender kills the run
    assert not stopping.hurried
    assert 25 < stopping.left <= 30.2
    stopping._take("SIGTERM", None, now + 5)
    assert stopping.hurried
    assert 10 < stopping.left <= 15


# --- whole runs ------------------------------------------------------------------------------------------------------


class Lines(Progress):
    lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(autouse=True)
def lines() -> Iterator[list[str]]:
    """What runs print; another fixture's patches may be undone meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lines, "lines", [])
        patch.setitem(KINDS, "none", Lines)
        yield Lines.lines


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """SGLang, a filter that drops groups, one optimizer step for each rollout unless told otherwise."""
    from miles_spmd.config.load import load_config

    folder = tmp_path_factory.mktemp("stopping")
    file = write_config(
        folder,
        write_checkpoint(folder / "model"),
        run={"num_rollout": STEPS},
        rollout={
            "n_samples_per_prompt": 3,
            "rollout_max_response_len": 60,
            "rollout_stop_token_ids": list(range(0, 500, 25)),  # so that lengths differ
        },
        algorithm={"dynamic_sampling_filter": "reward_nonzero_std"},
        reward={"rm_type": "tests.recipe_run:coin", "reward_workers": 1},
        determinism={"deterministic": True},
        telemetry={"progress": "none"},
        megatron={"lr": 1e-3},
    )
    return lambda name, *overrides: load_config(file, [f"run.name={name}", "checkpoint.save_interval=2", *overrides])


@pytest.fixture(scope="module")
def undisturbed(ranks: Ranks, recipe: Callable[..., Config]) -> Path:
    return train(ranks, recipe("undisturbed"))


class Interruption:
    """Requests a stop at a place of a run, with so many seconds left."""

    def __init__(self, stopping: Stopping, seconds: float, kind: type[Command], step: int, outputs: int = 0) -> None:
        self.stopping, self.seconds, self.kind, self.step, self.outputs = stopping, seconds, kind, step, outputs

    def now(self) -> None:
        if not self.stopping.source:
            self.stopping._take("SIGUSR1", self.seconds, time.monotonic())


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stopping]:
    """A request to stop as soon as a command of this kind is sent in this step; in a rollout, as soon as so many
    responses are complete."""

    def install(config: Config, kind: type[Command], step: int, *, seconds: float = 1.0, outputs: int = 0) -> Stopping:
        one = Interruption(Stopping(config.run_dir, {}), seconds, kind, step, outputs)
        begin, next_output = Cluster.begin, RolloutSession.next
        count = 0

        def begin_and_ask(self: Cluster, command: Command, *, step: int, **more: Any) -> PendingCall:
            call: PendingCall = begin(self, command, step=step, **more)
            first = command[0] if isinstance(command, list) else command
            if isinstance(first, kind) and step == one.step and not outputs:
                one.now()
            return call

        def next_and_ask(self: RolloutSession, *args: Callable[[], bool], **more: Callable[[], bool]) -> object:
            nonlocal count
            output = next_output(self, *args, **more)
            if output is not None and one.stopping.step == step and kind is Generate:
                count += 1
                if count == outputs:
                    one.now()
            return output

        monkeypatch.setattr(Cluster, "begin", begin_and_ask)
        monkeypatch.setattr(RolloutSession, "next", next_and_ask)
        return one.stopping

    return install


Interrupt = Callable[..., Stopping]


def equal(folder: Path, undisturbed: Path) -> bool:
    return (folder / FOLDER / FILE).read_bytes() == (undisturbed / FOLDER / FILE).read_bytes()


@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_rollout_is_continued_where_it_was_left(
    ranks: Ranks,
    recipe: Callable[..., Config],
    undisturbed: Path,
    interrupt: Interrupt,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[str],
    step: int,
) -> None:
    """Before step 2 a checkpoint was due, before the others it was not. The continued run has the very same ledger."""
    config = recipe(f"rollout_{step}")
    said = ended(ranks, config, stopping=interrupt(config, Generate, step, outputs=4))
    found = re.fullmatch(
        rf"stopped by SIGUSR1 in step {step}: (\d+ complete and (\d+) partial responses .*) are saved", said
    )
    assert found, said
    assert int(found[2]) > 0
    folder = newest(config.run_dir)
    assert folder is not None
    assert (folder.name, (folder / RESPONSES_FILE).is_file()) == (f"step_{step:06d}", True)
    assert max(read_metrics(config.run_dir / "metrics.jsonl")) == step
    monkeypatch.undo()
    submitted = spy_on_requests(monkeypatch)
    train(ranks, recipe(f"rollout_{step}", "checkpoint.resume=true"))
    assert f"step {step} continues {found[1]}" in lines
    continued = [request.begun for request in submitted if request.begun is not None]
    assert len(continued) == int(found[2])
    assert sum(len(begun.output_ids) for begun in continued) > 0
    assert equal(config.run_dir, undisturbed)
    verify(config.run_dir)


def test_a_rollout_of_two_policies_is_continued_where_it_was_left(
    ranks: Ranks, recipe: Callable[..., Config], interrupt: Interrupt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of games, with the estimator's baselines and what each of the policies has sampled."""
    settings = [
        *TWO,
        'second_policy.second_roles=["second"]',
        "run.num_rollout=3",
        f"rollout.engine={REFERENCE_ENGINE}",
    ]
    whole = train(ranks, recipe("whole_two", *settings), 2)
    config = recipe("stopped_two", *settings)
    said = ended(ranks, config, 2, stopping=interrupt(config, Generate, 1, outputs=17))
    assert re.fullmatch(r"stopped by SIGUSR1 in step 1: \d+ complete and \d+ partial responses .*are saved", said), said
    monkeypatch.undo()
    submitted = spy_on_requests(monkeypatch)
    train(ranks, recipe("stopped_two", *settings, "checkpoint.resume=true"), 2)
    assert 48 < len(submitted) <= 2 * 48 - 17  # of the steps 1 and 2
    assert equal(config.run_dir, whole)


def test_a_judge_goes_on_where_it_was_left(
    ranks: Ranks,
    recipe: Callable[..., Config],
    interrupt: Interrupt,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """What had no score yet is judged again, and gets the score that it would have got."""
    settings = {name: str(value) for name, value in REWARD.items()}
    settings |= {"judge_hf_checkpoint": str(write_judge(tmp_path / "judge")), "judge_prompt": "{response} {label}"}
    settings["judge_arguments"] = f"{{ max_tokens = {LONGEST_REPLY} }}"
    judged = [f"reward.{name}={value}" for name, value in settings.items()]
    whole = train(ranks, recipe("judged", *judged), size=2)
    config = recipe("judged_again", *judged)
    said = ended(ranks, config, size=2, stopping=interrupt(config, Generate, 1, outputs=16))
    assert said.startswith("stopped by SIGUSR1 in step 1: "), said
    monkeypatch.undo()
    train(ranks, recipe("judged_again", *judged, "checkpoint.resume=true"), size=2)
    assert equal(config.run_dir, whole)


def spy_on_requests(monkeypatch: pytest.MonkeyPatch) -> list:
    submitted: list = []
    submit = RolloutSession.submit

    def noted(self: RolloutSession, requests: list) -> None:
        submitted.extend(requests)
        submit(self, requests)

    monkeypatch.setattr(RolloutSession, "submit", noted)
    return submitted


def test_between_steps_all_is_saved(
    ranks: Ranks,
    recipe: Callable[..., Config],
    undisturbed: Path,
    interrupt: Interrupt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Requested during the optimizer step, with time enough for it and for a checkpoint."""
    config = recipe("between")
    said = ended(ranks, config, stopping=interrupt(config, TrainStep, 2, seconds=600.0))
    assert said == "stopped by SIGUSR1 before step 3: all is saved"
    folder = newest(config.run_dir)
    assert folder is not None
    assert (read(folder).step, (folder / RESPONSES_FILE).exists()) == (3, False)
    assert max(read_metrics(config.run_dir / "metrics.jsonl")) == 3
    monkeypatch.undo()
    train(ranks, recipe("between", "checkpoint.resume=true"))
    assert equal(config.run_dir, undisturbed)


def test_in_a_checkpoint_it_is_completed(
    ranks: Ranks,
    recipe: Callable[..., Config],
    undisturbed: Path,
    interrupt: Interrupt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = recipe("saving")
    said = ended(ranks, config, stopping=interrupt(config, SaveCheckpoint, 2))
    assert said == "stopped by SIGUSR1 before step 2: all is saved"
    monkeypatch.undo()
    train(ranks, recipe("saving", "checkpoint.resume=true"))
    assert equal(config.run_dir, undisturbed)


@pytest.mark.parametrize("size", [1, 2])
def test_an_optimizer_step_is_abandoned_as_a_whole(
    ranks: Ranks,
    recipe: Callable[..., Config],
    interrupt: Interrupt,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[str],
    size: int,
) -> None:
    """Its responses are complete and are trained on when the run continues. Micro-batches are small, so that many
    forward passes are left; on two ranks, one of them is slower."""
    settings = ["run.num_rollout=2", "train.max_tokens_per_gpu=100", "train.reduction_leaves=2"]
    settings.append("algorithm.advantage_estimator=rae")  # the step's own change of its baseline does not count
    whole = train(ranks, recipe(f"whole_{size}", *settings), size)
    config = recipe(f"abandoned_{size}", *settings)
    stopping = interrupt(config, TrainStep, 1)
    send = Router.send
    sent: list[ReleasePasses] = []

    def noted(self: Router, message: Any, peers: list[bytes]) -> None:
        if isinstance(message, ReleasePasses):
            sent.append(message)
        send(self, message, peers)

    monkeypatch.setattr(Router, "send", noted)
    said = ended(ranks, config, size, stopping=stopping)
    assert re.fullmatch(r"stopped by SIGUSR1 in step 1: \d+ complete and 0 partial responses are saved", said), said
    (released,) = sent
    assert released.limit is not None
    assert max(verify(config.run_dir).steps) == 0
    monkeypatch.undo()
    train(ranks, recipe(f"abandoned_{size}", *settings, "checkpoint.resume=true"), size)
    assert equal(config.run_dir, whole)


def test_after_some_updates_the_last_checkpoint_counts(
    ranks: Ranks, recipe: Callable[..., Config], interrupt: Interrupt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is over when the second of two updates is to begin."""
    settings = ["run.num_rollout=4", "train.global_batch_size=6"]
    config = recipe("updates", *settings)
    stopping = interrupt(config, TrainStep, 3, seconds=600.0)
    over = Policy.train

    def late(self: Policy, step: int, batch: Any) -> None:
        over(self, step, batch)
        if step == 3:
            stopping._deadline = time.monotonic()

    monkeypatch.setattr(Policy, "train", late)
    said = ended(ranks, config, stopping=stopping)
    assert said == (
        "stopped by SIGUSR1 in step 3, after 1 of its updates: the steps 2 to 3 have to be done again, from step_000002"
    )


def test_responses_are_dropped_where_the_engine_computes_otherwise(
    ranks: Ranks, recipe: Callable[..., Config], interrupt: Interrupt, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    config = recipe("changed", "run.num_rollout=1")
    said = ended(ranks, config, stopping=interrupt(config, Generate, 0, outputs=4))
    assert lines[0].startswith("stopping: SIGUSR1, 1 s left: leaving step 0, whose end cannot be estimated")
    lines.clear()
    monkeypatch.undo()
    submitted = spy_on_requests(monkeypatch)
    settings = ["run.num_rollout=1", "checkpoint.resume=true"]
    train(ranks, recipe("changed", *settings, "sglang.chunked_prefill_size=64"))
    kept = re.search(r"in step 0: (.*) are saved", said)
    assert kept
    assert lines == [f"step 0 begins anew, without {kept[1]}: sglang.chunked_prefill_size was None, now 64"]
    assert submitted
    assert all(request.begun is None for request in submitted)


def test_another_temperature_gives_other_requests(
    ranks: Ranks, recipe: Callable[..., Config], interrupt: Interrupt, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe("warmer", "run.num_rollout=1")
    assert "are saved" in ended(ranks, config, stopping=interrupt(config, Generate, 0, outputs=4))
    monkeypatch.undo()
    submitted = spy_on_requests(monkeypatch)
    train(ranks, recipe("warmer", "run.num_rollout=1", "checkpoint.resume=true", "rollout.rollout_temperature=1.4"))
    assert submitted
    assert all(request.begun is None for request in submitted)
