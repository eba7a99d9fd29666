"""Resumable checkpoints: the run goes on as if it had not stopped, under the same layout or another."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from miles_spmd.config import Config
from miles_spmd.training import background_save
from miles_spmd.training.checkpoint import TrainerCheckpointError
from tests.models import tiny
from tests.ranks import Ranks
from tests.training.cases import (
    CP2,
    EP2,
    ETP1,
    PP2,
    SP,
    TP2,
    VPP2,
    ZERO,
    Held,
    build,
    config,
    global_loss,
    held,
    save,
    sequences,
    share,
    whole_weights,
)
from tests.training.test_invariance import own_body

BATCH = sequences((5, 17, 40, 9, 30, 31, 2, 12))
ADAM = {"lr": 3e-3, "weight_decay": 0.1}
RUN = {"run": {"mode": "sft", "num_rollout": 10}, "train": {"lr_warmup_iters": 2, "lr_decay_style": "cosine"}}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "TP2+SP": (2, TP2 | SP),
    "VPP2": (2, PP2 | VPP2),
    "CP2": (2, CP2),
    "DP2": (2, {}),
    "one+distributed": (1, ZERO),
    "DP2+distributed": (2, ZERO),
    "TP2+distributed": (2, TP2 | ZERO),
    "EP2": (2, EP2),
    "EP2+distributed": (2, EP2 | ZERO),
    "EP4": (4, {"expert_model_parallel_size": 4}),
    "TP2+SP+EP2": (2, TP2 | SP | EP2 | ETP1),
}
RESUMED = [
    ("qwen3", "one", "one"),
    ("qwen3-tied", "one", "TP2+SP"),
    ("qwen3-tied", "TP2+SP", "VPP2"),
    ("qwen3", "VPP2", "DP2"),
    ("qwen3", "DP2", "CP2"),
    ("qwen3", "DP2+distributed", "DP2+distributed"),
    ("qwen3", "DP2+distributed", "TP2+distributed"),
    ("qwen3-tied", "TP2+distributed", "one+distributed"),
    ("qwen3", "TP2+SP", "TP2+distributed"),  # with another kind of optimizer
    ("qwen3", "DP2+distributed", "VPP2"),
    ("qwen3_moe", "EP2", "EP2"),
    ("qwen3_moe", "EP2", "TP2+SP+EP2"),
    ("qwen3_moe", "EP2", "EP4"),
    ("qwen3_moe", "TP2+SP+EP2", "one"),
    ("qwen3_moe", "TP2+SP", "EP2"),
    ("qwen3_moe", "EP2+distributed", "EP2+distributed"),
    ("qwen3_moe", "EP2+distributed", "one+distributed"),
]


def history(
    run: Config, folder: str, steps: int, load: bool = False, save_after: int = -1
) -> list[tuple[float, float]]:
    """(loss over all ranks, learning rate) of each step."""
    trainer = build(run)
    if load:
        trainer.checkpoint.load(folder)
    micro_batches, results = share(BATCH, trainer), []
    for step in range(steps + 1):
        if step == save_after:
            save(trainer, folder)
        if step < steps:
            results.append(trainer.train_step(micro_batches))
    return [(global_loss(trainer, r.sums[0]), r.lr) for r in results]


@pytest.mark.parametrize(("name", "before", "after"), RESUMED, ids=["-".join(case) for case in RESUMED])
def test_resume(ranks: Ranks, tmp_path: Path, name: str, before: str, after: str) -> None:
    folder = str(tmp_path / "checkpoint")
    size, table = LAYOUTS[before]
    uninterrupted = ranks.run(size, history, config(name, table | ADAM, **RUN), folder, 6, False, 3)[0]
    size, table = LAYOUTS[after]
    resumed = ranks.run(size, history, config(name, table | ADAM, **RUN), folder, 3, True)[0]
    if before == after:
        assert resumed == uninterrupted[3:]
    np.testing.assert_allclose(resumed, uninterrupted[3:], rtol=1e-5)


@pytest.mark.parametrize("layout", ["one", "DP2+distributed"])
def test_resume_in_bf16(ranks: Ranks, tmp_path: Path, layout: str) -> None:
    """With the fp32 copies of weights that the optimizer has then."""
    folder, (size, table) = str(tmp_path / "checkpoint"), LAYOUTS[layout]
    run = config("qwen3_moe", table | ADAM, model={"dtype": "bfloat16"}, **RUN)
    uninterrupted = ranks.run(size, history, run, folder, 6, False, 3)[0]
    assert ranks.run(size, history, run, folder, 3, True)[0] == uninterrupted[3:]


def weights_after(run: Config, folder: str, steps: int, load: bool = False, save_after: int = -1) -> Held:
    trainer = build(run)
    if load:
        trainer.checkpoint.load(folder)
    micro_batches = own_body(trainer, BATCH, None, run.train.reduction_leaves).micro_batches
    for step in range(steps):
        if step == save_after:
            save(trainer, folder)
        trainer.train_step(micro_batches)
    return held(trainer)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_with_reduction_leaves_another_number_of_ranks_resumes_bitwise(
    ranks: Ranks, tmp_path: Path, before: int, after: int
) -> None:
    folder = str(tmp_path / "checkpoint")
    run = config("qwen3", ZERO | ADAM, run=RUN["run"], train=RUN["train"] | {"reduction_leaves": 2})
    whole = whole_weights("qwen3", ranks.run(before, weights_after, run, folder, 4, False, 2))
    resumed = whole_weights("qwen3", ranks.run(after, weights_after, run, folder, 2, True))
    for name, weight in whole.items():
        np.testing.assert_array_equal(resumed[name], weight, err_msg=name)


def test_before_the_first_update(ranks: Ranks, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    run = config("qwen3", ADAM, **RUN)
    whole = ranks.run(1, history, run, folder, 2, False, 0)
    assert ranks.run(1, history, run, folder, 2, True) == whole


def test_the_configuration_decides_the_learning_rate(ranks: Ranks, tmp_path: Path) -> None:
    """A resumed run may have another one, and may be longer; only the number of updates comes from the checkpoint."""
    folder = str(tmp_path / "checkpoint")
    ranks.run(1, history, config("qwen3", ADAM, **RUN), folder, 3, False, 3)
    other = {"run": {"mode": "sft", "num_rollout": 6}, "train": {"lr_decay_style": "linear"}}
    ((_, fourth), (_, fifth)) = ranks.run(1, history, config("qwen3", {"lr": 0.6}, **other), folder, 2, True)[0]
    assert [fourth, fifth] == pytest.approx([0.3, 0.2])


def saved_beside_training(run: Config, folder: Path, offloads: bool) -> bool:
    """Whether a save has written the state that it began with, although the trainer made an update before anything was
    written."""
    trainer, go, write = build(run), threading.Event(), background_save.write
    micro_batches = share(BATCH, trainer)
    trainer.train_step(micro_batches)
    save(trainer, folder / "alone")
    saving = background_save.BackgroundSave()
    background_save.write = lambda *args: write(*args) if go.wait() else None  # type: ignore[assignment]
    try:
        if offloads:
            trainer.offload.move_out()
        saving.start(folder, {"beside": trainer.checkpoint.content()})
        trainer.offload.move_in()
        saving.settle()
        trainer.train_step(micro_batches)
        assert not saving.progress(wait=False).done
        go.set()
        assert not saving.progress(wait=True).problem
    finally:
        background_save.write = write
    one, other = (folder / name / f"rank_{dist.get_rank():05d}.bin" for name in ("alone", "beside"))
    return one.read_bytes() == other.read_bytes() and one.stat().st_size > 1000


@pytest.mark.parametrize("offloads", [False, True])
def test_what_is_written_beside_training_is_what_was_there(ranks: Ranks, tmp_path: Path, offloads: bool) -> None:
    run = config("qwen3_moe", LAYOUTS["EP2+distributed"][1] | ADAM, model={"dtype": "bfloat16"}, **RUN)
    assert ranks.run(2, saved_beside_training, run, tmp_path, offloads) == [True, True]


def loading_errors(run: Config, folders: list[Path], saves: bool = False) -> list[str]:
    trainer, messages = build(run), []
    for folder in folders:
        with pytest.raises(TrainerCheckpointError) as error:
            save(trainer, folder) if saves else trainer.checkpoint.load(folder)
        messages.append(str(error.value))
    return messages


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    ranks.run(2, history, config("qwen3", TP2 | ADAM, **RUN), str(folder), 1, False, 1)
    return folder


def damaged(saved: Path, folder: Path, damage: str) -> Path:
    if damage == "missing":
        return folder
    folder.mkdir()
    if damage == "empty":
        return folder
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    target = folder / ("rank_00001.json" if "index" in damage else "rank_00000.bin")
    if damage.startswith("no"):
        target.unlink()
    else:
        target.write_bytes(target.read_bytes()[: target.stat().st_size // 2])
    return folder


def test_damaged_folders(ranks: Ranks, saved: Path, tmp_path: Path) -> None:
    expected = {
        "missing": "does not exist",
        "empty": "rank_00000.json is missing",
        "no index": "rank_00001.json is missing",
        "truncated index": "rank_00001.json is damaged",
        "no file": "rank_00000.bin is missing",
        "truncated file": "rank_00000.bin is damaged: it has ",
    }
    folders = [damaged(saved, tmp_path / damage, damage) for damage in expected]
    for messages in ranks.run(2, loading_errors, config("qwen3", TP2 | ADAM, **RUN), folders):
        for folder, text, message in zip(folders, expected.values(), messages, strict=True):
            assert f"checkpoint {folder} " in message
            assert text in message


def test_another_model(ranks: Ranks, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, changes = tiny.CONFIGS["qwen3"]
    for name, value in (("vocab_size", 113), ("head_dim", 8)):
        monkeypatch.setitem(tiny.CONFIGS, f"qwen3-{name}", (kind, changes | {name: value}))
    different = [
        (config("qwen3-vocab_size", TP2, **RUN), "vocab_size was 97, now 113"),
        (config("qwen3-head_dim", TP2, **RUN), "kv_channels was 16, now 8"),
        (config("qwen3_moe", TP2, **RUN), "num_moe_experts was None, now 4"),
        (config("qwen3", TP2 | {"optimizer": "sgd"}, **RUN), "optimizer was AdamW, now SGD"),
        (
            config("qwen3", TP2, model={"dtype": "bfloat16"}, **RUN),
            "params_dtype was torch.float32, now torch.bfloat16",
        ),
    ]
    for run, message in different:
        for (error,) in ranks.run(2, loading_errors, run, [saved]):
            assert message in error


def test_a_checkpoint_is_not_written_over_another(ranks: Ranks, saved: Path) -> None:
    for (error,) in ranks.run(2, loading_errors, config("qwen3", TP2, **RUN), [saved], True):
        assert f"File exists: '{saved}/rank_" in error
