"""Environments of TRL, with a real tokenizer and template, and a policy whose responses are written down."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from miles_spmd.config import EnvironmentConfig
from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.environments.messages import Finished
from miles_spmd.environments.process import load_environment
from miles_spmd.environments.trl import trl
from miles_spmd.plugins.plug_point import PlugPointError
from miles_spmd.types.trajectory import Trajectory
from tests.environments import trl_environments
from tests.environments.families import FAMILIES, write_family
from tests.environments.scripted import ScriptedContext, Turn, to_prompt
from tests.environments.test_tools_in_processes import converse

HERE = "tests.environments.trl_environments:"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_family(tmp_path_factory.mktemp("qwen"), FAMILIES["qwen"])


def play(tokenizer: Tokenizer, said: list[str], row: dict[str, Any], **settings: Any) -> tuple[Trajectory, str]:
    """Return the trajectory, and all of it as text."""
    context = ScriptedContext(tokenizer, [Turn(tokenizer.encode(f"{text}<|im_end|>")) for text in said])
    prompt = to_prompt(tokenizer, [{"role": "user", "content": "Play."}])
    prompt.metadata.update(row)
    trajectory = asyncio.run(trl(context, prompt, **settings))
    return trajectory, context.decode(trajectory.tokens)


def call(name: str, **arguments: Any) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def results(trajectory: Trajectory) -> list[str]:
    return [message["content"] for message in trajectory.messages if message["role"] == "tool"]


def test_an_episode(tokenizer: Tokenizer) -> None:
    said = [call("up", by=2.0) + call("up"), call("_private") + call("reset"), call("stop"), "Done."]
    trajectory, text = play(tokenizer, said, {"size": 3, "label": "x"}, factory=HERE + "Counter")
    assert results(trajectory)[:2] == ["now 2", "now 3"]  # one after another
    assert all("does not exist. The tools are stop, up" in result for result in results(trajectory)[2:4])
    assert results(trajectory)[4:] == ["over"]
    assert (trajectory.reward, trajectory.text) == (1.0, "Done.")
    assert "<|im_start|>user\nPlay. Count to 3.<|im_end|>" in text
    assert '"name": "up"' in text.split("<|im_start|>user")[0]


def test_an_environment_is_made_once_and_begun_again(tokenizer: Tokenizer) -> None:
    before = trl_environments.Counter.made
    for size in (1, 2):
        trajectory, _ = play(tokenizer, [call("up") + call("stop"), "Done."], {"size": size}, factory=HERE + "Counter")
        assert trajectory.reward == (size == 1)
    assert trl_environments.Counter.made - before <= 1


def test_rows_choose_among_several_and_one_without_a_reward_leaves_it_to_others(tokenizer: Tokenizer) -> None:
    factory = {"count": HERE + "Counter", "dark": HERE + "Silent"}
    trajectory, text = play(tokenizer, [call("look"), "Dark."], {"environment": "dark"}, factory=factory)
    assert (results(trajectory), trajectory.reward) == (["dark"], None)
    assert "<|im_start|>user\nPlay.<|im_end|>" in text
    with pytest.raises(ValueError, match="the row's column 'environment' is 'deep'; the factories are count, dark"):
        play(tokenizer, [], {"environment": "deep"}, factory=factory)


def test_one_whose_tool_has_timed_out_is_not_used_again(tokenizer: Tokenizer) -> None:
    from miles_spmd.environments.trl import _idle

    trajectory, _ = play(tokenizer, [call("hang"), "Hm."], {}, factory=HERE + "Silent", tool_timeout=0.1)
    assert "hang took longer than 0.1 s" in results(trajectory)[0]
    assert not _idle[HERE + "Silent", 0.1, 16_384]


def test_an_episode_in_an_environment_process(tmp_path: Path) -> None:
    tokenizer = write_family(tmp_path, FAMILIES["qwen"])
    config = EnvironmentConfig(
        environment="miles_spmd.environments.trl:trl",
        environment_kwargs={"factory": HERE + "Counter"},
        environment_workers=1,
    )
    prompt = to_prompt(tokenizer, [{"role": "user", "content": "Play."}])
    prompt.metadata["size"] = 2
    finished = converse(config, tokenizer, tmp_path, prompt, [call("up", by=2) + call("stop"), "Done."])
    assert isinstance(finished, Finished), finished
    assert (finished.ends[0].reward, finished.metrics["tool_calls"]) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("factory", "problem"),
    [
        ("Unbegun", "makes an object without `reset`, which begins an episode"),
        ("Undocumented", "tool 'touch' has no docstring"),
        ("Nothing", "cannot be called: PlugPointError"),
    ],
)
def test_factories_that_cannot_be_used_are_named_before_anything_starts(factory: str, problem: str) -> None:
    with pytest.raises(PlugPointError, match=r"^environment\.environment = 'miles_spmd") as caught:
        load_environment("miles_spmd.environments.trl:trl", {"factory": HERE + factory})
    assert problem in str(caught.value)
