"""A run that is small enough to be started many times: its checkpoint, data and configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tomli_w

from miles_spmd.platform import cpu
from tests.data.conftest import write_tokenizer

REFERENCE_ENGINE = "tests.reference_engine:TorchEngine"  # quick to start: for runs that are not about generation


def write_checkpoint(folder: Path) -> Path:
    """A random two-layer Qwen3 with a byte-level tokenizer."""
    cpu.install()
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    write_tokenizer(folder)
    torch.manual_seed(0)
    Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=32,
            intermediate_size=64,
            head_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=512,
            max_position_embeddings=128,
            tie_word_embeddings=True,
        )
    ).save_pretrained(folder)
    return folder


def write_config(folder: Path, checkpoint: Path, /, **changes: dict[str, Any]) -> Path:
    """``changes`` are whole settings by table: ``deadlines={"train_timeout": 5.0}``."""
    rows = [{"prompt": f"What is {i} plus {i}?", "label": str(2 * i)} for i in range(16)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": "tiny", "output_dir": str(folder / "runs"), "num_rollout": 3},
        "model": {"hf_checkpoint": str(checkpoint), "dtype": "float32"},
        "data": {"prompt_data": str(folder / "data.jsonl")},
        "rollout": {
            "rollout_batch_size": 4,
            "n_samples_per_prompt": 2,
            "rollout_max_response_len": 8,
        },
        "reward": {"rm_type": "exact"},
        "telemetry": {"progress": "plain"},
        "checkpoint": {"export_final": False},
        "megatron": {"lr": 1e-4},
    }
    for table, settings in changes.items():
        tables[table] = tables.get(table, {}) | settings
    path = folder / "config.toml"
    path.write_text(tomli_w.dumps(tables))
    return path
