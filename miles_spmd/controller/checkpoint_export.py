"""A checkpoint of a run as a Hugging Face folder, from its files alone: no ranks, no GPU, one shard in memory."""

from __future__ import annotations

from pathlib import Path

import torch

from miles_spmd.config import Config
from miles_spmd.controller.checkpoint_folders import ResumeError, beside, read
from miles_spmd.models import load_family
from miles_spmd.models.random import write_random_checkpoints
from miles_spmd.types.engine_group import in_group
from miles_spmd.types.role import Role
from miles_spmd.weights.hugging_face import export_tensors
from miles_spmd.weights.sharded_files import DamagedError, Reader, Share


def export_checkpoint(config: Config, folder: Path, out: Path) -> None:
    """Write the actor's weights in the checkpoint ``folder`` of the run of ``config`` as a Hugging Face folder, and
    those of a second policy beside it. All that is read is verified. Raises ResumeError for a checkpoint that cannot be
    read, ValueError where the export cannot be written."""
    for policy in config.policies:
        _export(config.of_policy(policy), policy, folder, beside(out, policy))


def _export(config: Config, policy: str, folder: Path, out: Path) -> None:
    source = config.model.hf_checkpoint
    write_random_checkpoints([source])
    family = load_family(source, value_head=config.run.mode == "rm")
    try:
        model = in_group(policy, Role.ACTOR)
        reader = Reader(folder / model, read(folder).folders.get(model, ()))

        def fill(name: str, tensor: torch.Tensor) -> None:
            values = tensor.view(-1, tensor.shape[-1])  # a vector is one row
            shape = values.shape[0], values.shape[1]
            share = Share(f"weights.{name}", shape, 0, 0, values)
            if not reader.has(share):
                raise ResumeError(f"checkpoint {folder} has no tensor {name} of shape {list(tensor.shape)}")
            reader.read(share)

        stops = config.rollout.rollout_stop_token_ids if config.run.mode == "rl" else ()
        export_tensors(out, fill, source, family, dtype=getattr(torch, config.model.dtype), stop_token_ids=stops)
    except DamagedError as error:
        raise ResumeError(f"checkpoint {folder} cannot be exported: {error}") from error
