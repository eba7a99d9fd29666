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
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from miles_spmd.config import CheckpointConfig
from miles_spmd.controller.checkpoint_folders import (
    FORMAT,
    ControllerState,
    ResumeError,
    begin,
    kept,
    mark,
    newest,
    prune,
    publish,
    read,
    step_folder,
)
from miles_spmd.data.dataset import DataError
from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.compare import compare
from miles_spmd.planning.memory_estimate import checkpoint_bytes
from miles_spmd.telemetry.trackers import read_metrics
from miles_spmd.types.run_files import complete_checkpoints
from tests.damages import delete, flip, truncate
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


Damage = Callable[[Path, Path, random.Random], None]
DAMAGES: dict[str, tuple[str, Damage]] = {  # each kind of file of a checkpoint
    "tensors-flipped": ("actor/rank_00000.bin", flip),
    "tensors-truncated": ("actor/rank_00000.bin", truncate),
    "index-flipped": ("actor/rank_00000.json", flip),
    "index-truncated": ("actor/rank_00000.json", truncate),
    "index-deleted": ("actor/rank_00000.json", delete),
    "mark-flipped": ("controller.json", flip),
    "mark-truncated": ("controller.json", truncate),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_instead_of_a_damaged_checkpoint_the_one_before_it_is_used(
    ranks: Ranks, recipe: Recipe, finished: Path, capfd: pytest.CaptureFixture[str], damage: str
) -> None:
    """The run comes to the same end, and the damaged one is written anew."""
    name, harm = DAMAGES[damage]
    folder = Path(shutil.copytree(finished, finished.with_name(damage), symlinks=True))
    newer, before = step_folder(folder, 4), step_folder(folder, 2)
    harm(newer / name, newer, random.Random(1))
    train(ranks, recipe.config(damage, *SFT, "checkpoint.resume=true"))
    (warning,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("miles-spmd: warning: ")]
    assert str(newer / name) in warning
    assert warning.endswith(f"; continuing from {before}")
    assert same_files(newer, step_folder(finished, 4))
    assert same_ledger(folder, finished)


def test_a_checkpoint_that_is_named_and_damaged_is_an_error(
    ranks: Ranks, recipe: Recipe, finished: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, finished.with_name("named"), symlinks=True))
    newer, before = step_folder(folder, 4), step_folder(folder, 2)
    flip(newer / "actor" / "rank_00000.bin", newer, random.Random(1))
    with pytest.raises(ResumeError) as raised:
        train(ranks, recipe.config("named", *SFT, f"checkpoint.load={newer}"))
    assert f"{newer}/actor/rank_00000.bin is damaged" in str(raised.value)
    assert f"take the one before it: checkpoint.load={before} checkpoint.resume=false" in str(raised.value)
    truncate(before / "controller.json", before, random.Random(1))
    with pytest.raises(ResumeError) as raised:
        train(ranks, recipe.config("named", *SFT, "checkpoint.resume=true"))
    for damaged in (newer / "actor" / "rank_00000.bin", before / "controller.json"):
        assert f"{damaged} is damaged" in str(raised.value)


def test_a_checkpoint_of_another_model_is_not_used(
    ranks: Ranks, recipe: Recipe, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(finished, finished.with_name("foreign"), symlinks=True))
    other = train(ranks, recipe.config("sgd", *SFT, "megatron.optimizer=sgd"))
    shutil.rmtree(step_folder(folder, 4))
    state = read(step_folder(finished, 4))  # as if the ledger, too, were the run's own
    shutil.copytree(step_folder(other, 4), step_folder(folder, 4))
    mark(step_folder(folder, 4), msgspec.structs.replace(read(step_folder(folder, 4)), ledger=state.ledger))
    train(ranks, recipe.config("foreign", *SFT, "checkpoint.resume=true"))
    said = capfd.readouterr().err
    assert "optimizer was SGD, now AdamW; continuing from" in said
    assert same_ledger(folder, finished)


