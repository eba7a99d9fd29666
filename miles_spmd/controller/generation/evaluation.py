"""Held-out sets: the same prompts, seeds and settings each time, so that evaluations differ by the weights only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from miles_spmd.config import Config
from miles_spmd.controller.journal.metrics import pass_at_k
from miles_spmd.controller.learning.batch import pair_sequences
from miles_spmd.controller.learning.models import Models
from miles_spmd.data.preferences import PreferencePair, load_preference_pairs
from miles_spmd.data.prompts import load_prompts
from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.types.request import SamplingParams
from miles_spmd.types.role import Role
from miles_spmd.types.sample import Prompt, Sample

CORRECT = 1.0  # a sample counts as solved from this reward on


def load_eval_sets(config: Config, tokenizer: Tokenizer, context: int) -> dict[str, list[Prompt]]:
    """Every configured set by name; ``context`` is the model's, in tokens. Raises DataError naming file and lines."""
    room = context - eval_sampling(config).max_new_tokens
    return {
        name: load_prompts(config.data, tokenizer, prompt_data=source, name=name, room=room)
        for name, source in config.eval.eval_prompt_data.items()
    }


def load_eval_pairs(config: Config, tokenizer: Tokenizer, max_len: int) -> dict[str, list[PreferencePair]]:
    """As :func:`load_eval_sets` for the modes that train on pairs; ``max_len`` of a sequence in tokens."""
    return {
        name: load_preference_pairs(
            config.data,
            tokenizer,
            prompt_data=source,
            name=name,
            max_len=max_len,
            scores_end=config.run.mode == "rm",
        )
        for name, source in config.eval.eval_prompt_data.items()
    }


def eval_sampling(config: Config) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=config.eval.eval_max_response_len or config.rollout.rollout_max_response_len,
        temperature=config.eval.eval_temperature,
        top_p=config.eval.eval_top_p,
        stop=config.rollout.rollout_stop,
        stop_token_ids=config.rollout.rollout_stop_token_ids,
    )


def preference_metrics(name: str, pairs: Sequence[PreferencePair], models: Models, config: Config) -> dict[str, float]:
    """``eval/<name>`` is the share of pairs whose preferred answer has the higher score (equal ones count half),
    ``-margin`` the mean difference. The score is the reward model's, or what ``preference_loss`` compares, without its
    beta."""
    sequences = pair_sequences(pairs)
    masks = [sequence.loss_weights for sequence in sequences]
    if config.run.mode == "rm":
        scores = models.values(0, sequences, Role.ACTOR)
    else:
        scores = models.log_probs(0, sequences, Role.ACTOR)
    if config.has_reference:
        reference = models.log_probs(0, sequences, Role.REF)
        scores = [own - ref for own, ref in zip(scores, reference, strict=True)]
    simpo = config.run.mode == "dpo" and config.algorithm.preference_loss == "simpo"
    totals = np.asarray([(s * m).sum() / (m.sum() if simpo else 1) for s, m in zip(scores, masks, strict=True)])
    margins = totals[::2] - totals[1::2]
    right = (margins > 0) + 0.5 * (margins == 0)
    return {f"eval/{name}": float(right.mean()), f"eval/{name}-margin": float(margins.mean())}


def eval_metrics(sets: Mapping[str, Sequence[Sequence[Sample]]]) -> dict[str, float]:
    """``eval/<name>`` is the mean reward (pass@1 for a 0/1 reward); with n > 1 samples also pass@k, k = 2, 4, ... n."""
    metrics: dict[str, float] = {}
    for name, groups in sets.items():
        rewards = [[sample.reward or 0.0 for sample in group] for group in groups]
        metrics[f"eval/{name}"] = float(np.mean(rewards))
        metrics[f"eval/{name}-response_len"] = float(np.mean([len(s.response) for group in groups for s in group]))
        n = len(groups[0])
        correct = [sum(reward >= CORRECT for reward in group) for group in rewards]
        for k in {2**i for i in range(1, n.bit_length())} | ({n} if n > 1 else set()):
            metrics[f"eval/{name}-pass@{k}"] = pass_at_k(correct, n, k)
    return metrics
