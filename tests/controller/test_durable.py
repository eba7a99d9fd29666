"""Finished responses on disk: what of them is used, after whatever became of the files."""

from __future__ import annotations

import itertools
import resource
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from miles_spmd.config import Config
from miles_spmd.config.environment import EnvironmentConfig
from miles_spmd.controller.generation.durable import DurableTurns, read
from miles_spmd.controller.generation.episodes import Episodes
from miles_spmd.controller.generation.sampling import Sampling
from miles_spmd.controller.generation.unfinished import key
from miles_spmd.controller.journal import events
from miles_spmd.environments.context import ModelView
from miles_spmd.environments.in_place import InPlace
from miles_spmd.plugins.environment import Context
from miles_spmd.types.request import Output, Request
from miles_spmd.types.sample import Prompt
from miles_spmd.types.trajectory import FinishReason, Trajectory
from tests.controller.test_episodes import CONFIG, PROMPTS, Tokenizer, play, tangle

WEIGHTS = {"actor": b"before step 3"}


@contextmanager
def opened(
    folder: Path, weights: dict[str, bytes] = WEIGHTS, first: int = 3, **settings: Any
) -> Iterator[DurableTurns]:
    run = {"output_dir": str(folder), "name": "run"}
    turns = DurableTurns(Config(run=run, model={"hf_checkpoint": "none"}, data={"prompt_data": "none"}, **settings))
    with closing(turns):
        turns.begin(first, lambda: weights)
        turns.observe(events.EngineRefitted(3, []))
        yield turns


def files(folder: Path) -> list[Path]:
    return sorted((folder / "run" / "turns").glob("*"))


def killed(folder: Path) -> tuple[list[Any], list[Request]]:
    """What a rollout was whose responses are on disk."""
    with opened(folder) as turns:
        done, _, asked = play(tangle, PROMPTS, durable=turns.rollout(3))
    return done, asked


def test_a_rollout_begins_anew_with_its_responses(tmp_path: Path) -> None:
    done, asked = killed(tmp_path)
    with opened(tmp_path) as turns:
        durable = turns.rollout(3)
        again, _, sampled = play(tangle, PROMPTS, order=1, durable=durable)
    assert (again, sampled) == (done, [])
    assert durable.used == len(durable) == len(asked) > 2 * len(PROMPTS)
    assert durable.unused({(prompt.uid, index) for prompt in PROMPTS for index in range(2)}) == 0


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_file_that_was_cut_off(tmp_path: Path, share: float, capfd: pytest.CaptureFixture[str]) -> None:
    """What is whole is used, the rest is sampled anew, and stands behind it for the next attempt."""
    done, asked = killed(tmp_path)
    (path,) = files(tmp_path)
    size = path.stat().st_size
    with path.open("rb+") as file:
        file.truncate(int(size * share))
    with opened(tmp_path) as turns:
        durable = turns.rollout(3)
        again, _, sampled = play(tangle, PROMPTS, order=1, durable=durable)
    assert again == done
    assert len(sampled) == len(asked) - durable.used > 0
    assert durable.used >= int(len(asked) * share * 0.8)
    assert ("damaged, or were cut off" in capfd.readouterr().err) == (share > 0)
    with opened(tmp_path) as turns:
        last, _, sampled = play(tangle, PROMPTS, order=2, durable=turns.rollout(3))
    assert (last, sampled) == (done, [])


