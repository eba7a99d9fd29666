"""Checkpoints that are not what was written: every damage is found, and nothing in one is executed."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch.distributed as dist

from miles_spmd.config import Config
from miles_spmd.controller.checkpoint_folders import (
    FORMAT,
    ControllerState,
    ResumeError,
    mark,
    read,
    step_folder,
)
from miles_spmd.training.checkpoint import TrainerCheckpointError
from tests.damages import blank, delete, flip, swap, truncate
from tests.ranks import Ranks
from tests.training.cases import TP2, build, config, save, sequences, share

DAMAGES = 100


def saved(run: Config, folder: str) -> None:
    """Two checkpoints, one update apart, as a run writes them."""
    trainer = build(run)
    for step in (1, 2):
        trainer.train_step(share(sequences((5, 9, 30)), trainer))
        path = step_folder(Path(folder), step)
        digests = save(trainer, path / "actor")
        if dist.get_rank() == 0:
            mark(path, ControllerState(step, 0, "", {"actor": digests}, format=FORMAT))


def found(run: Config, folders: list[str]) -> list[str]:
    """What is said about each checkpoint when it is loaded; "" if nothing."""
    trainer, messages = build(run), []
    for folder in map(Path, folders):
        try:
            trainer.checkpoint.load(folder / "actor", read(folder).folders["actor"])
            messages.append("")
        except (ResumeError, TrainerCheckpointError) as error:
            messages.append(str(error))
    return messages


def test_every_damage_is_found(ranks: Ranks, tmp_path: Path) -> None:
    run = config("qwen3", TP2, run={"mode": "sft", "num_rollout": 5})
    ranks.run(2, saved, run, str(tmp_path / "run"))
    rng, before, newer = random.Random(0), step_folder(tmp_path / "run", 1), step_folder(tmp_path / "run", 2)
    copies, names = [], []
    for number in range(DAMAGES):
        copy = tmp_path / str(number) / newer.name
        shutil.copytree(newer, copy)
        path = rng.choice(sorted(path for path in copy.rglob("*") if path.is_file()))
        other = path.with_stem("rank_00001" if path.stem == "rank_00000" else "rank_00000")
        if not other.exists() or rng.random() < 0.5:  # the same file of another step
            other = tmp_path / "of another step"
            other.write_bytes((before / path.relative_to(copy)).read_bytes())
        content = path.read_bytes()
        rng.choice((flip, flip, truncate, swap, delete, blank))(path, other, rng)
        if path.exists() and path.read_bytes() == content:
            flip(path, other, rng)
        copies.append(str(copy))
        names.append(path.name)
    whole, *messages = zip(*ranks.run(2, found, run, [str(newer), *copies]), strict=True)
    assert whole == ("", "")
    for name, said in zip(names, messages, strict=True):
        # one of two files that were swapped; a mark of another step is whole, but its digests are not those of indexes
        pair = [name.replace("1", "0"), name.replace("0.", "1.")]
        named = pair if "rank" in name else (name, "rank_00000.json")
        assert any(own in message for own in named for message in said), (name, said)


def test_nothing_in_a_checkpoint_is_executed(ranks: Ranks, tmp_path: Path) -> None:
    """Pickles in the place of each file, and beside them by the names of torch's format."""
    executed = tmp_path / "executed"

    class Harmful:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.mkdir, (str(executed),)

    run = config("qwen3", TP2, run={"mode": "sft", "num_rollout": 5})
    ranks.run(2, saved, run, str(tmp_path / "run"))
    folder, harmful = step_folder(tmp_path / "run", 2), pickle.dumps(Harmful())
    names = "actor/rank_00000.json", "actor/rank_00001.bin", "controller.json", "actor/.metadata", "actor/common.pt"
    for name in names:
        copy = Path(shutil.copytree(folder, tmp_path / name.replace("/", "-") / folder.name))
        if name == "actor/rank_00000.json":  # as if its digest were right
            mark(copy, msgspec.structs.replace(read(copy), folders={"actor": []}))
        (copy / name).write_bytes(harmful)
        said = ranks.run(2, found, run, [str(copy)])
        assert any(message for (message,) in said) == (folder / name).exists(), name
        assert not executed.exists()
