"""Secrets of the environment reach nothing that a run records or prints."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from miles_spmd.types import secrets
from miles_spmd.types.sample import Sample
from miles_spmd.worker.effective import append_values
from tests import forked
from tests.worker.tiny_run import REFERENCE_ENGINE, write_checkpoint, write_config

SECRETS = {
    "HF_TOKEN": "hf_0123456789",
    "OPENAI_API_KEY": "sk-abcdefgh",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
    "DB_PASSWORD": "correct horse",
    "HTTPS_PROXY": "http://me:proxy-pass@proxy:80",
    "WANDB_API_KEY": "0f0f0f0f0f",
}
VALUES = ["hf_0123456789", "sk-abcdefgh", "wJalrXUtnFEMI", "correct horse", "proxy-pass", "0f0f0f0f0f"]


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    yield
    secrets.secrets.cache_clear()


def test_what_counts_as_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "key.pem").touch()
    others = {
        "PWD": "/home/somebody",
        "TOKENIZERS_PARALLELISM": "not a secret",
        "SSH_KEY": str(tmp_path / "key.pem"),
        "SHORT_TOKEN": "abc",
        "PLAIN_URL": "http://proxy:8080/x",
    }
    for name, value in {**SECRETS, **others}.items():
        monkeypatch.setenv(name, value)
    secrets.secrets.cache_clear()
    text = " ".join([*SECRETS.values(), *others.values()])
    scrubbed = secrets.scrub({"a": [text], "b": 1})["a"][0]
    assert not any(value in scrubbed for value in VALUES)
    assert "$HF_TOKEN $OPENAI_API_KEY" in scrubbed
    assert "http://me:$HTTPS_PROXY@proxy:80" in scrubbed
    assert scrubbed.endswith(" ".join(others.values()))


def test_a_stream_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    below = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    secrets.secrets.cache_clear()
    stream = secrets.scrubbed(below)
    print("a", "hf_0123456789", "b", file=stream, flush=True)
    assert below.buffer.getvalue() == b"a $HF_TOKEN b\n"  # type: ignore[attr-defined]


def test_values_of_the_backends_have_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user's sglang.api_key, say."""

    @dataclasses.dataclass
    class Arguments:
        api_key: str = 'sk-"abc\\defgh"'
        hosts: tuple[str, ...] = ("http://me:proxy-pass@host",)

    monkeypatch.setenv("OPENAI_API_KEY", Arguments.api_key)
    monkeypatch.setenv("HTTPS_PROXY", SECRETS["HTTPS_PROXY"])
    secrets.secrets.cache_clear()
    (file := tmp_path / "config.toml").write_text("[run]\n")
    append_values(file, "sglang", "SGLang", [Arguments()])
    lines = file.read_text().splitlines()
    assert '# api_key = "$OPENAI_API_KEY"' in lines
    assert '#     "http://me:$HTTPS_PROXY@host",' in lines


def leak(sample: Sample, **_: Any) -> float:
    raise RuntimeError(f"401 for https://judge/?key={os.environ['OPENAI_API_KEY']} {os.environ['HF_TOKEN']}")


def test_a_run_does_not_record_them(tmp_path: Path) -> None:
    """A reward raises an error with a secret in it; another is a setting."""
    config = write_config(
        tmp_path,
        write_checkpoint(tmp_path / "model"),
        rollout={"engine": REFERENCE_ENGINE},
        determinism={"parity": "off"},
        reward={
            "rm_type": "tests.worker.test_secrets:leak",
            "reward_environment": ["OPENAI_API_KEY", "HF_TOKEN"],
        },
        telemetry={"wandb_project": SECRETS["OPENAI_API_KEY"]},
    )
    done = forked.run(
        "-m", "miles_spmd", "train", config, "--nproc-per-node", "1", folder=tmp_path, environment=SECRETS
    )
    assert done.returncode == 1
    assert "401 for https://judge/?key=$OPENAI_API_KEY $HF_TOKEN" in done.stderr
    run_dir = tmp_path / "runs" / "tiny"
    assert "$OPENAI_API_KEY" in (run_dir / "config.toml").read_text()
    for path in [tmp_path / "stdout.txt", tmp_path / "stderr.txt", *run_dir.rglob("*")]:
        if path.is_file():
            assert not [value for value in VALUES if value.encode() in path.read_bytes()], path