def test_settings_that_do_not_fit_do_not_become_those_of_the_run(ranks: Ranks, recipe: Recipe, finished: Path) -> None:
    folder = Path(shutil.copytree(finished, finished.with_name("unfit"), symlinks=True))
    before = (folder / "config.toml").read_bytes()
    longer = [*SFT, "checkpoint.resume=true", "run.num_rollout=5"]
    wrong = recipe.config("unfit", *longer, "megatron.optimizer=sgd")
    with pytest.raises(ResumeError, match=r"optimizer was AdamW, now SGD; put back what was changed, in the settings"):
        train(ranks, wrong)
    assert (folder / "config.toml").read_bytes() == before
    train(ranks, recipe.config("unfit", *longer))
    assert "num_rollout = 5" in (folder / "config.toml").read_text()


def test_a_run_without_a_checkpoint_says_that_it_begins_anew(
    ranks: Ranks, recipe: Recipe, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(finished, finished.with_name("bare"), symlinks=True))
    shutil.rmtree(folder / "checkpoints")
    train(ranks, recipe.config("bare", *SFT, "checkpoint.resume=true"))
    assert f"warning: {folder} has no checkpoint: the run begins anew, and the metrics of its 4 steps are replaced" in (
        capfd.readouterr().err
    )
    assert same_ledger(folder, finished)


def same_ledger(folder: Path, other: Path) -> bool:
    """Bitwise; without its first entry where somebody has changed a file of the code meanwhile."""
    one, two = (verify(run) for run in (folder, other))
    if one.contexts[-1].code == two.contexts[-1].code:
        return (folder / "ledger" / "chain.jsonl").read_bytes() == (other / "ledger" / "chain.jsonl").read_bytes()
    return one.steps == two.steps and one.saved == two.saved


def test_the_advice_leads_to_the_end(ranks: Ranks, recipe: Recipe, finished: Path) -> None:
    """The damaged checkpoint is written anew, and one of a later step, which the ledger has no more, is removed."""
    folder = Path(shutil.copytree(finished, finished.with_name("advised"), symlinks=True))
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
        (newer / "actor" / "rank_00000.json").unlink()
    if left == "temporary":
        newer.rename(f"{newer}.incomplete")
    train(ranks, recipe.config(name, *SFT, "checkpoint.resume=true"))
    assert same_files(newer, step_folder(finished, 4))
    assert sorted(path.name for path in newer.parent.iterdir()) == ["latest", "step_000002", "step_000004"]
    assert (newer.parent / "latest").resolve() == newer.resolve()
    assert same_ledger(folder, finished)


def same_files(folder: Path, other: Path) -> bool:
    files, others = ({p.relative_to(f): p for p in f.rglob("*") if p.is_file()} for f in (folder, other))
    return files.keys() == others.keys() and all(files[p].read_bytes() == others[p].read_bytes() for p in files)


def test_changes_at_a_resume(ranks: Ranks, recipe: Recipe, finished: Path) -> None:
    """A longer run with another learning rate, asked for a checkpoint that the configuration does not want: the ledger
    says what changed, and nothing of the checkpoint."""
    folder = Path(shutil.copytree(finished, finished.with_name("longer"), symlinks=True))
    (folder / "save").touch()
    longer = ["run.num_rollout=6", "megatron.lr=2e-3", "checkpoint.save_interval=0", "checkpoint.resume=true"]
    train(ranks, recipe.config("longer", *SFT, *longer))
    record, metrics = verify(folder), read_metrics(folder / "metrics.jsonl")
    assert list(record.steps) == [0, 1, 2, 3, 4, 5]
    assert metrics[6]["train/lr"] == 2e-3
    (change,) = compare(record, record).changes[:1]
    assert change == f"{folder}: from step 4 on: run.num_rollout: 4 -> 6; megatron.lr: 0.001 -> 0.002"
    assert list(complete_checkpoints(folder)) == [2, 4, 5]  # at the end of the first step
    assert not (folder / "save").exists()
    assert list(record.saved) == [2, 4]
    # from a checkpoint without an entry the ledger is continued as from any other
    chain = (folder / "ledger" / "chain.jsonl").read_bytes()
    again = [*longer[:3], f"checkpoint.load={step_folder(folder, 5)}"]
    train(ranks, recipe.config("longer", *SFT, *again))
    if verify(folder).contexts[-1].code == record.contexts[-1].code:  # nobody has changed a file meanwhile
        assert (folder / "ledger" / "chain.jsonl").read_bytes() == chain


