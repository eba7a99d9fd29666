"""Random packed micro-batches in float64, and the losses on them as plain loops written from the formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from miles_spmd.config import AlgorithmConfig
from miles_spmd.types.token_batch import TokenBatch
from tests.algorithms.dual import Dual, larger, log_softmax, smaller, total, variables

VOCABULARY = 4


@dataclass
class Case:
    """M tokens of several sequences, packed. Sequences 2i and 2i + 1 are a pair."""

    sequence: np.ndarray  # int [M]
    logits: np.ndarray  # [M, V]
    targets: np.ndarray  # int [M]
    weights: np.ndarray  # [M], 0: not trained
    old: np.ndarray
    ref: np.ndarray
    advantages: np.ndarray
    policy_weights: np.ndarray

    def of_sequence(self, i: int) -> list[int]:
        """The trained tokens of the sequence that token i belongs to."""
        return [j for j in range(len(self.sequence)) if self.sequence[j] == self.sequence[i] and self.weights[j]]

    def tokens(self, **more: object) -> TokenBatch:
        """All that any loss may need."""
        t = torch.from_numpy
        return TokenBatch(
            loss_weights=t(self.weights),
            advantages=t(self.advantages),
            old_log_probs=t(self.old),
            ref_log_probs=t(self.ref),
            policy_weights=t(self.policy_weights),
            pair_signs=t(1.0 - 2.0 * (self.sequence % 2)),
            sequence_sum=segment_sum(t(self.sequence)),
            pair_sum=segment_sum(t(self.sequence // 2)),
        )

    def torch_log_probs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (a leaf), log-probs of the targets and entropy."""
        logits = torch.from_numpy(self.logits).requires_grad_()
        everything = logits.log_softmax(-1)
        log_probs = everything.gather(1, torch.from_numpy(self.targets)[:, None]).squeeze(1)
        return logits, log_probs, -(everything.exp() * everything).sum(-1)

    def plain_log_probs(self) -> tuple[list[Dual], list[Dual]]:
        """The same in loops, with slopes for every logit."""
        flat = variables(self.logits.reshape(-1).tolist())
        rows = [log_softmax(flat[i * VOCABULARY : (i + 1) * VOCABULARY]) for i in range(len(self.sequence))]
        entropy = [-total([lp.exp() * lp for lp in row]) for row in rows]
        return [row[target] for row, target in zip(rows, self.targets)], entropy


