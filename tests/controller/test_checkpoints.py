"""Checkpoints of whole runs: a damaged one is named, an incomplete one replaced."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from miles_spmd.controller.checkpoints import ResumeError, newest, read, replaced, step_folder
from miles_spmd.controller.cluster.listener import WorkerError
from miles_spmd.data.dataset import DataError
from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.compare import compare
from tests.damages import flip, truncate
from tests.ledger.runs import Recipe, train
from tests.ranks import Ranks

SFT = ("run.mode=sft", "data.label_key=label", "algorithm.dynamic_sampling_filter=none")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return Recipe(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def finished(ranks: Ranks, recipe: Recipe) -> Path:
    """A run with checkpoints before steps 2 and 4."""
    return train(ranks, recipe.config("finished", *SFT))


def test_a_damaged_checkpoint_is_named_with_the_one_before_it(ranks: Ranks, recipe: Recipe, finished: Path) -> None:
    folder = Path(shutil.copytree(finished, finished.with_name("damaged")))
    newer, before = step_folder(folder, 4), step_folder(folder, 2)
    flip(newer / "actor" / "rank_00000.bin", newer, random.Random(1))
    remedy = f"take the one before it: checkpoint.load={before} checkpoint.resume=false"
    for asked in (["checkpoint.resume=true"], [f"checkpoint.load={newer}"]):
        with pytest.raises(WorkerError) as raised:
            train(ranks, recipe.config("damaged", *SFT, *asked))
        assert f"{newer}/actor/rank_00000.bin is damaged" in str(raised.value)
        assert remedy in str(raised.value)
    (before / "controller.json").unlink()
    with pytest.raises(WorkerError, match="no complete checkpoint is before it"):
        train(ranks, recipe.config("damaged", *SFT, "checkpoint.resume=true"))


def test_the_advice_leads_to_the_end(ranks: Ranks, recipe: Recipe, finished: Path) -> None:
    """The damaged checkpoint is written anew, and one of a later step, which the ledger has no more, is removed."""
    folder = Path(shutil.copytree(finished, finished.with_name("advised")))
    newer, before = step_folder(folder, 4), step_folder(folder, 2)
    truncate(newer / "actor" / "rank_00000.bin", newer, random.Random(1))
    shutil.copytree(newer, step_folder(folder, 6))
    train(ranks, recipe.config("advised", *SFT, f"checkpoint.load={before}"))
    assert not step_folder(folder, 6).exists()
    assert same_files(newer, step_folder(finished, 4))


def test_a_run_that_goes_on_from_an_earlier_checkpoint_forgets_what_it_repeats(
    ranks: Ranks, recipe: Recipe, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It ends before it saves again, as after a crash; what resumes it must not take the checkpoint of before."""
    folder = Path(shutil.copytree(finished, finished.with_name("repeated")))
    tracked = [folder / name for name in ("metrics.jsonl", "rollouts.jsonl")]
    tracked[1].write_bytes(b'{"step":2}\n{"half\n{"step":4}\n')
    before = step_folder(folder, 2)
    train(ranks, recipe.config("repeated", *SFT, "run.num_rollout=3", f"checkpoint.load={before}"))
    assert "so its later checkpoints are removed: step_000004" in capfd.readouterr().err
    assert newest(folder) == before
    assert steps_in(tracked[0]) == [0, 1, 2, 2, 3]
    assert tracked[1].read_bytes() == b'{"step":2}\n{"half\n'
    train(ranks, recipe.config("repeated", *SFT, "checkpoint.resume=true"))
    assert "are removed" not in capfd.readouterr().err
    assert steps_in(tracked[0]) == [0, 1, 2, 2, 2, 3, 4]
    assert same_files(step_folder(folder, 4), step_folder(finished, 4))
    assert compare(verify(folder), verify(finished)).equal


def test_a_run_whose_data_are_missing_ends_although_no_rank_has_connected(ranks: Ranks, recipe: Recipe) -> None:
    config = recipe.config("without-data", *SFT)
    config = config.model_copy(update={"data": config.data.model_copy(update={"prompt_data": "missing.jsonl"})})
    with pytest.raises(DataError, match="no such file"):
        train(ranks, config)


