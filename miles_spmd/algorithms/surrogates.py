"""The policy term of the loss, per token.

Below r = pi_theta / pi_old of a token, and A is its advantage. log r is clamped to +-20, so that fp32 stays finite. NaN
is propagated: the trainer counts it and skips the step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miles_spmd.algorithms.kl import MAX_LOG_RATIO
from miles_spmd.config import AlgorithmConfig
from miles_spmd.plugins.algorithm import Surrogate
from miles_spmd.plugins.plug_point import PlugPoint
from miles_spmd.types.token_batch import TokenBatch


def ppo(log_probs: Tensor, tokens: TokenBatch, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Return max(-r A, -clip(r, 1 - eps_clip, 1 + eps_clip_high) A), bounded by -eps_clip_c A where A < 0.

    Sources: PPO (arXiv 1707.06347) eq. 7, DAPO's asymmetric clip (arXiv 2503.14476), dual clip (arXiv 1912.09729).
    """
    return _clipped(log_ratio(log_probs, tokens), tokens.required("advantages"), algorithm)


def gspo(log_probs: Tensor, tokens: TokenBatch, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Return PPO's term with the ratio sg(s) r / sg(r), where s = exp(mean of log r over the sequence's trained tokens)
    and sg stops the gradient: every token has the value of s, and the gradient of its own probability alone.

    So a token that is rejected gets no gradient, and advantages may differ from token to token. Where a sequence has
    one advantage and equal weights, the gradient is that of s itself. Source: GSPO-token (arXiv 2507.18071, section
    4.3); its clip range is 1000 times narrower than PPO's.
    """
    log_r = log_ratio(log_probs, tokens)
    log_s = tokens.sequence_mean(log_r.detach()) + (log_r - log_r.detach())
    return _clipped(log_s, tokens.required("advantages"), algorithm)


def cispo(log_probs: Tensor, tokens: TokenBatch, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Return -sg(clip(r, 1 - eps_clip, 1 + eps_clip_high)) A log pi_theta: a bounded gradient where PPO's is 0.

    Source: MiniMax-M1 (arXiv 2506.13585) eq. 4 and 5, which sets no lower bound (eps_clip = 1) and tunes the upper one.
    """
    low, high = clip_range(algorithm)
    ratio = log_ratio(log_probs, tokens).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    weight = ratio.clamp(low, high)
    return -weight * tokens.required("advantages") * log_probs, weight != ratio


SURROGATES: PlugPoint[Surrogate] = PlugPoint("algorithm.loss_type", {"ppo": ppo, "gspo": gspo, "cispo": cispo})


def off_policy_sequences(log_probs: Tensor, tokens: TokenBatch, delta: float) -> Tensor:
    """Return which tokens OPSM masks, bool [T]: A < 0, and the sequence's mean of log(pi_old / pi_theta) > ``delta``.

    Source: DeepSeek-V3.2 (arXiv 2512.02556), off-policy sequence masking. There pi_old is the engine's
    probability, as with ``use_rollout_logprobs`` here.
    """
    drift = tokens.sequence_mean(-log_ratio(log_probs, tokens).detach())
    return (tokens.required("advantages") < 0) & (drift > delta)


def log_ratio(log_probs: Tensor, tokens: TokenBatch) -> Tensor:
    """Return log(pi_theta / pi_old), [T]."""
    return log_probs - (log_probs.detach() if tokens.old_log_probs is None else tokens.old_log_probs)


def clip_range(algorithm: AlgorithmConfig) -> tuple[float, float]:
    """Return (1 - eps_clip, 1 + eps_clip_high)."""
    high = algorithm.eps_clip if algorithm.eps_clip_high is None else algorithm.eps_clip_high
    return 1 - algorithm.eps_clip, 1 + high


def _clipped(log_r: Tensor, advantages: Tensor, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    ratio = log_r.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(*clip_range(algorithm)) * advantages
    loss = torch.maximum(unclipped, clipped)
    if algorithm.eps_clip_c is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -algorithm.eps_clip_c * advantages), loss)
    return loss, clipped > unclipped
