"""Whether a run may begin in its folder: decided before anything is written, and nothing is touched by a refusal."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from miles_spmd.config import Config
from miles_spmd.config.load import load_config, make_tables
from miles_spmd.controller.checkpoint_folders import ControllerState, mark, step_folder
from miles_spmd.controller.run_folder import (
    RunFolderError,
    check,
    check_recipe,
    check_results,
    claim,
    describe,
    in_folder,
    of_task,
    outcome,
)
from miles_spmd.telemetry.trackers import JsonlTracker
from miles_spmd.types.run_files import TURNS, adopt_config, newest_config


def make(folder: Path, *overrides: str, **tables: Any) -> Config:
    raw = {
        "run": {"name": "x", "output_dir": str(folder / "runs")},
        "model": {"hf_checkpoint": str(folder / "model")},
        "data": {"prompt_data": str(folder / "data.jsonl")},
        "checkpoint": {"export_final": False},
    }
    return make_tables(Config, raw | tables, overrides, check_files=False)


def leave_results(config: Config, steps: int = 3, saved: int | None = 2) -> None:
    """What a run has in its folder after some steps."""
    with claim(config, "train"):  # type: ignore[union-attr]
        describe(config, "train")
    tracker = JsonlTracker(config.run_dir / "metrics.jsonl")
    for step in range(steps + 1):
        tracker.log(step, {"train/loss": 1.0})
    tracker.close()
    if saved is not None:
        folder = step_folder(config.run_dir, saved)
        folder.mkdir(parents=True)
        mark(folder, ControllerState(saved, 1234))


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in folder.rglob("*")}


def test_results_are_continued_kept_or_deleted_as_the_message_says(tmp_path: Path) -> None:
    config = make(tmp_path)
    leave_results(config)
    before = contents(tmp_path)
    for attempt in (check, check_results, claim):
        with pytest.raises(RunFolderError) as error:
            attempt(config, "train")
        assert "runs/x has the metrics of 3 steps and checkpoints up to step_000002 of an earlier run" in str(
            error.value
        )
        for remedy in ("checkpoint.resume=true", "another run.name", "run.overwrite=true"):
            assert remedy in str(error.value)
    assert contents(tmp_path) == before
    check(make(tmp_path, "run.name=y"), "train")
    for own in ("checkpoint.resume=true", f"checkpoint.load={step_folder(config.run_dir, 2)}"):
        claim(make(tmp_path, own), "train").close()  # type: ignore[union-attr]
        assert before.keys() == contents(tmp_path).keys()
    claim(make(tmp_path, "run.overwrite=true"), "train").close()  # type: ignore[union-attr]
    assert {path.name for path in config.run_dir.iterdir()} == {"config.toml", "environment.json", "lock"}
    check(config, "train")


def test_a_run_without_a_checkpoint_does_not_replace_more_than_metrics(tmp_path: Path) -> None:
    """A run that was killed before its first checkpoint begins anew. One that has ended, or lost a file, does not."""
    config = make(tmp_path, "checkpoint.resume=true")
    leave_results(config, saved=None)
    step_folder(config.run_dir, 2).with_name("step_000002.incomplete").mkdir(parents=True)
    check(config, "train")
    export = config.run_dir / "export" / "model.safetensors"
    export.parent.mkdir()
    export.touch()
    before = contents(tmp_path)
    for attempt in (check, check_results, claim):
        with pytest.raises(RunFolderError, match=r"an export of an earlier run, but the checkpoint .* is missing"):
            attempt(config, "train")
    assert contents(tmp_path) == before
    export.unlink()
    step_folder(config.run_dir, 4).mkdir()
    with pytest.raises(RunFolderError, match=r"step_000004 is damaged: controller.json is missing, and no other"):
        check(config, "train")
    mark(step_folder(config.run_dir, 4), ControllerState(4, 1234))
    export.touch()
    check(config, "train")


def test_a_continued_run_keeps_its_settings_until_its_checkpoint_is_loaded(tmp_path: Path) -> None:
    config = make(tmp_path)
    leave_results(config)
    before = (config.run_dir / "config.toml").read_bytes()
    changed = make(tmp_path, "checkpoint.resume=true", "model.dtype=float32")
    for _ in range(2):  # the first attempt failed
        describe(changed, "train")
        assert (config.run_dir / "config.toml").read_bytes() == before
        assert 'dtype = "float32"' in newest_config(config.run_dir).read_text()
    adopt_config(config.run_dir)
    assert 'dtype = "float32"' in (config.run_dir / "config.toml").read_text()
    assert newest_config(config.run_dir) == config.run_dir / "config.toml"
    describe(changed, "train")
    describe(make(tmp_path), "train")  # which begins anew
    assert newest_config(config.run_dir).read_bytes() == before


def test_a_copy_is_not_taken_for_the_run_that_it_was_copied_from(tmp_path: Path) -> None:
    config = make(tmp_path, "run.name=a b")
    leave_results(config)
    recipe = Path(shutil.copytree(config.run_dir, tmp_path / "copy of x")) / "config.toml"

    def load(*overrides: str) -> Config:
        return load_config(recipe, overrides, check_files=False)

    check_recipe(load(), recipe)
    with pytest.raises(RunFolderError, match=r"copy of x/config.toml was moved or copied, and names .*/a b,") as raised:
        check_recipe(load("checkpoint.resume=true"), recipe)
    own = shlex.split(str(raised.value).rpartition(" add ")[2])
    continued = load("checkpoint.resume=true", *own)
    assert continued.run_dir == recipe.parent
    check_recipe(continued, recipe)
    check_recipe(load("checkpoint.resume=true", "run.name=other"), recipe)  # which the user has named
    (tmp_path / "link").symlink_to(recipe.parent)
    check_recipe(continued, tmp_path / "link" / "config.toml")
    (recipe.parent / "lock").unlink()
    check_recipe(load("checkpoint.resume=true"), recipe)  # a recipe that lies somewhere


@pytest.mark.parametrize("task", ["replay", "bisect", "warm"])
def test_a_repetition_replaces_only_what_it_has_made(tmp_path: Path, task: str) -> None:
    """Its folder has a name that is derived from a run's, which another run may have."""
    config = make(tmp_path)
    with claim(config, task):  # type: ignore[union-attr]
        describe(config, task)
    check(config, task)
    shutil.rmtree(config.run_dir)
    leave_results(config)
    for damage in (lambda: None, (config.run_dir / "config.toml").unlink):
        damage()
        before = contents(tmp_path)
        for attempt in (check, claim):
            with pytest.raises(RunFolderError, match=rf"runs/x was not made by `miles-spmd {task}`"):
                attempt(config, task)
        assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["metrics", "checkpoint", "incomplete", "export"])
