"""The measurements of parts, on a tiny model and CPU ranks."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from rich.console import Console
from typer.testing import CliRunner

from miles_spmd.bench import cli
from miles_spmd.bench.result import make_result, show
from miles_spmd.bench.run import bench_config
from miles_spmd.models import load_family
from miles_spmd.models.random import SHAPES
from tests.models import tiny
from tests.models.random_checkpoint import random_checkpoint
from tests.ranks import Ranks


def measure(name: str, folder: Path, overrides: list[str], options: dict[str, Any]) -> list[dict[str, Any]]:
    config = bench_config(str(folder), ["model.dtype=float32", *overrides], dist.get_world_size())
    from miles_spmd.worker.worker import make_engine

    with ExitStack() as stack:
        make = lambda config: stack.enter_context(closing(make_engine(config)))  # noqa: E731
        return importlib.import_module(f"miles_spmd.bench.{name}").measure(config, make, **options)


@pytest.mark.slow
def test_refit(ranks: Ranks) -> None:
    folder = tiny.checkpoint("qwen3")
    overrides = ["megatron.tensor_model_parallel_size=2", "offload_rollout=all"]
    rows, same = ranks.run(2, measure, "refit", folder, overrides, {"repeats": 2})
    assert rows == same
    assert {row["released"] for row in rows} == {"all"}
    assert [row["checksums"] for row in rows] == [True, False]
    nbytes = 2 * 4 * load_family(folder).num_parameters() / 1e9  # two engines of one rank
    for row in rows:
        assert row["GB"] + row["GB from other ranks"] == pytest.approx(nbytes)
        assert row["GB from other ranks"] > 0.4 * nbytes
        parts = ["release", "resume weights", "copy", "resume rest", "commit", "first token"]
        assert row["stopped ms"] == pytest.approx(sum(row[f"{part} ms"] for part in parts))
        assert 0 < row["copy ms"] < row["loop ms"] < row["stopped ms"]
    ((kept, _),) = ranks.run(1, measure, "refit", folder, [], {"repeats": 1})
    assert kept["released"] == "nothing"
    assert not {"release ms", "resume weights ms", "resume rest ms"} & kept.keys()


@pytest.mark.slow
def test_refit_between_trainers_and_engines(ranks: Ranks) -> None:
    folder = tiny.checkpoint("qwen3")
    overrides = ["rollout_num_gpus=2", "megatron.tensor_model_parallel_size=2"]
    rows, *others = ranks.run(4, measure, "refit", folder, overrides, {"repeats": 2})
    assert others == [rows] * 3
    for row in rows:
        assert row["GB"] == 0
        assert row["GB from other ranks"] == pytest.approx(2 * 4 * load_family(folder).num_parameters() / 1e9)
        assert row["stopped ms"] == pytest.approx(row["copy ms"] + row["commit ms"] + row["first token ms"])
        assert 0 < row["copy ms"] < row["loop ms"] < row["stopped ms"]
        assert "release ms" not in row


@pytest.mark.slow
def test_sleep_and_rollout(ranks: Ranks) -> None:
    folder = tiny.checkpoint("qwen3")
    (rows,) = ranks.run(1, measure, "sleep", folder, [], {"cycles": 3})
    assert [row["released"] for row in rows] == ["kv_cache", "all"]
    for row in rows:
        assert row["release ms"] > 0
        assert row["resume ms"] > 0
        assert not row["planned"]
    options = {"prompts": 3, "prompt_tokens": 5, "response_tokens": 7, "repeats": 2, "peer": False}
    ((row,),) = ranks.run(1, measure, "rollout", folder, [], options)
    assert row["tokens/s"] == pytest.approx(3 * 7 / row["s"])


def measure_saves(folder: Path, out: str, offloaded: bool) -> list[dict[str, Any]]:
    overrides = ["model.dtype=float32", "megatron.use_distributed_optimizer=true"]
    config = bench_config(str(folder), overrides, dist.get_world_size())
    return importlib.import_module("miles_spmd.bench.save").measure(config, out, offloaded, repeats=1)


@pytest.mark.slow
@pytest.mark.parametrize("offloaded", [False, True])
def test_save(ranks: Ranks, tmp_path: Path, offloaded: bool) -> None:
    folder = tiny.checkpoint("qwen3")
    rows, same = ranks.run(2, measure_saves, folder, str(tmp_path), offloaded)
    assert rows == same
    (row,) = rows
    assert row["offloaded"] == offloaded
    assert row["GB"] > 3 * 4 * load_family(folder).num_parameters() / 1e9
    assert min(row[f"{part} s"] for part in ("blocking", "writing", "load", "step")) > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_train_through_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    options = ["--model", str(tiny.checkpoint("qwen3")), "--packing", "2x16", "--micro-batches", "2", "--repeats", "1"]
    command = [sys.executable, "-m", "miles_spmd", "bench", "train", *options, "--out", str(out), "--nproc-per-node=2"]
    done = subprocess.run([*command, "model.dtype=float32"], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert (result["bench"], result["ranks"]) == ("train", 2)
    assert result["environment"]["cores"] >= 1
    (row,) = result["rows"]
    assert row["packed"] == "2 x 2 x 16"
    assert row["tokens/s"] == pytest.approx(2 * 2 * 16 * 2 / row["step s"])  # of two replicas
    assert "train: " in done.stdout
    wrong = subprocess.run([*command, "megatron.tensor_paralel=2"], capture_output=True, text=True, check=False)
    assert wrong.returncode != 0
    assert "megatron.tensor_paralel: unknown key" in wrong.stderr
    wrong = subprocess.run([*command, "rollout_num_gpus=1"], capture_output=True, text=True, check=False)
    assert "rollout_num_gpus: must be 0, because `bench train`" in wrong.stderr


@pytest.mark.slow
def test_step_through_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    sizes = ["--prompts=2", "--samples=2", "--prompt-tokens=8", "--response-tokens=4", "--repeats=2"]
    command = [sys.executable, "-m", "miles_spmd", "bench", "step", *sizes, "--nproc-per-node=1", "--out", str(out)]
    model = ["--model", str(tiny_with_tokenizer(tmp_path / "model")), "model.dtype=float32"]
    done = subprocess.run([*command, *model], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["step"] == "2 x 2 x (8 + 4)"
    assert {"rollout s", "train s", "refit s"} <= set(row)
    assert row["response tokens/s per GPU"] == pytest.approx(2 * 2 * 4 / row["step s"])


@pytest.mark.slow
def test_turns_through_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    sizes = ["--prompts=2", "--samples=2", "--turns=3", "--prompt-tokens=8", "--new-tokens=4", "--given=2"]
    command = [sys.executable, "-m", "miles_spmd", "bench", "turns", *sizes, "--repeats=2", "--nproc-per-node=1"]
    model = ["--model", str(tiny_with_tokenizer(tmp_path / "model")), "model.dtype=float32", "--out", str(out)]
    done = subprocess.run([*command, *model], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["sessions"] == "4 x 3 turns x 4 + 2"
    assert row["prefix hits"] > 0.5
    most = 4 * 3 * 4 / row["rollout s"]  # where no response ends by itself
    assert 0.5 * most < row["sampled tokens/s per GPU in a rollout"] < 1.001 * most


@pytest.mark.slow
def test_conversations_of_clients(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    sizes = ["--prompts=2", "--samples=2", "--turns=3", "--prompt-tokens=8", "--new-tokens=4", "--given=2"]
    command = [sys.executable, "-m", "miles_spmd", "bench", "turns", "--clients", *sizes, "--repeats=1", "--warm-up=1"]
    model = ["--model", str(tiny_with_tokenizer(tmp_path / "model")), "model.dtype=float32", "--out", str(out)]
    done = subprocess.run(
        [*command, "--nproc-per-node=1", *model], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    in_process, by_clients = json.loads(out.read_text())["rows"]
    assert in_process["sessions"] == by_clients["sessions"] == "4 x 3 turns x 4 + 2"
    assert min(in_process["prefix hits"], by_clients["prefix hits"]) > 0.5


@pytest.mark.slow
def test_sessions_that_do_not_fit_a_cache(tmp_path: Path) -> None:
    """Where as many run as fit, the engine still has most of their histories."""
    out = tmp_path / "result.json"
    sizes = ["--prompts=8", "--samples=4", "--turns=5", "--prompt-tokens=32", "--new-tokens=8", "--given=8"]
    command = [sys.executable, "-m", "miles_spmd", "bench", "turns", *sizes, "--repeats=1", "--warm-up=1"]
    model = ["--model", str(tiny_with_tokenizer(tmp_path / "model")), "model.dtype=float32", "--out", str(out)]
    command += ["--cache-tokens=500", "--nproc-per-node=1", *model]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    at_once, as_fit = json.loads(out.read_text())["rows"]
    assert at_once["sessions at a time"] == 32 > as_fit["sessions at a time"]
    assert as_fit["prefix hits"] > 2 * at_once["prefix hits"]


def tiny_with_tokenizer(folder: Path) -> Path:
    """A small model of random weights with the tokenizer of a ``random:`` one."""
    random_checkpoint("random:qwen3-0.6b", folder.parent).rename(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | sizes | heads))
    return folder


def test_the_old_name_of_an_option_is_accepted_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(cli, "_measure", lambda *_, **options: seen.update(options))
    done = CliRunner().invoke(cli.app, ["rollout", "--answer-tokens", "3"])
    assert done.exit_code == 0, done.output
    assert seen["response_tokens"] == 3
    assert "miles-spmd: warning: --answer-tokens is now --response-tokens" in done.stderr
    done = CliRunner().invoke(cli.app, ["rollout", "--response-tokens", "4"])
    assert (seen["response_tokens"], done.stderr) == (4, "")


def test_flops_of_a_published_shape() -> None:
    """Qwen3-4B: 4.02 billion parameters, 36 layers of 32 heads of 128; 6 N T and attention over half a square."""
    expected = 6 * 4.02e9 * 4096 + 6 * 36 * 4096 * 4096**2
    assert load_family(SHAPES["qwen3-4b"]).flops(4096) == pytest.approx(expected, rel=1e-3)


def test_shown_as_a_table_and_as_json() -> None:
    result = make_result("refit", "a-model", 1, {}, [{"copy ms": 1.234, "GB": 12345.6, "checksums": True}])
    shown = io.StringIO()
    show(result, Console(file=shown, width=150))
    text = shown.getvalue()
    for word in ("a-model", "copy ms", "1.23", "12,346", "True"):
        assert word in text
    assert json.loads(text.strip().splitlines()[-1])["rows"] == result.rows