def test_without_room_a_checkpoint_is_not_begun(
    ranks: Ranks,
    recipe: Recipe,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The run goes on, and its ledger is that of a run with a larger disk."""
    usage = shutil.disk_usage(finished)
    answers = [usage._replace(free=100)]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: answers.pop() if answers else usage)
    folder = train(ranks, recipe.config("full", *SFT))
    said = capfd.readouterr().err
    assert "warning: the checkpoint of step 2 could not be written: No space left on device: it takes 0." in said
    assert f"MiB, and the file system of {folder} has 9.54e-05 MiB; no other one exists; the run goes on" in said
    assert "; free some space on its disk, or raise the limit\n" in said
    assert list(complete_checkpoints(folder)) == [4]
    assert same_ledger(folder, finished)


def test_its_size_is_known_before(recipe: Recipe, finished: Path) -> None:
    folder = step_folder(finished, 4) / "actor"
    (index,) = [json.loads(path.read_bytes()) for path in folder.glob("*.json")]
    random_state = sum(t["shape"][0] * t["shape"][1] for name, t in index["tensors"].items() if "random." in name)
    assert checkpoint_bytes(recipe.config("finished", *SFT)) == index["size"] - random_state


@pytest.mark.parametrize(
    ("last", "every", "scores", "stay"),
    [
        (1, 0, {}, {5}),
        (2, 0, {1: 0.5, 3: 0.9, 4: 0.2}, {3, 4, 5}),
        (1, 2, {}, {2, 4, 5}),
        (1, 0, {1: 0.5, 2: 0.5}, {2, 5}),
        (9, 0, {}, {1, 2, 3, 4, 5}),
    ],
)
def test_which_checkpoints_stay(last: int, every: int, scores: dict[int, float], stay: set[int]) -> None:
    assert kept([1, 2, 3, 4, 5], last, every, scores) == stay


def test_pruned(tmp_path: Path) -> None:
    """By what is on disk; another folder, and what is not complete, is left alone."""
    settings = CheckpointConfig(keep_last=1, keep_best="eval/test")
    for step, score in enumerate((0.1, 0.7, 0.3, 0.2)):
        publish(begin(tmp_path, step), ControllerState(step, 0, metrics={"eval/test": score}, format=FORMAT))
    (tmp_path / "checkpoints" / "mine").mkdir()
    prune(tmp_path, settings)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "mine",
        "step_000001",
        "step_000003",
    ]
    prune(tmp_path, CheckpointConfig())  # keeps all
    assert list(complete_checkpoints(tmp_path)) == [1, 3]


def test_newest(tmp_path: Path) -> None:
    for name in ("step_000002", "step_000010", "step_1000000", "step_000012.incomplete", "step_000011"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if name != "step_000011":
            (tmp_path / "checkpoints" / name / "controller.json").touch()
    assert newest(tmp_path).name == "step_1000000"  # type: ignore[union-attr]
    assert newest(tmp_path, up_to=12).name == "step_000010"  # type: ignore[union-attr]
    assert newest(tmp_path, up_to=1) is None
    with pytest.raises(ResumeError, match=r"has the checkpoints of a run; name one of its .*, such as .*step_1000000"):
        read(tmp_path / "checkpoints")
    (tmp_path / "other").mkdir()
    with pytest.raises(ResumeError, match=r"checkpoint .*/other is none \(controller.json is missing\)"):
        read(tmp_path / "other")
    with pytest.raises(
        ResumeError, match=r"is the folder of a run; name one of its checkpoints, such as .*step_1000000"
    ):
        read(tmp_path)


def test_a_checkpoint_of_an_earlier_version(tmp_path: Path) -> None:
    (tmp_path / "controller.json").write_bytes(b'{"step":2,"seed":0,"ledger":"","format":1}')
    with pytest.raises(ResumeError, match="has format 1, and this version reads format 3"):
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
    assert names == ["latest", *(step_folder(folder, step).name for step in range(1, 13))]
