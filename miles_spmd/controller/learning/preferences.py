"""Evaluation on pairs of a preferred and a rejected response."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from miles_spmd.config import Config
from miles_spmd.controller.learning.batch import pair_sequences
from miles_spmd.controller.learning.models import Models
from miles_spmd.data.examples import PreferencePair
from miles_spmd.types.role import Role


def preference_metrics(
    step: int, name: str, pairs: Sequence[PreferencePair], models: Models, config: Config
) -> dict[str, float]:
    """Return the metrics of one evaluation set: ``eval/<name>`` is the share of pairs whose preferred response has the
    higher score (equal scores count half), ``eval/<name>-margin`` the mean difference.

    The score is the reward model's, or what ``preference_loss`` compares, without its beta.
    """
    sequences = pair_sequences(pairs)
    masks = [sequence.loss_weights for sequence in sequences]
    if config.run.mode == "rm":
        scores = models.values(step, sequences, Role.ACTOR)
    else:
        scores = models.log_probs(step, sequences, Role.ACTOR)
    if config.has_reference:
        reference = models.log_probs(step, sequences, Role.REF)
        scores = [own - ref for own, ref in zip(scores, reference, strict=True)]
    simpo = config.run.mode == "dpo" and config.algorithm.preference_loss == "simpo"
    # SimPO compares means over tokens, the other losses sums
    totals = np.asarray([(s * m).sum() / (m.sum() if simpo else 1) for s, m in zip(scores, masks, strict=True)])
    margins = totals[::2] - totals[1::2]
    right = (margins > 0) + 0.5 * (margins == 0)
    return {f"eval/{name}": float(right.mean()), f"eval/{name}-margin": float(margins.mean())}
