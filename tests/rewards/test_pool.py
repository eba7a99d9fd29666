"""The pool with real processes: what good functions return, and that every way to fail is one RewardError."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from miles_spmd.config import RewardConfig, RewardTerm
from miles_spmd.plugins.reward import RewardError, Score, TrainerState
from miles_spmd.rewards.pool import RewardPool, combined
from miles_spmd.types.sample import Prompt, Sample
from miles_spmd.types.trajectory import Segment, Trajectory
from tests.samples import sample_of

HERE = "tests.rewards.user_functions:"


def group(*texts: str, uid: str = "gsm8k:1", label: Any = "19", **metadata: Any) -> list[Sample]:
    prompt = Prompt(uid, "seven plus 12 =", [1, 2], label, metadata)
    return [sample_of(prompt, i, [5] * len(t), [-0.5] * len(t), text=t) for i, t in enumerate(texts)]


def is_reward_process(process: psutil.Process) -> bool:
    try:
        return "rewards.process" in " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return False


def children() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if is_reward_process(process)]


@pytest.fixture(autouse=True)
def _no_process_stays() -> Iterator[None]:
    before = {p.pid for p in children()}
    yield
    assert {p.pid for p in children()} <= before


def scores(function: str, samples: list[Sample], **settings: Any) -> list[Score]:
    with RewardPool(RewardConfig(rm_type=function, **{"reward_workers": 1} | settings)) as pool:
        return pool.submit(samples).result(timeout=60)


def values(function: str, samples: list[Sample], **settings: Any) -> list[float]:
    return [s.value for s in scores(function, samples, **settings)]


def test_own_shapes() -> None:
    samples = group("a", "bbb", "cc") + group("dddd", "e", uid="gsm8k:2")
    assert values(HERE + "length", samples) == [1, 3, 2, 4, 1]
    assert values(HERE + "ranked", samples, reward_batched=True) == [0, 2, 1, 1, 0]
    assert values(HERE + "ranked_async", samples, reward_batched=True) == [0, 2, 1, 1, 0]
    assert values(HERE + "judge", samples) == [0, 2, 4, 0, 2]
    assert scores(HERE + "detailed", samples[1:2]) == [Score(1.0, {"words": 2.0, "right": 1.0})]
    assert values(HERE + "length", []) == []


def test_async_samples_wait_at_the_same_time() -> None:
    with RewardPool(RewardConfig(rm_type=HERE + "length_async", reward_workers=1)) as pool:
        start = time.monotonic()
        assert [s.value for s in pool.submit(group(*"abcdefgh")).result(timeout=60)] == [1.0] * 8
        assert time.monotonic() - start < 2  # 8 x 0.5 s one after the other


def test_trl_shapes() -> None:
    assert values(HERE + "trl_reference", group("19", "20", answer="19")) == [1, 0]
    talk = [{"role": "user", "content": "seven plus 12?"}]
    assert values(HERE + "trl_conversational", group("19", "20", label=19, messages=talk)) == [1, 0]
    assert values(HERE + "trl_async", group("19", "200")) == [2, 3]
    turns = group("19", "20", messages=talk)
    turns[1].trajectory.messages = [*talk, {"role": "assistant"}, {"role": "tool"}, {"role": "assistant"}]
    assert values(HERE + "trl_turns", turns) == [1, 3]


def test_what_trl_documents() -> None:
    """The examples of TRL's documentation: without completions, with metrics, and for one task of several."""
    assert values(HERE + "trl_ids", group("19", "200")) == [2, 3]
    found = scores(HERE + "trl_logging", group("19", "20"))
    assert found == [Score(1.0, {"accuracy": 0.5}), Score(0.0, {"accuracy": 0.5})]
    assert scores(HERE + "trl_logging_async", group("19", "20")) == found
    tasks = [{"rm_type": HERE + f"trl_task_{name}", "reward_weight": 2} for name in ("math", "code")]
    settings = tasks[0] | {"further": tasks[1:]}
    samples = group("19", "1", task="math") + group("def", uid="code:1", task="code")
    assert scores(settings.pop("rm_type"), samples, **settings) == [
        Score(4.0, {"trl_task_math": 2.0}),
        Score(2.0, {"trl_task_math": 1.0}),
        Score(6.0, {"trl_task_code": 3.0}),
    ]


@pytest.mark.parametrize("name", ["trl_state", "trl_state_async"])
def test_a_function_of_trl_may_read_where_the_run_is(name: str) -> None:
    with RewardPool(RewardConfig(rm_type=HERE + name, reward_workers=1)) as pool:
        futures = [pool.submit(group("a", "b"), state=TrainerState(step, 8)) for step in (0, 2, 6)]
        assert [[score.value for score in one.result(60)] for one in futures] == [[0, 0], [0.25, 0.25], [0.75, 0.75]]


