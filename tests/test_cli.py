"""The verbs, in processes of their own; where their start matters, with a new interpreter, as a user calls them."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from miles_spmd import doctor
from miles_spmd.__main__ import main
from miles_spmd.config.load import load_config
from tests import forked
from tests.worker.tiny_run import REFERENCE_ENGINE, write_checkpoint, write_config

REPOSITORY = Path(__file__).parents[1]


def miles_spmd(*arguments: object, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        command = "-m", "miles_spmd", *arguments
        done = forked.run(*command, folder=Path(folder), timeout=280, environment={"COLUMNS": "200"} | environment)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def as_a_user(*arguments: object, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "miles_spmd", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Path:
    return write_config(
        folder,
        write_checkpoint(folder / "model"),
        run={"mode": "sft", "num_rollout": 2},
        rollout={"engine": REFERENCE_ENGINE},
        eval={"eval_prompt_data": {"sums": str(folder / "data.jsonl")}},
        train={"global_batch_size": 4},
    )


def test_help_is_quick_and_names_every_verb() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    text = as_a_user("--help").stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    for verb in ("train", "eval", "export", "plan", "report", "doctor", "chaos"):
        assert re.search(rf"^\W*{verb}\b", text, flags=re.MULTILINE), text
    assert after.ru_utime - before.ru_utime < 0.5  # seconds of computing, whatever else runs


@pytest.mark.parametrize("verb", ["generate", "serve", "slurm"])
def test_help_names_tables(verb: str) -> None:
    """Brackets are markup where nobody says otherwise, and a table's name is left out."""
    table = "slurm" if verb == "slurm" else "megatron"
    assert f"[{table}]" in as_a_user(verb, "--help").stdout


@pytest.mark.parametrize("verb", ["train", "eval", "plan"])
def test_errors_come_before_anything_starts(recipe: Path, verb: str) -> None:
    done = miles_spmd(verb, recipe, "rollout_batchsize=4", "megatron.sequence_parallel=true", status=2)
    assert "2 errors" in done.stderr
    assert "rollout_batchsize=4: unknown setting; did you mean rollout_batch_size?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (recipe.parent / "runs").exists()


def test_only_the_first_rank_names_the_errors(recipe: Path) -> None:
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    first, second = ({"RANK": rank, "LOCAL_RANK": rank, **place} for rank in "01")
    assert "1 error" in miles_spmd("train", recipe, "seed=x", status=2, **first).stderr
    assert miles_spmd("train", recipe, "seed=x", status=2, **second).stderr == ""


def test_dry_run_says_what_plan_says(recipe: Path, folder: Path) -> None:
    overrides = ["mode=rl", f"ref_load={folder / 'model'}", "megatron.tensor_model_parallel_size=2"]
    dry = miles_spmd("train", recipe, *overrides, "--nproc-per-node", 2, "--dry-run")
    plan = miles_spmd("plan", recipe, *overrides, "--world-size", 2)
    assert dry.stdout == plan.stdout
    assert "tensor        1 of 2:  [0 1]" in plan.stdout
    assert "miles-spmd: warning: model.ref_load: nothing uses" in plan.stderr
    assert "miles-spmd: warning: determinism.parity is off: rollout.engine: parity needs 'sglang'" in plan.stderr
    assert not (recipe.parent / "runs").exists()
    assert (
        "model.hf_checkpoint: no folder nowhere" in miles_spmd("plan", recipe, "hf_checkpoint=nowhere", status=2).stderr
    )


def test_a_plan_needs_no_data(recipe: Path) -> None:
    """But says that there is none."""
    plan = as_a_user("plan", recipe, "prompt_data=nowhere.jsonl", "seed=2", status=2)
    assert "data.prompt_data: no file nowhere.jsonl" in plan.stderr
    assert "Batch schedule" in plan.stdout