def steps_in(metrics: Path) -> list[int]:
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines()]


@pytest.mark.parametrize("left", ["without its mark", "half of the files", "temporary"])
def test_what_a_killed_save_leaves_is_replaced(ranks: Ranks, recipe: Recipe, finished: Path, left: str) -> None:
    name = left.replace(" ", "-")
    folder = Path(shutil.copytree(finished, finished.with_name(name)))
    newer = step_folder(folder, 4)
    (newer / "controller.json").unlink()
    if left == "half of the files":
        (newer / "actor" / "index.json").unlink()
    if left == "temporary":
        newer.rename(f"{newer}.incomplete")
    train(ranks, recipe.config(name, *SFT, "checkpoint.resume=true"))
    assert same_files(newer, step_folder(finished, 4))
    assert sorted(path.name for path in newer.parent.iterdir()) == ["step_000002", "step_000004"]


def same_files(folder: Path, other: Path) -> bool:
    files, others = ({p.relative_to(f): p for p in f.rglob("*") if p.is_file()} for f in (folder, other))
    return files.keys() == others.keys() and all(files[p].read_bytes() == others[p].read_bytes() for p in files)


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    folder = step_folder(tmp_path, 2)
    folder.mkdir(parents=True)
    (folder / "controller.json").touch()

    def fill_the_disk() -> None:
        with replaced(tmp_path, 2) as scratch:
            (scratch / "half").touch()
            Path("/dev/full").write_text("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fill_the_disk()
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()] == [
        Path("checkpoints/step_000002/controller.json")
    ]


def test_newest(tmp_path: Path) -> None:
    for name in ("step_000002", "step_000010", "step_1000000", "step_000012.incomplete", "step_000011"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if name != "step_000011":
            (tmp_path / "checkpoints" / name / "controller.json").touch()
    assert newest(tmp_path).name == "step_1000000"  # type: ignore[union-attr]
    assert newest(tmp_path, up_to=12).name == "step_000010"  # type: ignore[union-attr]
    assert newest(tmp_path, up_to=1) is None
    with pytest.raises(
        ResumeError, match=r"is the folder of a run; name one of its checkpoints, such as .*step_1000000"
    ):
        read(tmp_path)


def test_a_checkpoint_of_an_earlier_version(tmp_path: Path) -> None:
    (tmp_path / "controller.json").write_bytes(b'{"step":2,"seed":0,"ledger":"","format":1}')
    with pytest.raises(ResumeError, match="was written by a version without digests"):
        read(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_is_killed_while_it_saves_comes_to_the_same_end(recipe: Recipe, seed: int) -> None:
    """All processes at once, at a random moment of a save, four times."""
    rng, folder = random.Random(seed), recipe.config("killed").run_dir.with_name(f"killed-{seed}")
    run = [sys.executable, "-m", "miles_spmd", "train", str(recipe.file), f"run.name={folder.name}", *SFT]
    run += ["run.num_rollout=12", "checkpoint.save_interval=1", "checkpoint.resume=true"]
    alone = [*run, f"run.name={folder.name}-whole", "--nproc-per-node=1"]
    assert subprocess.run(alone, capture_output=True, check=False, timeout=200).returncode == 0
    for step in (2, 4, 6, 8):
        with subprocess.Popen([*run, "--nproc-per-node=1"], start_new_session=True) as killed:
            while killed.poll() is None and not step_folder(folder, step).with_suffix(".incomplete").exists():
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02))
            os.killpg(killed.pid, signal.SIGKILL)
    finished = subprocess.run([*run, "--nproc-per-node=1"], capture_output=True, text=True, check=False, timeout=200)
    assert finished.returncode == 0, finished.stderr
    found = compare(verify(folder.with_name(f"{folder.name}-whole")), verify(folder))
    assert found.equal, found.difference
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [step_folder(folder, step).name for step in range(1, 13)]