def test_verl_shapes() -> None:
    assert values(HERE + "verl_group", group("19", "20", extra_info={"index": 4})) == [5, 4]
    result = scores(HERE + "verl_full", group("19", "20", extra_info={"index": 4}))
    assert result == [Score(1.0, {"gsm8k": 1.0, "extra": 4.0}), Score(0.0, {"gsm8k": 1.0, "extra": 4.0})]
    assert values(HERE + "verl_full", group("19", data_source="x", index=7)) == [1]
    assert values(HERE + "verl_short", group("19", "20")) == [1, 0]


def test_built_in_rewards() -> None:
    samples = group("19", r"\boxed{19}", " 19\n", "nineteen")
    assert values("exact", samples) == [1, 0, 1, 0]
    assert values("math", samples) == [1, 1, 1, 0]


def test_what_math_cannot_verify_is_wrong_and_the_pool_lives_on() -> None:
    tower = r"\boxed{9^{9^{9^9}}}"
    with RewardPool(RewardConfig(rm_type="math", reward_workers=1, reward_timeout=3, reward_memory_gib=1)) as pool:
        one, other = pool.submit(group(tower, r"\boxed{19}", label=5)).result(timeout=60)
        assert (one, other) == (Score(0, {"killed": 1}), Score(0, {"killed": 0}))  # the mean is the share of the killed
        assert pool.submit(group(r"\boxed{19}")).result(timeout=60) == [Score(1, {"killed": 0})]


FAILURES = {
    "raises": "sample 1, raised KeyError: 'no such thing'",
    "raises_unspeakably": "sample 0, raised Unspeakable: an object of the class Unspeakable",
    "unspeakable": "sample 0, returned an object of the class Unspeakable instead of a finite number",
    "enormous": "sample 0, returned 1000",
    "detail_is_enormous": "sample 0, returned 'right': nan; a detail is a finite number with a printable name",
    "detail_has_no_name": "sample 0, returned '\\x1b[31m': 1.0; a detail is a finite number with a printable name",
    "hangs": "sample 1, took longer than reward.reward_timeout = 1 s",
    "hangs_async": "sample 1, took longer than reward.reward_timeout = 1 s",
    "blocks_async": "took longer than reward.reward_timeout = 1 s",
    "nan": "sample 0, returned nan instead of a finite number",
    "infinite": "sample 0, returned inf instead of a finite number",
    "none": "sample 0, returned None, which leaves a sample to other functions",
    "text": "sample 0, returned '1.0' instead of a finite number",
    "scoreless": "sample 0, returned an object without 'score' (it has reward)",
    "trl_none": "sample 0, returned None, which leaves a sample to other functions",
    "trl_environments": "requires environments, which TRL's environment_factory makes; here they are in other",
    "trl_state_of_transformers": "AttributeError: trainer_state has no 'epoch' here; it has global_step, max_steps",
    "trl_missing_column": "requires solution, but the data has only",
    "eats_memory": "sample 0, ran out of the memory that reward.reward_memory_gib allows",
    "exits": "sample 0, ended its process (exit code 7)",
    "stopped_by_signal": "sample 0, ended its process (exit code -11, killed by SIGSEGV)",
    "exits_politely": "sample 0, called sys.exit(3)",
    "exits_politely_async": "sample 0, called sys.exit(3)",
    "exits_without_error": "sample 0, ended its process (exit code 0)",
    "kills_itself": "sample 0, ended its process (exit code -9, killed by SIGKILL)",
}


@pytest.mark.parametrize("name", FAILURES)
def test_every_failure_names_function_prompt_and_sample(name: str) -> None:
    with pytest.raises(RewardError) as caught:
        values(HERE + name, group("a", "b"), reward_timeout=1, reward_memory_gib=1)
    message = str(caught.value)
    assert message.startswith(f"reward '{HERE}{name}' on prompt gsm8k:1")
    assert FAILURES[name] in message
    assert "fix the function" in message or "return a number" in message
    assert ("Traceback" in message) == (
        name in ("raises", "raises_unspeakably", "exits_politely", "exits_politely_async", "trl_state_of_transformers")
    )


def test_a_group_reward_that_exits() -> None:
    with pytest.raises(RewardError, match=r"on prompt gsm8k:1 called sys.exit\(None\)"):
        values(HERE + "exits_politely_as_group", group("a", "b"), reward_batched=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_after_an_exit_the_pool_lives_on(workers: int) -> None:
    with RewardPool(RewardConfig(rm_type=HERE + "exits", reward_workers=workers)) as pool:
        for _ in range(2 * workers):
            with pytest.raises(RewardError, match="exit code 7"):
                pool.submit(group("a")).result(timeout=60)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV])