def test_any_result_counts(tmp_path: Path, kind: str) -> None:
    config = make(tmp_path)
    leave_results(config, steps=1 if kind == "metrics" else -1, saved=4 if kind == "checkpoint" else None)
    if kind == "incomplete":
        step_folder(config.run_dir, 6).mkdir(parents=True)
    if kind == "export":
        (config.run_dir / "export").mkdir()
        (config.run_dir / "export" / "model.safetensors").touch()
    with pytest.raises(RunFolderError):
        check(config, "train")


def test_what_a_failed_start_left_is_in_nobodys_way(tmp_path: Path) -> None:
    config = make(tmp_path)
    leave_results(config, steps=-1, saved=None)
    (config.run_dir / "environment.json").unlink()  # not yet written
    (config.run_dir / "metrics.jsonl").write_bytes(b'{"step": 1, "tra')  # cut by the end
    (config.run_dir / "logs").mkdir()
    (config.run_dir / "logs" / "rank-0.log").write_text("why it failed\n")
    with claim(config, "train"):  # type: ignore[union-attr]
        assert not (config.run_dir / "metrics.jsonl").exists()
    assert (config.run_dir / "logs" / "rank-0.log").read_text() == "why it failed\n"


def test_an_evaluation_has_a_folder_of_its_own_and_the_same_rules(tmp_path: Path) -> None:
    config = make(tmp_path)
    leave_results(config)
    evaluation = of_task(config, "eval")
    assert evaluation.run_dir.name == "x-eval"
    leave_results(evaluation, steps=0, saved=None)
    with pytest.raises(RunFolderError, match=r"x-eval has metrics of an earlier run; choose another run.name"):
        check(evaluation, "eval")
    resumed = of_task(make(tmp_path, "checkpoint.resume=true"), "eval")
    assert resumed.checkpoint.load == step_folder(config.run_dir, 2)
    with pytest.raises(RunFolderError, match="has no checkpoint to evaluate"):
        of_task(make(tmp_path, "checkpoint.resume=true", "run.name=other"), "eval")


