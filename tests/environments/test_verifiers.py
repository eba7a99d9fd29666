"""Environments of the package verifiers, with the real package where it is installed, and a policy as a script."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.environments.process import load_environment
from miles_spmd.plugins.plug_point import PlugPointError
from miles_spmd.types.sample import Prompt
from miles_spmd.types.trajectory import FinishReason, Trajectory
from tests.environments.families import FAMILIES, write_family
from tests.environments.scripted import ScriptedContext, Turn, to_prompt

INSTALLED = importlib.util.find_spec("verifiers") is not None
OURS = "miles_spmd.environments.verifiers:verifiers"
HERE = "tests.environments.verifiers_environments:"
ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>'
needs_verifiers = pytest.mark.skipif(not INSTALLED, reason="the package verifiers is not installed")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_family(tmp_path_factory.mktemp("qwen"), FAMILIES["qwen"])


def play(
    tokenizer: Tokenizer, env: str, *said: str, room: int = 100_000, **env_args: Any
) -> tuple[list[Trajectory], ScriptedContext]:
    """Run an episode on the first row of the environment's data."""
    from miles_spmd.environments import verifiers

    row = next(iter(verifiers.rows(HERE + env, 1, env_args=env_args)))
    given = to_prompt(tokenizer, row["prompt"])
    metadata = {"messages": row["prompt"], verifiers.COLUMN: row[verifiers.COLUMN]}
    prompt = Prompt("data:1", given.text, given.tokens, row["label"], metadata)
    context = ScriptedContext(tokenizer, [Turn(tokenizer.encode(text + "<|im_end|>")) for text in said], room)
    environment = load_environment(OURS, {"env": HERE + env, "env_args": env_args})
    return asyncio.run(environment(context, prompt)), context  # type: ignore[arg-type]


@needs_verifiers
def test_tools_of_an_environment(qwen: Tokenizer) -> None:
    """Its loop executes the call, its rubric scores; the tokens are those that were sampled."""
    said = [f"<think>\nHm.\n</think>\n\nSo:{ADD}", "4"]
    (trajectory,), context = play(qwen, "adding", *said)
    sampled = [context.decode(segment.tokens) for segment in trajectory.segments if segment.sampled]
    assert sampled == [f"{text}<|im_end|>" for text in said]
    (given,) = [context.decode(segment.tokens) for segment in trajectory.segments if not segment.sampled]
    assert "<tool_response>\n4\n</tool_response>" in given
    assert '"name": "add"' in context.decode(trajectory.start)
    assert trajectory.reward == pytest.approx(1 + 0.5 / 3)  # of three messages
    detail = {name: trajectory.reward_detail[name] for name in ("right", "brevity", "num_turns", "add_calls")}
    assert detail == {"right": 1.0, "brevity": pytest.approx(1 / 3), "num_turns": 2.0, "add_calls": 1.0}
    assert (trajectory.text, trajectory.finish_reason, trajectory.turn_rewards) == ("4", FinishReason.STOP, [])
    assert [message["role"] for message in trajectory.messages] == ["user", "assistant", "tool", "assistant"]


@needs_verifiers
def test_a_call_that_cannot_be_read(qwen: Tokenizer) -> None:
    """The environment gets what the policy wrote, and says what is wrong."""
    (trajectory,), context = play(qwen, "adding", "<tool_call>{broken</tool_call>", "4")
    assert trajectory.turns == 2
    assert "<tool_response>" in context.decode(trajectory.tokens)


@needs_verifiers
def test_rewards_of_steps_are_those_of_turns(qwen: Tokenizer) -> None:
    (trajectory,), _ = play(qwen, "guessing", "5", "<think>\nHm.\n</think>\n\n4")
    assert (trajectory.reward, trajectory.turn_rewards) == (1.0, [-0.25, 1.0])
    (trajectory,), _ = play(qwen, "guessing", "5", "6", "7")
    assert (trajectory.reward, trajectory.turn_rewards) == (0.0, [-0.25] * 3)


@needs_verifiers
def test_a_conversation_that_is_not_continued_is_a_sibling(qwen: Tokenizer) -> None:
    trajectories, context = play(qwen, "guessing", "5", "4", how="forgets")
    assert [one.turn_rewards for one in trajectories] == [[-0.25], [1.0]]
    assert trajectories[0].reward == 1.0
    assert "Try 1." in context.decode(trajectories[1].start)
    assert [len(one.segments) for one in trajectories] == [1, 1]


@needs_verifiers
def test_a_context_that_is_full_truncates(qwen: Tokenizer) -> None:
    (trajectory,), _ = play(qwen, "guessing", "5", how="is long", room=2000)
    assert (trajectory.turns, trajectory.finish_reason, trajectory.reward) == (1, FinishReason.LENGTH, 0.0)


@needs_verifiers
@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("raises", "no network"),
        ("asks for more", r"the environment sets temperature; \[rollout\] decides how responses are sampled"),
    ],
)
def test_an_environment_that_fails_has_no_reward(qwen: Tokenizer, how: str, problem: str) -> None:
    with pytest.raises(Exception, match=problem):
        play(qwen, "guessing", "5", "6", how=how)


@needs_verifiers
@pytest.mark.parametrize(
    ("env", "problem"),
    [
        ("comparing", "compares the responses to a prompt, and an episode is one of them"),
        ("broken", "cannot be loaded: OSError: no data"),
        ("missing", "cannot be imported: AttributeError"),
    ],
)
def test_environments_that_cannot_be_used(env: str, problem: str) -> None:
    with pytest.raises(PlugPointError, match=problem):
        load_environment(OURS, {"env": HERE + env})


@needs_verifiers
def test_names_of_installed_environments() -> None:
    with pytest.raises(PlugPointError, match="env = 'no-such-env' cannot be loaded"):
        load_environment(OURS, {"env": "no-such-env"})


@needs_verifiers
def test_data_are_written(tmp_path: Path) -> None:
    from miles_spmd.environments import verifiers

    before = signal.getsignal(signal.SIGTERM)
    path = tmp_path / "data.jsonl"
    verifiers.main([str(path), HERE + "adding", "--env-args", '{"count": 2}'])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["prompt"], row["label"]) for row in rows] == [
        ([{"role": "user", "content": "2 + 2?"}], "4"),
        ([{"role": "user", "content": "3 + 4?"}], "7"),
    ]
    assert rows[1][verifiers.COLUMN] == {"info": {"number": 1}, "example_id": 1}
    verifiers.main([str(path), HERE + "guessing", "--held-out"])
    assert len(path.read_text().splitlines()) == 1
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(INSTALLED, reason="the package verifiers is installed")
def test_a_package_that_is_missing() -> None:
    with pytest.raises(PlugPointError, match=r"pip install 'miles-spmd\[verifiers\]'"):
        load_environment(OURS, {"env": "wordle"})
