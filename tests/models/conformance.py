"""A model in trainer and engine side by side, and in transformers."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import transformers

from miles_spmd.config import Config
from miles_spmd.models import FAMILIES, Family, load_family
from tests.generation.conformance import prompt, request, run
from tests.invariant.side_by_side import sequence


class Found(NamedTuple):
    """What an engine has generated: all tokens and the log-probs of the generated ones, by request; on how many of
    these a trainer's log-probs differ; how many rotary modules the engine's layers have."""

    generated: list[tuple[list[int], list[float]]]
    differing: int
    rotary_modules: int


def both(
    folder: Path,
    family: type[Family] | None = None,
    megatron: dict[str, Any] | None = None,
    *,
    context: int = 160,
    first: int = 20,
    more: int = 9,
    tp_size: int = 1,
    ep_size: int = 1,
    export: Path | None = None,
    **sampling: Any,
) -> Found:
    """Generate with prompts of ``first``, ``first + more``, ... tokens, and score what was generated; on each rank of
    trainer and engine. ``family`` describes the model in place of the one for its model type; ``export``: where the
    trainer's weights are exported to, as they were loaded."""
    from miles_spmd.algorithms.losses import make_loss
    from miles_spmd.training.trainer import Trainer
    from miles_spmd.weights import hugging_face
    from miles_spmd.worker.worker import make_engine

    run_config = Config(
        model={"hf_checkpoint": folder, "dtype": "float32"},
        data={"prompt_data": "none"},
        megatron=megatron or {},
        determinism={"parity": "bitwise"},
        sglang={"context_length": context, "tp_size": tp_size, "ep_size": ep_size},
    )
    with patch.dict(FAMILIES, {family.model_type: family}) if family else nullcontext():
        described = load_family(folder)
        trainer = Trainer(run_config, described, make_loss("rl", run_config.algorithm))
        engine: Any = make_engine(run_config)
        try:
            for one in (trainer, engine):
                hugging_face.load(folder, one.weights(), one.layout(), described)
            engine.commit(0)
            if export:
                hugging_face.export(export, trainer.weights(), trainer.layout(), folder, described)
            options = {"max_new_tokens": 24, "ignore_eos": True} | sampling
            asked = [request(str(i), [t % 97 for t in prompt(i, first + more * i)], **options) for i in range(7)]
            outputs = run(engine, asked)
            modules = {id(layer.self_attn.rotary_emb) for layer in engine._model.model.layers}
        finally:
            engine.close()
        if not engine.leader:  # it has scored nothing, but takes part
            outputs = {}
        made: list[Any] = [outputs]
        if torch.distributed.get_world_size() > 1:
            torch.distributed.broadcast_object_list(made)
        pairs = [(one, made[0][one.rid]) for one in asked]
        scores = trainer.log_probs([[sequence(*pair, 1.0) for pair in pairs]]).log_probs
    differing = 0
    for (_, output), score in zip(pairs, scores or ()):
        decoded = np.asarray(output.output_log_probs, np.float32)
        differing += int((score[-len(decoded) :] != decoded).sum())
    found = [(a.input_ids + o.output_ids, o.output_log_probs) for a, o in pairs]
    return Found(found, differing, len(modules))


@torch.no_grad()
def difference(model: transformers.PreTrainedModel, found: Found) -> float:
    """How far the log-probs are from those of transformers in float64."""
    largest = 0.0
    for tokens, log_probs in found.generated:
        ids = torch.tensor([tokens])
        expected = model.double()(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        largest = max(largest, (expected[-len(log_probs) :] - torch.tensor(log_probs).double()).abs().max().item())
    return largest