def test_train_export_evaluate_report(recipe: Path, folder: Path) -> None:
    """The way of a model through the verbs: two steps, its checkpoint exported, the export scored."""
    run = folder / "runs" / "tiny"
    as_a_user("train", recipe, "save_final=true", "export_final=true", "--nproc-per-node", 2)
    assert load_config(run / "config.toml") == load_config(
        recipe,
        ["save_final=true", "export_final=true", "parity=off"],  # "auto", where nothing is generated
    )
    assert (run / "report.html").is_file()
    text = (run / "config.toml").read_text()
    for line in ("# [megatron]", "# adam_beta1 = 0.9", "# weight_decay = 0.01", "# num_layers = "):
        assert line in text
    assert json.loads((run / "environment.json").read_text())["packages"]["megatron-core"] == "0.19.2"

    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused = miles_spmd("train", recipe, "--nproc-per-node", 2, status=2).stderr
    assert "has the metrics of 2 steps, checkpoints up to step_000002 and an export of an earlier run" in refused
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    run = run.rename(run.with_name("renamed"))  # a verb that is given a folder works in that one
    moved = miles_spmd("train", run / "config.toml", "checkpoint.resume=true", "--dry-run", status=2).stderr
    assert "renamed/config.toml was moved or copied, and names " in moved
    export = [run / "checkpoints" / "step_000002", folder / "exported"]
    done = forked.run("-m", "miles_spmd", "export", *export, folder=folder)
    assert done.returncode == 0, done.stderr
    exported = (folder / "exported" / "model.safetensors").read_bytes()
    assert exported == (run / "export" / "model.safetensors").read_bytes()
    assert exported != (folder / "model" / "model.safetensors").read_bytes()
    assert not (folder / "runs" / "tiny").exists()

    evaluate = [recipe, f"hf_checkpoint={folder / 'exported'}"]
    done = forked.run("-m", "miles_spmd", "eval", *evaluate, folder=folder)
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, (folder / "runs" / "tiny-eval" / "metrics.jsonl").read_text().splitlines())
    evaluated = folder / "runs" / "tiny-eval"
    assert f"tiny-eval: evaluation after 0 steps  accuracy {row['eval/sums']:.3g}" in done.stdout
    assert f"report:     {evaluated / 'report.html'}" in done.stdout
    assert '"evaluation":true' in (evaluated / "report.html").read_text()
    with (evaluated / "metrics.jsonl").open("ab") as file:
        file.write(b"{")
    assert "metrics.jsonl: 1 of 2 lines cannot be read: line 2" in miles_spmd("report", evaluated).stderr

    assert miles_spmd("report", folder / "runs").stdout.strip() == str(folder / "runs" / "report.html")