@pytest.mark.parametrize("place", range(0, 60, 7))
def test_a_changed_byte_costs_one_response(tmp_path: Path, place: int) -> None:
    """Wherever it is: in a mark, a length, a digest or a record."""
    done, asked = killed(tmp_path)
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    whole, damaged = read(bytes(data))
    assert (len(whole), damaged) == (len(asked), 0)
    start = data.find(b"\xd7trn", len(data) // 2)
    data[start + place] ^= 0x40
    path.write_bytes(data)
    rest, damaged = read(bytes(data))
    assert (len(rest), damaged > 0) == (len(asked) - 1, True)
    with opened(tmp_path) as turns:
        again, _, sampled = play(tangle, PROMPTS, durable=turns.rollout(3))
    assert (again, len(sampled)) == (done, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": {"actor": b"others"}},
        {"sglang": {"attention_backend": "torch_native"}},
        {"determinism": {"deterministic": True}},
    ],
)
def test_other_weights_or_engines(tmp_path: Path, changes: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    done, asked = killed(tmp_path)
    with opened(tmp_path, **changes) as turns:
        durable = turns.rollout(3)
        again, _, sampled = play(tangle, PROMPTS, durable=durable)
    assert (again, len(sampled), len(durable)) == (done, len(asked), 0)
    assert f"{len(asked)} responses on disk were sampled with other weights" in capfd.readouterr().err
    with opened(tmp_path) as turns:  # both are in the file now
        assert len(turns.rollout(3)) == len(asked)


def test_an_environment_that_acts_in_another_way(tmp_path: Path) -> None:
    killed(tmp_path)

    async def other(context: Context, prompt: Prompt) -> Trajectory:
        trajectory = context.begin([*prompt.tokens, 7])
        await context.complete(trajectory)
        return trajectory

    with opened(tmp_path) as turns:
        durable = turns.rollout(3)
        _, _, sampled = play(other, PROMPTS, durable=durable)
    assert (len(sampled), durable.used) == (2 * len(PROMPTS), 0)
    assert durable.unused({("data:1", 0), ("data:1", 1)}) > 0
    assert durable.unused({(prompt.uid, i) for prompt in PROMPTS for i in range(2)}) == len(durable)


@pytest.mark.parametrize("versions", [[(3, 4)], [(2, 1), (3, 3)]])
def test_what_older_weights_have_begun_is_not_kept(tmp_path: Path, versions: list[tuple[int, int]]) -> None:
    """A partial rollout's response of two versions is not what the step's weights sample."""
    host = InPlace(tangle, ModelView(cast(Any, Tokenizer()), 100, 512, "2026-01-01"))
    episodes = Episodes(host, itertools.count(), EnvironmentConfig())
    with opened(tmp_path) as turns:
        episodes.open(durable=turns.rollout(3))
        episodes.begin(0, PROMPTS[:1], Sampling.of_step(CONFIG, 3))
        request, *_ = episodes.requests()
        episodes.complete(Output(request.rid, [1, 2, 3, 4], [-1.0] * 4, FinishReason.STOP, versions))
    kept = [read(path.read_bytes())[0] for path in files(tmp_path)]
    assert [[record.name for record in records] for records in kept] == ([[key(request)]] if len(versions) == 1 else [])


def test_files_are_removed_with_a_checkpoint_behind_their_step(tmp_path: Path) -> None:
    killed(tmp_path)
    with opened(tmp_path) as turns:
        play(tangle, PROMPTS[:2], durable=turns.rollout(4))
        turns.observe(events.CheckpointCompleted(3, 0.0, 0))
    assert [path.name for path in files(tmp_path)] == ["step_000000003", "step_000000004"]
    with opened(tmp_path) as turns:
        turns.observe(events.CheckpointCompleted(4, 0.0, 0))
    assert [path.name for path in files(tmp_path)] == ["step_000000004"]
    with opened(tmp_path, first=5):
        pass
    assert files(tmp_path) == []
    killed(tmp_path)
    with opened(tmp_path) as turns:
        turns.remove()
    assert not (tmp_path / "run" / "turns").exists()


def test_a_full_disk(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One warning; the rollout goes on, and what was written before is used."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with opened(tmp_path) as turns:
            done, _, asked = play(tangle, PROMPTS, durable=turns.rollout(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (warning,) = capfd.readouterr().err.splitlines()
    assert "File too large" in warning
    assert "the run goes on" in warning
    with opened(tmp_path) as turns:
        durable = turns.rollout(3)
        again, _, sampled = play(tangle, PROMPTS, durable=durable)
    assert again == done
    assert 0 < durable.used < len(asked)
    assert len(sampled) == len(asked) - durable.used
    assert capfd.readouterr().err == ""


def test_a_folder_that_cannot_be_used(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "turns").write_text("a file")
    with opened(tmp_path) as turns:
        done, _, _ = play(tangle, PROMPTS, durable=turns.rollout(3))
    assert done == play(tangle, PROMPTS)[0]
    read_problem, write_problem = capfd.readouterr().err.splitlines()
    assert "cannot be read" in read_problem
    assert "the run goes on" in write_problem