HOLDER = """
import sys, time
from miles_spmd.config import Config
from miles_spmd.controller.run_folder import claim
lock = claim(Config.model_validate_json(sys.argv[1]), "train")
print("held", flush=True)
time.sleep(600)
"""


def test_two_runs_do_not_share_a_folder_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    config = make(tmp_path)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, config.model_dump_json()], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    for changes in ([], ["checkpoint.resume=true"], ["run.overwrite=true"]):
        for attempt in (check, claim):
            with pytest.raises(RunFolderError, match=rf"another run is writing into .*runs/x \(pid {holder.pid} on "):
                attempt(make(tmp_path, *changes), "train")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    claim(config, "train").close()  # type: ignore[union-attr]


def test_warm_tries_where_it_keeps_kernels(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"run.kernel_cache: cannot write into /proc/none"):
        check(of_task(make(tmp_path, "run.kernel_cache=/proc/none"), "warm"), "warm")
    check(make(tmp_path, "run.kernel_cache=/proc/none"), "train")


@pytest.mark.parametrize(
    ("override", "setting"),
    [("run.output_dir=/proc/none", "run.output_dir"), ("checkpoint.export_dir=/proc/none", "checkpoint.export_dir")],
)
def test_every_place_is_tried_at_the_start(tmp_path: Path, override: str, setting: str) -> None:
    config = make(tmp_path, "checkpoint.export_final=true", override)
    with pytest.raises(RunFolderError, match=rf"{setting}.*: cannot write into /proc/none"):
        check(config, "train")
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(RunFolderError, match="cannot write into"):
        check(make(tmp_path), "train")
    assert (tmp_path / "runs").read_text() == "mine"


@pytest.mark.parametrize("name", ["checkpoints", "ledger", "logs"])
def test_a_link_to_a_disk_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    config = make(tmp_path, "checkpoint.resume=true")
    leave_results(config, saved=None)
    (config.run_dir / name).symlink_to(tmp_path / "not mounted")
    with pytest.raises(RunFolderError, match=rf"cannot write into {config.run_dir}/{name}: No such file"):
        check(config, "train")


def test_an_export_writes_only_where_it_is_told(tmp_path: Path) -> None:
    """The run may lie on a disk that is read-only."""
    config = make(tmp_path, "run.output_dir=/proc/none", f"checkpoint.export_dir={tmp_path}/out")
    check(config, "export")


def test_overwriting_never_deletes_what_the_run_reads(tmp_path: Path) -> None:
    leave_results(make(tmp_path))
    export = tmp_path / "runs" / "x" / "export"
    for model in (export, tmp_path / "runs" / ".." / "runs" / "x" / "export"):
        config = make(tmp_path, "run.overwrite=true", model={"hf_checkpoint": str(model)})
        with pytest.raises(RunFolderError, match=r"would delete .*export, which this run reads"):
            claim(config, "train")
    both = make(tmp_path, "run.overwrite=true", "checkpoint.resume=true")
    for act in (check, check_results):
        with pytest.raises(RunFolderError, match=r"checkpoint.resume continues what run.overwrite would delete"):
            act(both, "train")
    check_results(both, "eval")  # it scores the run's newest checkpoint, and overwrites an evaluation


