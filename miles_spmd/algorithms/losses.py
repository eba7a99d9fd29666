"""Per-token losses, as pure functions of tensors: they reduce nothing over ranks; weights come from the controller.

The loss of a policy takes ``log_probs`` and ``entropy`` of softmax(logits / temperature), fp32 [T], where the entropy
has a gradient only if the configuration has an ``entropy_coef``; the loss of a model whose head returns one number per
token, a critic or a reward model, takes the head's ``values`` [T]. Both return the loss of each token, fp32 [T], and
sums over the trained tokens for the metrics, scalars.

The surrogates are the policy term of the loss. There r = pi_theta / pi_old of a token, and A is its advantage. log r is
clamped to +-20, so that fp32 stays finite. NaN is propagated: the trainer counts it and skips the step.

The losses of pairs compare a preferred response c and a rejected response r to the same prompt. Both sequences of a
pair are in one micro-batch. Every token gets its pair's loss, and the loss weights of a pair's tokens sum to
1 / (pairs of the step): aggregation ``rollout_mean`` with the pair as the rollout.

Shape suffix: T tokens of a packed micro-batch on this rank (only those that the trainer scores).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from miles_spmd.algorithms.kl import MAX_LOG_RATIO, kl_estimate
from miles_spmd.config import AlgorithmConfig
from miles_spmd.plugins.algorithm import Surrogate
from miles_spmd.plugins.plug_point import PlugPoint
from miles_spmd.types.token_batch import SegmentSum, TokenBatch

Sums = dict[str, Tensor]
Loss = Callable[..., tuple[Tensor, Sums]]  # (log_probs, entropy, tokens) or (values, tokens)


# --- policies --------------------------------------------------------------------------------------------------------


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
    ratio = log_ratio(log_probs, tokens).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    weight = ratio.clamp(*clip_range(algorithm))
    return -weight * tokens.required("advantages") * log_probs, weight != ratio


SURROGATES: PlugPoint[Surrogate] = PlugPoint(
    "algorithm.loss_type", {"ppo": ppo, "gspo": gspo, "cispo": cispo}, Surrogate
)


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


class PolicyLoss:
    """Computes policy_weights x surrogate - entropy_coef x entropy + kl_loss_coef x KL(policy || reference).

    ``loss_type`` names the surrogate. Off-policy sequence masking and ``policy_weights`` apply to the surrogate only.
    """

    def __init__(self, algorithm: AlgorithmConfig) -> None:
        self.algorithm = algorithm
        self.surrogate = SURROGATES.resolve(algorithm.surrogate)

    def _policy_term(self, log_probs: Tensor, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
        returned = self.surrogate(log_probs, tokens, self.algorithm)
        if not (isinstance(returned, tuple) and len(returned) == 2 and all(isinstance(t, Tensor) for t in returned)):
            expected = "a tuple of two tensors: the loss of each token, and whether it was clipped"
            raise SURROGATES.returned(self.algorithm.surrogate, returned, expected)
        return returned

    def __call__(self, log_probs: Tensor, entropy: Tensor, tokens: TokenBatch) -> tuple[Tensor, Sums]:
        a = self.algorithm
        trained = tokens.trained
        sums = {"tokens": trained.sum()}
        policy, clipped = self._policy_term(log_probs, tokens)
        if policy.shape != log_probs.shape:
            raise ValueError(
                f"loss_type {a.surrogate!r} returned shape {list(policy.shape)}, not {list(log_probs.shape)}"
            )
        if tokens.policy_weights is not None:
            policy = tokens.policy_weights * policy
        if a.use_opsm:
            dropped = off_policy_sequences(log_probs, tokens, a.opsm_delta)
            policy = torch.where(dropped, 0.0, policy)
            sums["opsm_masked"] = (dropped & trained).sum()
        loss = policy - a.entropy_coef * entropy
        log_r = log_ratio(log_probs, tokens)
        sums |= {
            "pg_loss": _sum(tokens, tokens.loss_weights * policy),
            "pg_clipfrac": (clipped & trained).sum(),
            "ppo_kl": _sum(tokens, -log_r),
            "entropy": _sum(tokens, entropy),
        }
        if tokens.ref_log_probs is not None:
            ratio = log_r.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() if a.use_unbiased_kl else None
            kl = kl_estimate(log_probs, tokens.ref_log_probs, a.kl_loss_type, ratio)
            loss = loss + a.kl_loss_coef * kl
            sums["kl"] = _sum(tokens, kl)
        return loss, sums


class SupervisedLoss:
    """Computes the negative log-likelihood of each token."""

    def __call__(self, log_probs: Tensor, entropy: Tensor, tokens: TokenBatch) -> tuple[Tensor, Sums]:
        return -log_probs, {"tokens": tokens.trained.sum(), "entropy": _sum(tokens, entropy)}


@dataclass(frozen=True)
class ValueLoss:
    """Computes the critic's max((V - G)^2, (clip(V, V_old +- value_clip) - G)^2), where G are the ``returns``.

    Source: the reference code of PPO (openai/baselines, ppo2), but as in slime and Miles without its factor 1/2.
    """

    algorithm: AlgorithmConfig

    def __call__(self, values: Tensor, tokens: TokenBatch) -> tuple[Tensor, Sums]:
        returns, old, clip = tokens.required("returns"), tokens.required("old_values"), self.algorithm.value_clip
        unclipped = (values - returns) ** 2
        clipped = (old + (values - old).clamp(-clip, clip) - returns) ** 2
        loss = torch.maximum(unclipped, clipped)
        return loss, {
            "tokens": tokens.trained.sum(),
            "value_loss": _sum(tokens, tokens.loss_weights * loss),
            "value_clipfrac": ((clipped > unclipped) & tokens.trained).sum(),
        }


# --- pairs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferenceLoss:
    """Computes the loss named by ``preference_loss``; beta = ``dpo_beta``, sums are over the trained tokens of c and r:

    - ``dpo``: -log sigmoid(beta h), h = sum_c log(pi / pi_ref) - sum_r log(pi / pi_ref) (arXiv 2305.18290, eq. 7)
    - ``ipo``: (h - 1 / (2 beta))^2 (arXiv 2310.12036, eq. 17), with sums as there; TRL takes means
    - ``simpo``: -log sigmoid(beta h - ``simpo_gamma``), h = mean_c log pi - mean_r log pi (arXiv 2405.14734, eq. 6)
    """

    algorithm: AlgorithmConfig

    def __call__(self, log_probs: Tensor, entropy: Tensor, tokens: TokenBatch) -> tuple[Tensor, Sums]:
        a = self.algorithm
        if a.preference_loss == "simpo":
            sequence_sum: SegmentSum = tokens.required("sequence_sum")
            score = log_probs / sequence_sum(tokens.trained.to(log_probs.dtype)).clamp(min=1)
        else:
            score = log_probs - tokens.required("ref_log_probs")
        h, chosen, rejected = _margin(score, tokens)
        if a.preference_loss == "ipo":
            loss = (h - 1 / (2 * a.dpo_beta)) ** 2
        else:
            loss = -logsigmoid(a.dpo_beta * h - (a.simpo_gamma if a.preference_loss == "simpo" else 0.0))
        sums = _sums(loss, a.dpo_beta * h, a.dpo_beta * chosen, a.dpo_beta * rejected, tokens)
        return loss, {**sums, "entropy": _sum(tokens, entropy)}


class RewardModelLoss:
    """Computes the Bradley-Terry loss, -log sigmoid(score_c - score_r), where the score of a sequence is the head's
    output on its last token, the only one that is trained. Source: InstructGPT (arXiv 2203.02155) eq. 1."""

    def __call__(self, values: Tensor, tokens: TokenBatch) -> tuple[Tensor, Sums]:
        h, chosen, rejected = _margin(values, tokens)
        loss = -logsigmoid(h)
        return loss, _sums(loss, h, chosen, rejected, tokens)


def _margin(score: Tensor, tokens: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return score(c) - score(r), score(c) and score(r) of each token's pair, [T] each."""
    pair_sum: SegmentSum = tokens.required("pair_sum")
    preferred = tokens.required("pair_signs") > 0
    chosen = pair_sum(torch.where(tokens.trained & preferred, score, 0.0))
    rejected = pair_sum(torch.where(tokens.trained & ~preferred, score, 0.0))
    return chosen - rejected, chosen, rejected


