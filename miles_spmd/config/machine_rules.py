"""Rules about what has to be on this machine: packages, checkpoints, data."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from miles_spmd.config.rules import CONTRADICTIONS, FILES, checkpoint_shape, rule
from miles_spmd.models.random import NO_WEIGHTS

# --- environment -----------------------------------------------------------------------------------------------------


@rule(CONTRADICTIONS)
def _wandb_is_there(use_wandb: bool) -> Iterator[str]:
    if use_wandb and importlib.util.find_spec("wandb") is None:
        yield "telemetry.use_wandb: the package wandb is not installed"


@rule(FILES)
def _checkpoint(hf_checkpoint: Path) -> Iterator[str]:
    yield from _checkpoint_faults("model.hf_checkpoint", hf_checkpoint)


@rule(FILES)
def _other_models(ref_load: Path | None, critic_load: Path | None, teacher_load: Path | None) -> Iterator[str]:
    for name, folder in (("ref_load", ref_load), ("critic_load", critic_load), ("teacher_load", teacher_load)):
        if folder is not None:
            yield from _checkpoint_faults(f"model.{name}", folder)


def _checkpoint_faults(name: str, folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        yield f"{name}: no folder {folder}"
        return
    if checkpoint_shape(folder) is None:
        yield f"{name}: {folder} has no readable config.json"
    if not any(folder.glob("*.safetensors")) and not (folder / NO_WEIGHTS).is_file():
        yield f"{name}: {folder} has no safetensors files"


@rule(FILES)
def _transformer_engine_is_there(transformer_impl: str) -> Iterator[str]:
    if transformer_impl == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        yield (
            "megatron.transformer_impl: the package transformer_engine is not installed (docs/gpu.md says how); "
            "'local' does without it"
        )


@rule(FILES)
def _resumable(load: Path | None) -> Iterator[str]:
    if load is not None and not load.is_dir():
        yield f"checkpoint.load: no folder {load}"


@rule(FILES)
def _data(prompt_data: str, eval_prompt_data: dict[str, str]) -> Iterator[str]:
    named = {"data.prompt_data": prompt_data} | {f"eval.eval_prompt_data.{k}": v for k, v in eval_prompt_data.items()}
    for name, path in named.items():
        file = re.sub(r"@\[[^\]]*\]$", "", path)
        if not Path(file).is_file():
            yield f"{name}: no file {file}"