@st.composite
def cases(draw: st.DrawFn, *, pairs: bool = False) -> Case:
    """Shapes and masks by hypothesis, values by a generator: exact ties at the losses' kinks do not happen."""
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    if pairs:
        lengths = lengths[:2] + lengths[:2]
    trained = np.asarray(draw(st.lists(st.sampled_from([1, 1, 1, 0]), min_size=sum(lengths), max_size=sum(lengths))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = sum(lengths)
    logits, targets = rng.normal(size=(n, VOCABULARY)) * 2, rng.integers(VOCABULARY, size=n)
    now = logits[np.arange(n), targets] - np.log(np.exp(logits).sum(1))
    order = rng.permutation(n)  # the tokens of a sequence need not stand together
    far = rng.random((2, n)) < 0.15  # ratios far beyond any clip, and a reference as far as float64 can tell k3's slope
    step = rng.normal(size=(2, n)) * np.where(far, [[30.0], [5.0]], draw(st.sampled_from([0.02, 0.5])))
    return Case(
        sequence=np.repeat(np.arange(len(lengths)), lengths)[order],
        logits=logits,
        targets=targets,
        weights=trained * rng.uniform(0.1, 1, n),
        old=now + step[0],
        ref=now + step[1],
        advantages=rng.normal(size=n),
        policy_weights=rng.uniform(0, 2, n) * (rng.random(n) < 0.8),
    )


def segment_sum(ids: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    def sums(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(int(ids.max()) + 1, dtype=values.dtype).index_add(0, ids, values)[ids]

    return sums


def compare(loss: torch.Tensor, wanted: list[Dual], case: Case, leaf: torch.Tensor) -> None:
    """Value of every trained token's loss, and gradient of the weighted sum to ``leaf``, within 1e-6 relative."""
    trained = case.weights != 0
    np.testing.assert_allclose(
        loss.detach().numpy()[trained], np.asarray([w.value for w in wanted])[trained], rtol=1e-6, atol=1e-12
    )
    weighted = (torch.from_numpy(case.weights) * loss).sum()
    (gradient,) = torch.autograd.grad(weighted, leaf, retain_graph=True)
    slopes = total([w * weight for w, weight in zip(wanted, case.weights.tolist())]).slopes or (0.0,) * leaf.numel()
    slopes_array = np.asarray(slopes).reshape(gradient.shape)
    np.testing.assert_allclose(gradient, slopes_array, rtol=1e-6, atol=1e-9 * max(1.0, np.abs(slopes_array).max()))


# --- the formulas ----------------------------------------------------------------------------------------------------


def kl(x: Dual, y: float, kind: str, ratio: Dual | None = None) -> Dual:
    r = x - y
    if kind == "low_var_kl":
        r = r.clamp(-20, 20)
    estimate = {"k1": r, "k2": r * r * 0.5}.get(kind) or (-r).exp() - 1.0 + r
    if ratio is not None:
        estimate = ratio * estimate
    return estimate.clamp(-10, 10) if kind == "low_var_kl" else estimate


def clipped(ratio: Dual, a: AlgorithmConfig, advantage: float) -> Dual:
    high = a.eps_clip if a.eps_clip_high is None else a.eps_clip_high
    loss = larger(-ratio * advantage, -ratio.clamp(1 - a.eps_clip, 1 + high) * advantage)
    if a.eps_clip_c is not None and advantage < 0:
        loss = smaller(loss, Dual(-a.eps_clip_c * advantage))
    return loss


def mean_log_ratio(case: Case, new: list[Dual], i: int) -> Dual:
    members = case.of_sequence(i)
    return total([new[j] - case.old[j] for j in members]) * (1 / max(len(members), 1))


def policy_loss(a: AlgorithmConfig, case: Case, new: list[Dual], entropy: list[Dual]) -> list[Dual]:
    out = []
    for i, advantage in enumerate(case.advantages.tolist()):
        ratio = (new[i] - case.old[i]).clamp(-20, 20).exp()
        if a.surrogate == "gspo":
            # the value of the sequence's ratio, with the slope of the token's own
            own = new[i] - new[i].value + mean_log_ratio(case, new, i).value
            policy = clipped(own.clamp(-20, 20).exp(), a, advantage)
        elif a.surrogate == "cispo":
            high = a.eps_clip if a.eps_clip_high is None else a.eps_clip_high
            policy = -new[i] * (ratio.clamp(1 - a.eps_clip, 1 + high).value * advantage)
        else:
            policy = clipped(ratio, a, advantage)
        policy = policy * case.policy_weights[i]
        if a.use_opsm and advantage < 0 and -mean_log_ratio(case, new, i).value > a.opsm_delta:
            policy = Dual(0.0)
        penalty = kl(new[i], case.ref[i], a.kl_loss_type, ratio if a.use_unbiased_kl else None)
        out.append(policy - entropy[i] * a.entropy_coef + penalty * a.kl_loss_coef)
    return out


def value_loss(clip: float, values: list[Dual], old: np.ndarray, returns: np.ndarray) -> list[Dual]:
    out = []
    for v, o, g in zip(values, old.tolist(), returns.tolist()):
        near = (v - o).clamp(-clip, clip) + (o - g)
        out.append(larger((v - g) * (v - g), near * near))
    return out


def preference_loss(a: AlgorithmConfig, case: Case, new: list[Dual]) -> list[Dual]:
    out = []
    for i in range(len(new)):
        scores = []
        for side in (0, 1):
            members = [
                j for j in range(len(new)) if case.weights[j] and case.sequence[j] == 2 * (case.sequence[i] // 2) + side
            ]
            if a.preference_loss == "simpo":
                scores.append(total([new[j] for j in members]) * (1 / max(len(members), 1)))
            else:
                scores.append(total([new[j] - case.ref[j] for j in members]))
        h = scores[0] - scores[1]
        if a.preference_loss == "ipo":
            distance = h - 1 / (2 * a.dpo_beta)
            out.append(distance * distance)
        else:
            out.append(softplus(-(h * a.dpo_beta - (a.simpo_gamma if a.preference_loss == "simpo" else 0.0))))
    return out


def softplus(x: Dual) -> Dual:
    """-log sigmoid(-x), without overflow."""
    if x.value > 0:
        return x + ((-x).exp() + 1.0).log()
    return (x.exp() + 1.0).log()