@pytest.mark.parametrize(("name", "pause"), [("process_id", 0.2), ("process_id_async", 0), ("process_ids", 0)])
def test_a_process_that_is_killed_while_idle_is_replaced(name: str, pause: float, number: signal.Signals) -> None:
    settings = {"reward_batched": name == "process_ids", "reward_workers": 1}
    with RewardPool(RewardConfig(rm_type=HERE + name, **settings)) as pool:
        seen = set()
        for _ in range(3):
            (score,) = pool.submit(group("a")).result(timeout=60)
            seen.add(score.value)
            os.kill(int(score.value), number)
            time.sleep(pause)
        assert len(seen) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_to_stop_the_run_ends_no_process(number: signal.Signals) -> None:
    """It may reach all processes of a run, which then scores what it has."""
    with RewardPool(RewardConfig(rm_type=HERE + "process_id", reward_workers=1)) as pool:
        (score,) = pool.submit(group("a")).result(timeout=60)
        os.kill(int(score.value), number)
        assert pool.submit(group("a")).result(timeout=60)[0].value == score.value


def test_a_process_that_is_stopped_is_killed_in_time() -> None:
    """A stopped process reads nothing: a large group does not fit into the pipe, and sending it has a deadline too."""
    with RewardPool(RewardConfig(rm_type=HERE + "process_id", reward_workers=1, reward_timeout=1)) as pool:
        (score,) = pool.submit(group("a")).result(timeout=60)
        os.kill(int(score.value), signal.SIGSTOP)
        with pytest.raises(RewardError, match="sample 0, took longer than reward"):
            pool.submit(group("x" * 10_000_000)).result(timeout=60)
        assert pool.submit(group("a")).result(timeout=60)[0].value != score.value


def test_what_a_function_has_started_does_not_hide_its_end() -> None:
    with RewardPool(RewardConfig(rm_type=HERE + "leaves_a_fork", reward_workers=1)) as pool:
        start = time.monotonic()
        with pytest.raises(RewardError, match="exit code 4"):
            pool.submit(group("a")).result(timeout=60)
        assert time.monotonic() - start < 4


def test_a_program_that_a_function_waits_for_ends_with_it() -> None:
    with pytest.raises(RewardError, match="took longer"):
        values(HERE + "starts_a_program", group("a"), reward_timeout=1)
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "6173"]]


def test_what_a_function_writes_does_not_reach_the_terminal_raw(tmp_path: Path) -> None:
    log = tmp_path / "rewards.log"
    config = RewardConfig(rm_type=HERE + "escapes", reward_workers=1)
    with RewardPool(config, log=log) as pool, pytest.raises(RewardError) as caught:
        pool.submit(group("a")).result(timeout=60)
    message = str(caught.value)
    assert "sample 0, raised ValueError: \\x1b[31mred" in message
    assert "\033" not in message
    assert len(message) < 10_000
    assert log.read_text() == "\033[31m printed\n"


def test_secrets_are_withheld(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "DB_PASSWORD",
        "GITHUB_PAT",
        "HTTPS_PROXY",
        "JUDGE_KEY",
    ]
    public = ["TOKENIZERS_PARALLELISM", "KEYBOARD", "MONKEY", "MY_SETTING"]
    for name in (*secret, *public):
        monkeypatch.setenv(name, "http://me:secret@proxy" if name == "HTTPS_PROXY" else "1")
    samples = group("a", names=[*secret, *public, "PATH"])
    (score,) = scores(HERE + "environment", samples, reward_environment=["JUDGE_KEY"])
    assert {name for name, seen in score.detail.items() if seen} == {*public, "PATH", "JUDGE_KEY"}


def test_weighted_rewards() -> None:
    further = [RewardTerm(rm_type="exact", reward_weight=2), RewardTerm(rm_type=HERE + "detailed", reward_weight=-0.5)]
    config = RewardConfig(rm_type=HERE + "ranked", reward_batched=True, further=further, reward_workers=2)
    with RewardPool(config, [RewardTerm(rm_type=HERE + "length")]) as pool:
        first, second = pool.submit(group("19", "192")).result(timeout=60)
        assert first.value == 0 + 2 * 1 - 0.5 * 0
        assert second.value == 1 + 2 * 0 - 0.5 * 1
        details = {"detailed/words": 2.0, "detailed/right": 1.0}
        assert first.detail == {"ranked": 0.0, "exact": 1.0, "detailed": 0.0, **details}
        assert second.detail == {"ranked": 1.0, "exact": 0.0, "detailed": 1.0, **details}
        (alone,) = pool.submit(group("192"), [RewardTerm(rm_type=HERE + "length")]).result(timeout=60)
        assert alone == Score(3.0)


def conversation() -> Sample:
    segments = [Segment([5, 6]), Segment([7], sampled=False), Segment([8])]
    return Sample(Prompt("data:0", "", [1]), 0, Trajectory([1], segments))


