"""The game of the quickstart: its rules, its opponents and its data, against a search of the whole game."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from miles_spmd.config.load import load_config
from miles_spmd.data.examples import load_sft_examples
from miles_spmd.data.prompts import load_prompts
from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.quickstart.__main__ import recipes
from miles_spmd.quickstart.assets import build_assets
from miles_spmd.quickstart.stones import LIMITS, STARTS, FixedPlayer, Position, play
from miles_spmd.types.sample import Prompt
from miles_spmd.types.trajectory import Trajectory
from tests.environments.scripted import ScriptedContext, Turn

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("assets") / "stones"
    build_assets(folder, name="stones")
    return folder


@functools.cache
def can_win(stones: int, limit: int) -> bool:
    """Whether who is to move wins, by trying everything."""
    return any(not can_win(stones - move, limit) for move in range(1, limit + 1) if move <= stones)


def rows(assets: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (assets / f"{name}.jsonl").read_text().splitlines()]


def prompts(assets: Path, name: str) -> list[Prompt]:
    _, grpo = (load_config(recipe, check_files=False) for recipe in recipes("stones"))
    return load_prompts(grpo.data, Tokenizer(assets / "model"), prompt_data=str(assets / f"{name}.jsonl"))


def test_an_optimal_player_wins_whatever_can_be_won() -> None:
    for limit in LIMITS:
        for stones in range(1, STARTS.stop):
            position = Position(stones, limit)
            assert position.is_lost is not can_win(stones, limit)
            left = asyncio.run(FixedPlayer(True, random.Random(stones)).move(position))
            assert left in position.moves
            assert not can_win(stones, limit) or not can_win(left, limit)


def test_held_out_games_can_be_won(assets: Path) -> None:
    for opponent in ("random", "optimal"):
        for row in rows(assets, opponent):
            assert row["opponent"] == opponent
            assert can_win(row["stones"], row["limit"]) is (row["plays"] == "first")
    assert not any("opponent" in row for row in rows(assets, "train"))


def test_demonstrated_moves_are_legal_and_random(assets: Path) -> None:
    right = total = 0
    for row in rows(assets, "sft"):
        for seen, said in zip(row["prompt"][::2], row["prompt"][1::2]):
            stones, limit = (int(word) for word in seen["content"].split() if word.isdigit())
            left = int(said["content"])
            assert 0 <= left < stones <= left + limit
            if can_win(stones, limit):
                total, right = total + 1, right + (not can_win(left, limit))
    assert 0.35 < right / total < 0.65


class Scripted(ScriptedContext):
    """Says what it is told, whichever player is asked."""

    def __init__(self, tokenizer: Tokenizer, moves: list[str]) -> None:
        super().__init__(tokenizer, [Turn(tokenizer.encode(f"{move}<|end|>")) for move in moves])


def game(assets: Path, row: dict[str, Any], moves: list[str]) -> tuple[list[Trajectory], Tokenizer]:
    tokenizer = Tokenizer(assets / "model")
    text = f"{row['stones']} stones, take up to {row['limit']}"
    rendered = tokenizer.render([{"role": "user", "content": text}])
    prompt = Prompt("set:1", rendered, tokenizer.encode(rendered), metadata=row)
    return asyncio.run(play(Scripted(tokenizer, moves), prompt)), tokenizer


def test_each_player_sees_its_own_turns(assets: Path) -> None:
    """And has the tokens of a demonstration."""
    (first, second), tokenizer = game(assets, {"stones": 7, "limit": 3}, ["5", "4", "1", "0"])
    views = {"first": [(7, "5"), (4, "1")], "second": [(5, "4"), (1, "0")]}
    for trajectory, reward in ((first, -1.0), (second, 1.0)):
        talk = []
        for stones, move in views[trajectory.role]:
            talk += [{"role": "user", "content": f"{stones} stones, take up to 3"}]
            talk += [{"role": "assistant", "content": move}]
        row = {"prompt": talk}
        (assets / "one.jsonl").write_text(json.dumps(row))
        sft, _ = (load_config(recipe, check_files=False) for recipe in recipes("stones"))
        data = sft.data.model_copy(update={"prompt_data": str(assets / "one.jsonl")})
        (example,) = load_sft_examples(data, tokenizer)
        assert trajectory.tokens == example.tokens.tolist()
        mask = [0] * len(trajectory.start) + trajectory.loss_mask
        assert mask == example.loss_mask.tolist()
        assert (trajectory.reward, trajectory.turns) == (reward, 2)


@pytest.mark.parametrize(
    ("moves", "rewards"),
    [
        (["1"], {"first": -1.0}),  # takes more than it may; the second player had no turn
        (["3", "3"], {"first": 1.0, "second": -1.0}),  # takes nothing
        (["3", " stones"], {"first": 1.0, "second": -1.0}),
        (["2", "0"], {"first": -1.0, "second": 1.0}),
    ],
)
def test_who_has_won(assets: Path, moves: list[str], rewards: dict[str, float]) -> None:
    trajectories, _ = game(assets, {"stones": 4, "limit": 2}, moves)
    assert {trajectory.role: trajectory.reward for trajectory in trajectories} == rewards


def test_against_an_opponent_the_policy_has_one_role(assets: Path) -> None:
    row = {"stones": 7, "limit": 3, "opponent": "optimal", "plays": "first"}
    (only,), _ = game(assets, row, ["4", "0"])  # whatever the opponent leaves, all the others can be taken
    assert (only.role, only.reward, only.turns) == ("first", 1.0, 2)
    (only,), _ = game(assets, row | {"plays": "second"}, ["3"])  # the opponent has left 4, and takes the others, too
    assert (only.role, only.reward, only.turns) == ("second", 0.0, 1)


def test_the_longest_game_fits(assets: Path) -> None:
    _, grpo = (load_config(recipe, check_files=False) for recipe in recipes("stones"))
    longest = STARTS[-1]
    trajectories, _ = game(assets, {"stones": longest, "limit": 2}, [*map(str, reversed(range(longest)))])
    assert max(len(one.response) for one in trajectories) <= grpo.rollout.rollout_max_response_len
    assert {prompt.metadata["stones"] for prompt in prompts(assets, "train")} == set(STARTS)


@pytest.mark.slow
def test_self_play_improves_both_roles_and_repeats(tmp_path: Path) -> None:
    def run(*command: object) -> None:
        subprocess.run(
            [sys.executable, "-m", *map(str, command)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            timeout=900,
            check=True,
        )

    run("miles_spmd.quickstart", "--task", "stones")
    metrics = [json.loads(line) for line in (tmp_path / "runs/stones/grpo/metrics.jsonl").read_text().splitlines()]
    before, after = metrics[0], metrics[-1]
    for role in ("first", "second"):
        assert before[f"eval/optimal-role/{role}/reward"] < 0.5
        assert after[f"eval/optimal-role/{role}/reward"] >= 0.8
        assert after[f"eval/random-role/{role}/reward"] > before[f"eval/random-role/{role}/reward"] + 0.2
    assert sum(row.get("parity/mismatches", 0) for row in metrics) == 0
    _, grpo = recipes("stones")
    run("miles_spmd", "train", grpo, "run.name=again", "--nproc-per-node=2")
    run("miles_spmd", "diff", "runs/stones/grpo", "runs/stones/again")