def _sums(loss: Tensor, margin: Tensor, chosen: Tensor, rejected: Tensor, tokens: TokenBatch) -> Sums:
    """Return sums weighted by the loss weights: their sum over all ranks is the mean over the step's pairs."""
    per_pair = {
        "preference_loss": loss,
        "reward_accuracy": (margin > 0).to(loss.dtype),
        "reward_margin": margin,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }
    weighted = {name: _sum(tokens, tokens.loss_weights * values) for name, values in per_pair.items()}
    return {"tokens": tokens.trained.sum(), **weighted}


def make_loss(mode: str, algorithm: AlgorithmConfig) -> Loss:
    """Return the loss of a run's ``mode``: "rl", "sft", "dpo" or "rm". Raises ValueError for another."""
    match mode:
        case "rl":
            return PolicyLoss(algorithm)
        case "sft":
            return SupervisedLoss()
        case "dpo":
            return PreferenceLoss(algorithm)
        case "rm":
            return RewardModelLoss()
    raise ValueError(f"no loss for mode {mode!r}; known: rl, sft, dpo, rm")


def _sum(tokens: TokenBatch, values: Tensor) -> Tensor:
    """Return the sum of ``values`` [T] over the trained tokens, without a gradient."""
    return torch.where(tokens.trained, values, 0.0).sum().detach()