def test_rewards_of_turns() -> None:
    assert scores(HERE + "by_turn", [conversation()]) == [Score(3.0, {}, [2.0, 1.0])]
    assert scores(HERE + "by_turn_and_whole", [conversation()]) == [Score(10.0, {}, [2.0, 1.0])]
    terms = [RewardTerm(rm_type=HERE + "by_turn", reward_weight=0.5), RewardTerm(rm_type=HERE + "by_turn_and_whole")]
    terms.append(RewardTerm(rm_type=HERE + "length", reward_weight=100))
    weighted = combined(terms, [Score(3.0, {}, [2.0, 1.0]), Score(10.0, {}, [2.0, 1.0]), Score(0.0)])
    assert (weighted.value, weighted.turn_rewards) == (11.5, [3.0, 1.5])
    for name, shown in (("by_too_few_turns", r"\[1\]"), ("by_turn_not_finite", r"\[nan, nan\]")):
        with pytest.raises(RewardError, match=f"turn_rewards {shown} instead of a finite number for each of the 2"):
            scores(HERE + name, [conversation()])


def test_a_failure_among_weighted_rewards_names_its_function() -> None:
    config = RewardConfig(rm_type="exact", further=[RewardTerm(rm_type=HERE + "exits_politely")], reward_workers=1)
    with (
        RewardPool(config) as pool,
        pytest.raises(RewardError, match=r"'.*:exits_politely' on prompt gsm8k:1, sample 0"),
    ):
        pool.submit(group("19")).result(timeout=60)


@pytest.mark.parametrize(("name", "expected"), [("too_few", "returned 1 rewards for 2"), ("one_number", "a list of 2")])
def test_batched_results_of_the_wrong_length(name: str, expected: str) -> None:
    with pytest.raises(RewardError, match=expected):
        values(HERE + name, group("a", "b"), reward_batched=True)


@pytest.mark.parametrize("name", ["exact", "math"])
def test_a_missing_label_names_the_prompt(name: str) -> None:
    with pytest.raises(RewardError, match=f"'{name}' on prompt gsm8k:1, sample 0, raised ValueError"):
        values(name, group("a", label=None))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no.such.module:f", "cannot be imported: ModuleNotFoundError"),
        (HERE + "no_such_function", "cannot be imported: AttributeError"),
        (HERE + "not_a_function", "is of type int; it must be a function"),
        (HERE + "too_many", r"has the parameters \(sample, other\)"),
        ("tests.rewards.exits_at_import:f", r"cannot be imported: SystemExit: 2"),
        ("tests.rewards.dies_at_import:f", r"its import ended the process \(exit code 5\)"),
    ],
)
def test_a_function_that_cannot_be_used_fails_at_once(name: str, expected: str) -> None:
    with pytest.raises(RewardError, match=expected):
        RewardPool(RewardConfig(rm_type=name))


def test_submit_does_not_wait_and_close_kills_what_runs() -> None:
    pool = RewardPool(RewardConfig(rm_type=HERE + "hangs", reward_workers=2))
    start = time.monotonic()
    futures = [pool.submit(group("a", "b", "c", uid=f"gsm8k:{i}")) for i in range(100)]
    assert not futures[0].done()
    time.sleep(0.5)
    pool.close()
    assert time.monotonic() - start < 5
    for future in futures:
        with pytest.raises(RewardError, match="pool closed"):
            future.result(timeout=5)


def test_other_calls_outlive_a_hanging_one() -> None:
    with RewardPool(RewardConfig(rm_type=HERE + "hangs", reward_workers=1, reward_timeout=1)) as pool:
        bad, good = pool.submit(group("a", "b")), pool.submit(group("c", uid="gsm8k:2"))
        assert good.result(timeout=30) == [Score(0.0)]
        with pytest.raises(RewardError):
            bad.result(timeout=30)


def test_processes_hold_no_torch() -> None:
    assert values(HERE + "loaded_torch", group("a")) == [0]


def test_processes_die_with_a_killed_controller() -> None:
    code = (
        "import sys, time\n"
        "from tests.rewards.test_pool import HERE, RewardPool, RewardConfig, group\n"
        "if __name__ == '__main__':\n"
        "    pool = RewardPool(RewardConfig(rm_type=HERE + 'process_id', reward_workers=1))\n"
        "    print(int(pool.submit(group('a')).result()[0].value), flush=True)\n"
        "    time.sleep(60)\n"
    )
    controller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert controller.stdout is not None
    worker = int(controller.stdout.readline())
    assert psutil.pid_exists(worker)
    os.kill(controller.pid, signal.SIGKILL)
    controller.communicate()
    deadline = time.monotonic() + 5
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the reward process outlived its controller"
        time.sleep(0.05)