def test_short_help_version_and_completion() -> None:
    assert "train" in as_a_user("-h").stdout
    assert "--dry-run" in as_a_user("train", "-h").stdout
    assert re.fullmatch(r"miles-spmd \d+\.\d+\.\d+\n", as_a_user("--version").stdout)
    assert "_MILES_SPMD_COMPLETE" in as_a_user("--show-completion", "bash").stdout
    words = {"COMP_WORDS": "miles-spmd train x.toml rollout_te", "COMP_CWORD": "3"}
    assert as_a_user(_MILES_SPMD_COMPLETE="complete_bash", **words).stdout.strip() == "rollout_temperature="


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["settings", "--markdown", "lr"], "--markdown prints the whole page"),
        (["plan", "x.toml", "--device-memory", "nan"], "nan is not a finite number above 0"),
        (["plan", "x.toml", "--device-memory", "-5"], "-5.0 is not a finite number above 0"),
        (["plan", "absent\x1b[31m.toml"], r"'absent\x1b[31m.toml' has control characters"),
        (
            ["train", "/dev/null", "--learning-rate=1e-5"],
            "--learning-rate=1e-5: no such option; settings are KEY=VALUE",
        ),
        (["plan", "/dev/null", "--num_generations", "8"], "here it is rollout.n_samples_per_prompt"),
        (["plan", "/dev/null", os.fsdecode(b"name=\xff")], "is not text in UTF-8"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments: list[str], message: str) -> None:
    done = miles_spmd(*arguments, status=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_export_needs_a_run(folder: Path) -> None:
    assert "/nonexistent is not a checkpoint of a run" in miles_spmd("export", "/nonexistent", "out", status=1).stderr
    assert (
        "model is not a checkpoint of a run: "
        in miles_spmd("export", folder / "model", folder / "out", status=1).stderr
    )


@pytest.mark.parametrize(
    "named", ["/nonexistent", "/", "run", "run/checkpoints", "run/checkpoints/step_000001", "elsewhere/deep/copy"]
)
def test_export_names_what_it_needs(tmp_path: Path, named: str) -> None:
    (tmp_path / "config.toml").write_text("unrelated")  # two folders above "run/checkpoints"
    step, copy = tmp_path / "run" / "checkpoints" / "step_000002", tmp_path / "elsewhere" / "deep" / "copy"
    for complete in (step, copy):
        complete.mkdir(parents=True)
        (complete / "controller.json").write_text("{}")
    (step.parent / "step_000001").mkdir()
    stderr = miles_spmd("export", tmp_path / named, tmp_path / "out", status=1).stderr
    assert stderr.count("\n") == 1
    expected = {
        "/nonexistent": "is not a checkpoint of a run: the folder does not exist",
        "run": f"name one of its checkpoints, {step}",
        "run/checkpoints": f"name one of its checkpoints, {step}",
        "run/checkpoints/step_000001": f"name one of its checkpoints, {step}",
        "elsewhere/deep/copy": "is not in the folder of its run, whose config.toml is needed",
    }
    assert expected.get(named, "is not a checkpoint of a run: it has no controller.json") in stderr
    assert not (tmp_path / "out").exists()


def test_an_export_over_other_files_is_refused_before_anything_starts(recipe: Path, folder: Path) -> None:
    """Whatever the path is called, and whoever asks for the export."""
    keep = folder / "keep"
    (keep / "other").mkdir(parents=True)
    (keep / "notes.txt").write_text("mine")
    (folder / "link").symlink_to(keep)
    step = folder / "runs" / "kept" / "checkpoints" / "step_000001"
    step.mkdir(parents=True)
    (step / "controller.json").write_text("{}")
    (step.parents[1] / "config.toml").write_text(recipe.read_text().replace("[model]", "[model]", 1))
    for out in ("keep", f"../{folder.name}/keep"):
        stderr = miles_spmd("train", recipe, "export_final=true", f"export_dir={folder / out}", status=2).stderr
        assert f"{keep} holds files that no export wrote or that were changed since (notes.txt, other)" in stderr
    stderr = miles_spmd("export", step, folder / "link", status=2).stderr
    assert f"{keep} holds files that no export wrote" in stderr
    stderr = miles_spmd("export", step, step.parents[1], status=2).stderr
    assert "overlaps with" in stderr
    assert (keep / "notes.txt").read_text() == "mine"


def test_report_needs_a_run(folder: Path) -> None:
    assert "contains no run" in miles_spmd("report", folder / "model", status=1).stderr


def test_doctor() -> None:
    text = as_a_user("doctor").stdout
    for line in ("ok  torch", "ok  collectives (gloo)", "ok  trainer (Megatron-core)", "ok  engine (SGLang)"):
        assert line in text, text
    if shutil.which("bwrap"):
        assert "ok  sandbox for code" in text, text


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One part that cannot be imported fails the whole path; the reason is on its line."""
    probes = {"trainer": "print('starting'); raise ImportError('this one is broken')", "engine": "print('on the CPU')"}
    monkeypatch.setattr(doctor, "CPU_PROBES", probes)
    sections, works = doctor.examine()
    text = doctor.render(sections, works)
    assert not works
    assert re.search(r"NO  trainer +ImportError: this one is broken", text), text
    assert re.search(r"ok  engine +on the CPU", text), text
    assert "cannot run miles_spmd yet" in text


def test_ctrl_c_while_a_verb_is_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupts:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "miles_spmd.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "miles_spmd.cli", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupts(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err == "miles-spmd: start: stopped by SIGINT\n"