def test_a_recipe_of_a_user_is_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("# mine")
    with pytest.raises(RunFolderError, match=r"is not the folder of a run, but has a config.toml"):
        claim(make(tmp_path), "train")
    assert (folder / "config.toml").read_text() == "# mine"


def test_an_overwriting_run_does_not_pass_that_on(tmp_path: Path) -> None:
    config = make(tmp_path, "run.overwrite=true")
    with claim(config, "train"):  # type: ignore[union-attr]
        describe(config, "train")
    assert "overwrite = false" in (config.run_dir / "config.toml").read_text()


@pytest.mark.parametrize("name", ["moved", "7", "true", "[a]", 'a"b c', "naïve 😀"])
def test_a_folder_of_any_name_is_meant_by_its_overrides(tmp_path: Path, name: str) -> None:
    config = make(tmp_path, *in_folder(tmp_path / name, "-replay-1"))
    assert config.run_dir == tmp_path / f"{name}-replay-1"


def test_the_end_of_a_run_says_what_there_is(tmp_path: Path) -> None:
    config = make(tmp_path, "run.num_rollout=4", "checkpoint.export_final=true")
    assert outcome(config, "train", 1, finished=False) == []  # nothing was done
    leave_results(config)
    report, *rest = outcome(config, "train", 2, finished=False)
    folder = config.run_dir
    assert report == f"report:     {folder}/report.html"
    assert Path(report.split()[1]).is_file()
    resume = f"miles-spmd train {folder}/config.toml checkpoint.resume=true --nproc-per-node 2"
    assert rest == [f"checkpoint: {folder}/checkpoints/step_000002", f"continue:   {resume}"]
    lines = outcome(config, "train", 1, finished=True)
    assert lines[1] == f"export:     {folder}/export"
    assert lines[-1].endswith("checkpoint.resume=true num_rollout=N")


def test_an_interrupted_step_folder_is_no_checkpoint(tmp_path: Path) -> None:
    config = make(tmp_path)
    leave_results(config, saved=None)
    lines = outcome(config, "train", 1, finished=False)
    none = "checkpoint: none, so the run cannot be continued; "
    assert lines[-1] == f"{none}checkpoint.save_interval asks for some"
    config = make(tmp_path, "checkpoint.save_interval=5")
    assert outcome(config, "train", 1, finished=False)[-1] == (
        f"{none}the first was due after step 5, as checkpoint.save_interval says"
    )


def test_finished_responses_are_results(tmp_path: Path) -> None:
    """A run that is killed before its first checkpoint continues with those that rollout.durable has kept."""
    config = make(tmp_path, "rollout.durable=true")
    turns = config.run_dir / TURNS / "step_000000000"
    turns.parent.mkdir(parents=True)
    turns.write_bytes(b"response")
    with pytest.raises(
        RunFolderError, match=r"has the finished responses of 1 step of an earlier run; set checkpoint.r"
    ):
        check_results(config, "train")
    checkpoint, resume = outcome(config, "train", 1, finished=False)
    assert checkpoint == "checkpoint: none; the run begins anew with the finished responses of 1 step"
    assert resume.endswith("config.toml checkpoint.resume=true")
    with claim(make(tmp_path, "rollout.durable=true", "checkpoint.resume=true"), "train"):  # type: ignore[union-attr]
        assert turns.read_bytes() == b"response"
    with claim(make(tmp_path, "run.overwrite=true"), "train"):  # type: ignore[union-attr]
        assert not turns.exists()


def test_the_lock_names_its_holder(tmp_path: Path) -> None:
    config = make(tmp_path)
    with claim(config, "train"):  # type: ignore[union-attr]
        assert f"pid {os.getpid()} on " in (config.run_dir / "lock").read_text()
