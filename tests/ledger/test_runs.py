"""Runs that are equal, runs that are not and where, and steps done again."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import msgspec
import pytest
import tomli_w
import torch
from safetensors.torch import load_file, save_file

from miles_spmd.controller.checkpoint_folders import ResumeError, mark, read
from miles_spmd.controller.loops.replay import plan, plan_bisection
from miles_spmd.ledger import step_data
from miles_spmd.ledger.chain import FILE, FOLDER, Chain, LedgerError, links, read_record, verify
from miles_spmd.ledger.compare import Comparison, compare
from tests import forked
from tests.ledger.runs import STEPS, Recipe, replayed, train
from tests.ranks import Ranks
from tests.worker.tiny_run import REFERENCE_ENGINE, write_checkpoint, write_config

REPOSITORY = Path(__file__).parents[2]
SFT = ("run.mode=sft", "data.label_key=label", "algorithm.dynamic_sampling_filter=none")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return Recipe(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def first(ranks: Ranks, recipe: Recipe) -> Path:
    """A run, with checkpoints before steps 2 and 4."""
    return train(ranks, recipe.config("first"))


def against(folder: Path, other: Path) -> Comparison:
    return compare(verify(folder), verify(other))


# --- equal -----------------------------------------------------------------------------------------------------------


def test_two_runs_are_equal(ranks: Ranks, recipe: Recipe, first: Path) -> None:
    found = against(first, train(ranks, recipe.config("second")))
    assert found.equal, found.difference
    assert found.steps == list(range(STEPS))
    record = verify(first)
    samples = [step.samples for step in record.steps.values() if step.samples]
    assert sum(s.dropped for s in samples) > 0  # the filter had something to do
    assert len({s.responses for s in samples}) == len({u.weights for s in record.steps.values() for u in s.updates}) / 2


@pytest.mark.parametrize("parallel", ["tensor_model", "pipeline_model", "context"])
def test_two_runs_of_a_model_on_two_ranks(ranks: Ranks, recipe: Recipe, parallel: str) -> None:
    settings = ["run.num_rollout=2", f"megatron.{parallel}_parallel_size=2"]
    found = against(*(train(ranks, recipe.config(f"{parallel}_{n}", *settings), 2) for n in range(2)))
    assert found.equal, found.difference


def test_ranks_and_packing_change_no_bit(ranks: Ranks, recipe: Recipe) -> None:
    """On 1, 2 and 4 ranks, each with an engine, with more memory for each and with less."""
    leaves = ["run.num_rollout=2", "train.reduction_leaves=4", "train.leaf_tokens=64"]
    less = ["train.max_tokens_per_gpu=2048", "megatron.use_distributed_optimizer=true"]
    runs = {1: leaves, 2: leaves, 4: leaves + less}
    alone, *others = (train(ranks, recipe.config(f"on_{n}", *own), n) for n, own in runs.items())
    for folder, layout in (
        (others[0], ["ranks: 1 | 2"]),
        (
            others[1],
            [
                "train.max_tokens_per_gpu: 8192 | 2048",
                "ranks: 1 | 4",
                "megatron.use_distributed_optimizer: None | True",
            ],
        ),
    ):
        found = against(alone, folder)
        assert found.equal, found.difference
        assert found.conditions == []
        assert found.layout == layout
        assert verify(folder).saved  # with the optimizer's state


def test_without_leaves_they_do(ranks: Ranks, recipe: Recipe) -> None:
    alone, two = (train(ranks, recipe.config(f"plain_{n}", "run.num_rollout=1"), n) for n in (1, 2))
    assert against(alone, two).difference.startswith("step 0, train: update 0 (actor): ")


REPLAYS = [  # (step, phase): with every phase, a step right after a checkpoint and a later one, of either checkpoint
    pytest.param(
        step, phase, id=f"{phase}-{step}", marks=[] if (step in (1, 2)) == (phase == "rollout") else pytest.mark.slow
    )
    for step in range(STEPS)
    for phase in (None, "rollout", "train")
]


@pytest.mark.parametrize(("step", "phase"), REPLAYS)
def test_replay_of_any_step(ranks: Ranks, first: Path, step: int, phase: str | None) -> None:
    folder, wanted = replayed(ranks, first, step, phase)
    assert wanted.first == step // 2 * 2  # from the checkpoint before it
    found = compare(verify(first), verify(folder), wanted.steps, phase)
    assert found.equal, found.difference
    assert found.steps[-1] == step
    assert bool(verify(folder).steps[step].updates) == (phase != "rollout")


def test_replay_wants_a_step_that_was_done(ranks: Ranks, first: Path, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="has no step 9: its ledger has steps 0 to 3"):
        replayed(ranks, first, 9)
    copy = Path(shutil.copytree(first, tmp_path / "copy"))
    step_data.path_of(copy, 1).unlink()
    with pytest.raises(LedgerError, match="the responses of step 1 were not kept"):
        replayed(ranks, copy, 1, "train")


def test_what_generated_nothing_has_no_rollout_to_repeat(ranks: Ranks, recipe: Recipe) -> None:
    folder = train(ranks, recipe.config("sft", *SFT))
    with pytest.raises(LedgerError, match=r"run.mode = 'sft', which generates no responses; leave out --phase"):
        replayed(ranks, folder, 1, "rollout")
    with pytest.raises(LedgerError, match=r"run.mode = 'sft', which generates no responses; bisect a run with"):
        plan_bisection(folder, 1)


def test_a_rollout_that_depended_on_time_is_not_repeated(first: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(first, tmp_path / "copy", symlinks=True))
    tables = tomllib.loads((copy / "config.toml").read_text())
    tables["determinism"] |= {"deterministic": False}
    prompts = tables["rollout"]["rollout_batch_size"]
    tables["rollout"] |= {"over_sampling_batch_size": 2 * prompts, "acceptance": "balanced"}
    (copy / "config.toml").write_text(tomli_w.dumps(tables))
    for phase in (None, "rollout"):
        with pytest.raises(LedgerError, match=r"depended on time \(rollout.acceptance = 'balanced'.*--phase train"):
            plan(copy, 1, phase)
    order, _ = plan(copy, 1, "train")
    assert order.phase == "train"


@pytest.mark.parametrize("settings", [b"\xff", b"run = 1", b"[run]\nnum_rollout = 'x'"])
def test_a_configuration_that_cannot_be_read_is_named(first: Path, tmp_path: Path, settings: bytes) -> None:
    copy = Path(shutil.copytree(first, tmp_path / "copy", symlinks=True))
    (copy / "config.toml").write_bytes(settings)
    for planned in (partial(plan_bisection, copy, 1), partial(plan, copy, 1, "rollout")):
        with pytest.raises(LedgerError, match=re.escape(f"{copy}/config.toml: ")):
            planned()


def crashed(first: Path, folder: Path) -> Path:
    """``first`` as if it had been killed in step 3, while it wrote."""
    shutil.copytree(first, folder)
    shutil.rmtree(folder / "checkpoints" / "step_000004")
    *kept, step_3, _ = links(folder)
    chain = folder / FOLDER / FILE
    unfinished = chain.read_bytes()[kept[-1].end : step_3.end - 7]
    Chain(folder, kept[-1]).close()
    with chain.open("ab") as file:
        file.write(unfinished)
    step_data.path_of(folder, 3).with_suffix(".tmp").write_bytes(b"half of it")
    return folder


def test_a_run_that_resumes_has_the_ledger_of_one_that_never_stopped(ranks: Ranks, recipe: Recipe, first: Path) -> None:
    folder = crashed(first, first.with_name("resumed"))
    assert set(read_record(folder).steps) == {0, 1, 2}
    train(ranks, recipe.config("resumed", "checkpoint.resume=true"))
    before, after = verify(first), verify(folder)
    assert (after.steps, after.saved) == (before.steps, before.saved)
    if after.contexts[-1].code == before.contexts[-1].code:  # nobody has changed a file meanwhile
        assert (folder / FOLDER / FILE).read_bytes() == (first / FOLDER / FILE).read_bytes()


def test_other_settings_after_a_restart_are_in_the_ledger(ranks: Ranks, recipe: Recipe, first: Path) -> None:
    folder = crashed(first, first.with_name("changed"))
    train(ranks, recipe.config("changed", "checkpoint.resume=true", "megatron.lr=2e-3"))
    record = verify(folder)
    assert [c.step for c in record.contexts] == [0, 2]
    assert [c.config["megatron"]["lr"] for c in record.contexts] == [1e-3, 2e-3]
    found = against(first, folder)
    assert found.difference == "step 2, train: update 0 (actor): lr 0.001 | 0.002"
    assert found.changes == [f"{folder}: from step 2 on: megatron.lr: 0.001 -> 0.002"]


# --- not equal -------------------------------------------------------------------------------------------------------


def one_bit(file: Path, name: str) -> None:
    tensors = load_file(file)
    tensors[name].view(torch.int32).view(-1)[5] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_bit_of_a_weight(ranks: Ranks, recipe: Recipe, first: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(recipe.model, tmp_path / "model"))
    name = "model.layers.1.mlp.up_proj.weight"
    one_bit(model / "model.safetensors", name)
    found = against(first, train(ranks, recipe.config("bit", f"model.hf_checkpoint={model}", "run.num_rollout=1")))
    assert found.conditions == [
        "run.num_rollout: 4 | 1",
        f"model.hf_checkpoint: {str(recipe.model)!r} | {str(model)!r}",
    ]
    assert found.difference.startswith(f"before step 0: weights of the actor: 1 of 24 tensors differ: {name}; digests")


@pytest.mark.parametrize(
    ("overrides", "condition", "difference"),
    [
        (
            ["run.seed=7"],
            "run.seed: 1234 | 7",
            "step 0, rollout: sample 0 (response 0 to data.jsonl:7): another request: response",
        ),
        (
            ["rollout.rollout_temperature=1.1"],
            "rollout.rollout_temperature: 1.0 | 1.1",
            "step 0, rollout: sample 0 (response 0 to data.jsonl:7): response, token 0: ",
        ),
        (
            ["reward.rm_type=tests.worker.rewards:by_length", "algorithm.dynamic_sampling_filter=none"],
            "algorithm.dynamic_sampling_filter: 'reward_nonzero_std' | None",
            "step 0, rollout: ",
        ),
        (
            ["algorithm.grpo_std_normalization=false"],
            "algorithm.grpo_std_normalization: True | False",
            "step 0, train: update 0 (actor): sample 0 (response 0 to data.jsonl:7): advantages, token ",
        ),
        (
            ["algorithm.kl_loss_coef=0.1"],
            "algorithm.kl_loss_coef: 0.0 | 0.1",
            "step 0, train: update 0 (actor): sample 0 (response 0 to data.jsonl:7): ref_log_probs in one run only",
        ),
        (
            ["algorithm.entropy_coef=0.1"],
            "algorithm.entropy_coef: 0.0 | 0.1",
            "step 0, train: update 0 (actor): train/loss ",
        ),
        (
            ["megatron.adam_eps=1e-5"],
            "megatron.adam_eps: None | 1e-05",
            "step 0, train: update 0 (actor): weights after",
        ),
    ],
)
def test_settings(
    ranks: Ranks, recipe: Recipe, first: Path, overrides: list[str], condition: str, difference: str
) -> None:
    found = against(first, train(ranks, recipe.config("other", "run.num_rollout=1", *overrides)))
    assert condition in found.conditions
    assert found.difference.startswith(difference)


def test_another_prompt_in_a_row(ranks: Ranks, recipe: Recipe, first: Path, tmp_path: Path) -> None:
    rows = (recipe.file.parent / "data.jsonl").read_text().splitlines()
    rows[6] = rows[6].replace("plus", "plas")
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    overrides = [f"data.prompt_data={tmp_path}/data.jsonl", "run.num_rollout=1"]
    found = against(first, train(ranks, recipe.config("other", *overrides)))
    what = "sample 0 (response 0 to data.jsonl:7): prompt, token 4: 316 | "
    assert found.difference.startswith(f"step 0, rollout: {what}")


def test_another_order(ranks: Ranks, recipe: Recipe) -> None:
    """Of the same four prompts."""
    few = [f"data.prompt_data={recipe.file.parent}/data.jsonl@[0:4]", "run.num_rollout=1"]
    few.append("algorithm.dynamic_sampling_filter=none")
    folders = [
        train(ranks, recipe.config(name, *few, f"data.rollout_shuffle={shuffle}"))
        for name, shuffle in (("shuffled", "true"), ("in_order", "false"))
    ]
    found = against(*folders)
    assert found.conditions == ["data.rollout_shuffle: True | False"]
    assert found.difference.startswith(
        "step 0, rollout: the same requests in another order, from sample 0 (response 0 to"
    )


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (1, "the same sequences in another order, from sample 0 (response 0 to data.jsonl:10) on"),  # of its prompt
        (3, "sample 0 (response 0 to data.jsonl:10): tokens, token "),  # of another prompt
    ],
)
def test_swapped_responses(ranks: Ranks, first: Path, tmp_path: Path, other: int, difference: str) -> None:
    """A replay trains on the responses of a step of which two were exchanged."""
    copy = Path(shutil.copytree(first, tmp_path / "copy"))
    kept = step_data.read(copy, 1)
    assert kept is not None
    assert kept.samples is not None
    for name in ("responses", "log_probs"):
        swapped = getattr(kept.samples, name).split()
        swapped[0], swapped[other] = swapped[other], swapped[0]
        setattr(kept.samples, name, step_data.Ragged.of(swapped))
    store = step_data.DataStore(copy, STEPS, 2**30, lambda steps: None)
    store.write(1, kept)
    store.close()
    folder, wanted = replayed(ranks, copy, 1, "train")
    found = compare(verify(first), verify(folder), wanted.steps, "train")
    assert found.difference.startswith(f"step 1, train: update 0 (actor): {difference}")
    with pytest.raises(LedgerError, match=r"step_000001.msgpack.z: the samples are not those of the ledger"):
        verify(copy)


def test_without_data_samples_have_numbers(ranks: Ranks, recipe: Recipe, first: Path) -> None:
    overrides = ["determinism.ledger_data_gib=0", "rollout.rollout_temperature=1.1", "run.num_rollout=2"]
    folder = train(ranks, recipe.config("no_data", *overrides))
    assert not list((folder / FOLDER / "data").iterdir())
    copy = Path(shutil.copytree(first, first.with_name("copy"), dirs_exist_ok=True))
    shutil.rmtree(copy / FOLDER / "data")
    difference = compare(read_record(copy), verify(folder)).difference
    assert difference == "step 0, rollout: sample 0: response or its log-probs differ"


# --- broken ----------------------------------------------------------------------------------------------------------


def test_every_byte_of_a_ledger_counts(first: Path, tmp_path: Path) -> None:
    chain = Path(shutil.copytree(first, tmp_path / "copy")) / FOLDER / FILE
    whole = chain.read_bytes()
    starts = [0]
    for line in whole.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    words = ["the beginning", "that of context 0", "that of step 0", "that of step 1", "that of saved 2"]
    assert len(starts) > len(words)
    for entry, (start, end) in enumerate(itertools.pairwise(starts)):
        for place in range(start, end - 1, 61):
            chain.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(LedgerError, match=f"entry {entry}, after ") as error:
                verify(chain.parents[1])
            assert entry >= len(words) or words[entry] in str(error.value)


def test_entries_cannot_be_left_out_or_exchanged(first: Path, tmp_path: Path) -> None:
    chain = Path(shutil.copytree(first, tmp_path / "copy")) / FOLDER / FILE
    lines = chain.read_bytes().splitlines(keepends=True)
    for wrong in (lines[:1] + lines[2:], [*lines[:1], lines[2], lines[1], *lines[3:]]):
        chain.write_bytes(b"".join(wrong))
        with pytest.raises(LedgerError, match="entry 1, after that of context 0: its hash does not follow"):
            verify(chain.parents[1])


def test_data_are_those_of_the_entries(first: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(first, tmp_path / "copy"))
    step_data.path_of(folder, 1).write_bytes(step_data.path_of(folder, 2).read_bytes())
    with pytest.raises(LedgerError, match=r"step_000001.msgpack.z: the samples are not those of the ledger"):
        verify(folder)
    step_data.path_of(folder, 1).unlink()
    missing = r"step_000001.msgpack.z: is missing; seal.json lists the data of steps 0 to 3"
    with pytest.raises(LedgerError, match=missing):
        verify(folder)


def test_a_changed_checkpoint_is_not_resumed_from(ranks: Ranks, recipe: Recipe, first: Path) -> None:
    """A whole checkpoint of a run that went on otherwise, which holds together by itself."""
    folder = crashed(first, first.with_name("tampered"))
    other = train(ranks, recipe.config("other", "megatron.lr=2e-3", "run.num_rollout=2"))
    ours, theirs = (run / "checkpoints" / "step_000002" for run in (folder, other))
    ledger = read(ours).ledger
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    mark(ours, msgspec.structs.replace(read(theirs), ledger=ledger))
    with pytest.raises(LedgerError, match="the checkpoint of step 2 is not what was saved: "):
        train(ranks, recipe.config("tampered", "checkpoint.resume=true"))


def test_a_run_whose_ledger_is_damaged_goes_on_without_one(ranks: Ranks, recipe: Recipe, first: Path) -> None:
    folder = Path(shutil.copytree(first, first.with_name("broken"), symlinks=True))
    ledger = folder / FOLDER / FILE
    ledger.write_bytes(ledger.read_bytes()[:100])
    resumed = ["run.num_rollout=5", "checkpoint.resume=true"]
    with pytest.raises(LedgerError, match=r"cut off or changed; put the ledger back, or set determinism.ledger=false"):
        train(ranks, recipe.config("broken", *resumed))
    train(ranks, recipe.config("broken", *resumed, "determinism.ledger=false"))
    assert ledger.stat().st_size == 100


def test_a_checkpoint_of_another_ledger(ranks: Ranks, recipe: Recipe, first: Path) -> None:
    folder = crashed(first, first.with_name("mixed"))
    checkpoint = folder / "checkpoints" / "step_000002"
    mark(checkpoint, msgspec.structs.replace(read(checkpoint), ledger="f" * 32))
    with pytest.raises(ResumeError, match=r"no checkpoint of .* can be loaded: .* is not in the ledger of"):
        train(ranks, recipe.config("mixed", "checkpoint.resume=true"))


# --- through the command line, on two ranks and on one; runs with SGLang's engine are in tests/worker ----------------


def test_verbs(tmp_path: Path) -> None:
    recipe = write_config(
        tmp_path,
        write_checkpoint(tmp_path / "model"),
        run={"num_rollout": 2},
        rollout={"engine": REFERENCE_ENGINE},
        algorithm={"dynamic_sampling_filter": "reward_nonzero_std"},
        reward={"rm_type": "tests.recipe_run:coin"},
        train={"reduction_leaves": 2},
        determinism={"deterministic": True},
    )
    run, again = tmp_path / "runs" / "tiny", tmp_path / "runs" / "tiny-replay-1"
    trained = forked.run("-m", "miles_spmd", "train", recipe, "--nproc-per-node", 2, folder=tmp_path)
    assert trained.returncode == 0, trained.stderr
    replay = forked.run("-m", "miles_spmd", "replay", run, "--step", 1, "--nproc-per-node", 1, folder=tmp_path)
    assert replay.returncode == 0, replay.stderr
    for shown in (replay.stdout, miles_spmd("diff", run, again)):
        *conditions, found = shown.splitlines()
        assert "layout: ranks: 2 | 1" in conditions
        assert found == "steps 0 to 1: no difference, except for the layout"
    assert miles_spmd("ledger", "verify", run) == f"{run}: 3 entries hold together, 2 of them steps\n"
    chain = again / FOLDER / FILE
    chain.write_bytes(chain.read_bytes().replace(b'"lr":0.0001', b'"lr":0.0002'))
    assert "entry 0, after the beginning: its hash" in miles_spmd("ledger", "verify", again, status=1)
    assert "entry 0, after the beginning: its hash" in miles_spmd("diff", run, again, status=2)
    assert "has no ledger" in miles_spmd("diff", run, tmp_path, status=2)
    settings = run / "config.toml"
    settings.write_text(settings.read_text().replace("lr = 0.0001", "lr = 0.0002"))
    replay = forked.run("-m", "miles_spmd", "replay", run, "--step", 1, "--nproc-per-node", 1, folder=tmp_path)
    assert replay.returncode == 1
    assert "first difference: step 0, train: update 0 (actor): lr 0.0001 | 0.0002" in replay.stdout
    assert "miles-spmd: " not in replay.stderr  # the difference is the message
    shutil.copytree(run, tmp_path / "copy")
    step_data.path_of(tmp_path / "copy", 1).unlink()
    assert "step_000001.msgpack.z: is missing" in miles_spmd("diff", run, tmp_path / "copy", status=2)


def miles_spmd(*arguments: object, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "miles_spmd", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + (done.stderr if status else "")
