"""The metrics of a step, computed once, on the whole batch, from the results of all ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from miles_spmd.algorithms import corrections
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.journal import events
from miles_spmd.controller.journal.gpu_health import GpuHealthWatch
from miles_spmd.controller.journal.stragglers import StragglerWatch
from miles_spmd.plugins.plug_point import PlugPoint
from miles_spmd.plugins.run import Evaluator
from miles_spmd.protocol.messages import TrainerRank
from miles_spmd.protocol.results import TrainResult
from miles_spmd.telemetry.texts import slowest
from miles_spmd.types.sample import Sample, by_role, episodes, rollouts
from miles_spmd.types.train_sequence import TrainSequence
from miles_spmd.types.trajectory import FinishReason

EVALUATORS: PlugPoint[Evaluator] = PlugPoint("eval.evaluator", {}, Evaluator)
# Names of the losses' sums (miles_spmd/algorithms) -> the metrics that users of slime and Miles know. Of MEANS the sum
# is the metric, because the loss weights hold the denominator; of PER_TOKEN it is divided by the trained tokens.
MEANS = {
    "loss": "train/loss",
    "pg_loss": "train/pg_loss",
    "reward_accuracy": "train/reward_accuracy",
    "reward_margin": "train/reward_margin",
    "reward_chosen": "train/reward_chosen",
    "reward_rejected": "train/reward_rejected",
}
PER_TOKEN = {
    "entropy": "train/entropy_loss",
    "pg_clipfrac": "train/pg_clipfrac",
    "ppo_kl": "train/ppo_kl",
    "kl": "train/kl_loss",
    "opsm_masked": "train/opsm_masked",
    "value_clipfrac": "train/value_clipfrac",
}
OF_CRITIC = {  # the same metrics of the critic's updates
    "train/loss": "train/critic_loss",
    "train/grad_norm": "train/critic_grad_norm",
    "train/lr": "train/critic_lr",
    "train/skipped_steps": "train/critic_skipped_steps",
}
CORRECT = 1.0  # a sample of an evaluation counts as solved from this reward on


class Metrics:
    """Collects the metrics of a step from its events. ``run_dir``: for the file about slow ranks."""

    def __init__(self, cluster: Cluster, run_dir: Path) -> None:
        self._cluster = cluster
        self._stragglers, self._gpus = StragglerWatch(run_dir), GpuHealthWatch()
        self._started = time.monotonic()
        self._values: dict[str, float] = {}
        self._updates: list[Mapping[str, float]] = []

    def observe(self, event: events.Event) -> None:
        match event:
            case events.PhaseFinished(phase, seconds):
                self._increase(f"perf/{phase}_time", seconds)
            case events.RanksReady(seconds, by_rank):
                self._values["start/total"] = seconds
                self._values |= {f"start/{part}": value for part, value in by_rank[slowest(by_rank)].items()}
            case events.BatchStarted():
                self._increase("train/tokens", float(event.tokens))
            case events.UpdateFinished():
                self._updates.append(event.metrics)
            case events.RolloutFinished():
                self._values |= rollout_metrics(event.groups)
                self._values["rollout/dropped_groups"] = float(event.dropped)
                if event.prefix_hits is not None:
                    self._values["rollout/prefix_hit_rate"] = event.prefix_hits
                if event.sessions is not None:
                    self._values["rollout/sessions_max"] = float(event.sessions)
                if event.from_disk is not None:
                    self._values["rollout/from_disk"] = float(event.from_disk)
                self._values |= {f"rollout/failed/{kind}": float(count) for kind, count in event.failures.items()}
            case events.EngineRefitted():
                copied = float(sum(r.bytes_local + r.bytes_received for r in event.results))
                self._increase("refit/bytes", copied)
                self._increase("refit/checksum_mismatches", float(sum(r.checksum_mismatches for r in event.results)))
            case events.CheckpointCompleted(_, seconds, nbytes):
                self._values |= {"perf/save_write_time": seconds, "checkpoint/bytes": float(nbytes)}
            case events.Measured() | events.EvaluationFinished():
                self._values |= event.metrics

    def take(self, step: int) -> dict[str, float]:
        """Return the metrics of the events since the last call, those of updates averaged, with the time that has
        passed, and start over; ``step``: steps that are done."""
        metrics, updates = self._values, self._updates
        for name in {name for update in updates for name in update}:
            metrics[name] = float(np.mean([update[name] for update in updates if name in update]))
        now = time.monotonic()
        seconds = metrics["perf/step_time"] = now - self._started
        if "train/tokens" in metrics:
            rate = metrics["train/tokens"] / seconds / len(self._cluster.infos)
            metrics["perf/tokens_per_gpu_per_second"] = rate
        self._started, self._values, self._updates = now, {}, []
        metrics |= self._stragglers.add(step, self._cluster.take_own(), self._cluster.infos)
        metrics |= self._gpus.add(self._cluster.take_gpus()) | self._cluster.cells.metrics()
        return metrics | self._cluster.take_memory()

    def _increase(self, name: str, value: float) -> None:
        self._values[name] = self._values.get(name, 0.0) + value


def rollout_metrics(groups: events.Groups) -> dict[str, float]:
    """Return the metrics of a rollout's rewards, which are means over prompts and roles, and of its responses."""
    samples = [sample for group in groups for sample in group]
    if not samples:  # a filter has kept none
        return {}
    lengths = np.asarray([len(s.response) for s in samples])
    compared = [rollouts(of_role) for group in groups for of_role in by_role(group)]
    scored = [[s.reward for s in some if s.reward is not None] for some in compared]
    rewards = [np.asarray(some, np.float64) for some in scored if some]
    of_rewards = {
        "rollout/raw_reward": [r.mean() for r in rewards],
        "rollout/reward_std": [r.std() for r in rewards],
        "rollout/zero_std_ratio": [np.ptp(r) == 0 for r in rewards],
    }
    return (
        reward_metrics("rollout/", groups)
        | environment_metrics("rollout/", groups)
        | role_metrics("rollout/", groups)
        | {name: float(np.mean(values)) for name, values in of_rewards.items() if rewards}
        | {
            "rollout/response_len": float(lengths.mean()),
            "rollout/response_len_max": float(lengths.max()),
            "rollout/truncated_ratio": float(np.mean([s.finish_reason is FinishReason.LENGTH for s in samples])),
        }
    )


def reward_metrics(prefix: str, groups: events.Groups) -> dict[str, float]:
    """Return mean and standard deviation of each number that reward functions returned beside the reward, over the
    samples that have it: ``reward/NAME/mean`` and ``reward/NAME/std``."""
    values: dict[str, list[float]] = {}
    for sample in chain.from_iterable(map(rollouts, groups)):
        for name, value in sample.reward_detail.items():
            if math.isfinite(value):
                values.setdefault(name, []).append(value)
    metrics: dict[str, float] = {}
    for name, some in sorted(values.items()):
        metrics |= {
            f"{prefix}reward/{name}/mean": float(np.mean(some)),
            f"{prefix}reward/{name}/std": float(np.std(some)),
        }
    return metrics


def environment_metrics(prefix: str, groups: events.Groups) -> dict[str, float]:
    """Return the mean over episodes of each number that the environment counted, ``env/NAME``, and over trajectories of
    the turns where there are several."""
    samples = list(chain.from_iterable(map(rollouts, groups)))
    counted = [sample.trajectory.metrics for sample in chain.from_iterable(map(episodes, groups))]
    names = sorted({name for one in counted for name in one})
    metrics = {f"{prefix}env/{name}": float(np.mean([one.get(name, 0.0) for one in counted])) for name in names}
    turns = [sample.turns for group in groups for sample in group]
    if max(turns) > 1:
        metrics[f"{prefix}turns"] = float(np.mean(turns))
    return metrics | turn_reward_metrics(prefix, samples)


def role_metrics(prefix: str, groups: events.Groups) -> dict[str, float]:
    """Return the mean reward and the mean length of the trajectories of each role, where there are roles:
    ``role/NAME/reward`` and ``role/NAME/response_len``."""
    by_name: dict[str, list[Sample]] = {}
    for sample in chain.from_iterable(groups):
        by_name.setdefault(sample.role, []).append(sample)
    metrics: dict[str, float] = {}
    for role, samples in sorted(by_name.items()):
        if role:
            metrics[f"{prefix}role/{role}/reward"] = float(np.mean([s.reward or 0.0 for s in rollouts(samples)]))
            metrics[f"{prefix}role/{role}/response_len"] = float(np.mean([len(s.response) for s in samples]))
    return metrics


def turn_reward_metrics(prefix: str, samples: Sequence[Sample]) -> dict[str, float]:
    """Return the mean reward of each turn over the samples that have one for it: ``turn_reward/NUMBER``."""
    by_turn: dict[int, list[float]] = {}
    for sample in samples:
        for turn, reward in enumerate(sample.trajectory.turn_rewards):
            if reward is not None:
                by_turn.setdefault(turn, []).append(reward)
    return {f"{prefix}turn_reward/{turn}": float(np.mean(rewards)) for turn, rewards in sorted(by_turn.items())}


def eval_metrics(sets: Mapping[str, events.Groups]) -> dict[str, float]:
    """Return the metrics of each set: ``eval/<name>`` is the mean reward (pass@1 for a 0/1 reward), ``-response_len``
    the mean number of generated tokens, and with n > 1 samples ``-pass@k`` for k = 2, 4, ... n. A set of which nothing
    is left, because its environment has failed on every prompt, has none."""
    metrics: dict[str, float] = {}
    for name, groups in sets.items():
        if not groups:
            continue
        compared = [rollouts(of_role) for group in groups for of_role in by_role(group)]
        rewards = [[sample.reward or 0.0 for sample in some] for some in compared]
        metrics[f"eval/{name}"] = float(np.mean(list(chain(*rewards))))
        metrics |= reward_metrics(f"eval/{name}-", groups) | environment_metrics(f"eval/{name}-", groups)
        metrics |= role_metrics(f"eval/{name}-", groups)
        metrics[f"eval/{name}-response_len"] = float(np.mean([len(s.response) for group in groups for s in group]))
        n = max(map(len, rewards))
        correct = [(sum(reward >= CORRECT for reward in group), len(group)) for group in rewards]
        for k in {2**i for i in range(1, n.bit_length())} | ({n} if n > 1 else set()):
            metrics[f"eval/{name}-pass@{k}"] = pass_at_k(correct, k)
    return metrics


def users_eval_metrics(evaluator: str, sets: Mapping[str, events.Groups]) -> dict[str, float]:
    """Return the metrics of each set that the user's ``evaluator`` computes: ``eval/<name>-<key>``."""
    metrics: dict[str, float] = {}
    for name, groups in sets.items():
        if not groups:
            continue
        returned = EVALUATORS.resolve(evaluator)(name, groups)
        numbers = dict(returned) if isinstance(returned, Mapping) else {"": math.nan}
        for key, number in numbers.items():
            value = float(number) if isinstance(number, int | float | np.number) else math.nan
            if not (isinstance(key, str) and key and key.isprintable() and math.isfinite(value)):
                raise EVALUATORS.returned(evaluator, returned, "a dict with printable names and finite numbers")
            metrics[f"eval/{name}-{key}"] = value
    return metrics


def train_metrics(
    results: Sequence[TrainResult], trainers: Sequence[TrainerRank], critic: bool = False
) -> dict[str, float]:
    """Return the metrics of one optimizer step: sums over the reporting ranks, turned into means where they are not."""
    sums: dict[str, float] = {}
    reporting = [(rank, result) for rank, result in zip(trainers, results, strict=True) if rank.reports]
    # leaf by leaf: floating-point sums depend on the order, and this one is the same for every data-parallel size
    for _, result in sorted(reporting, key=lambda pair: pair[0].data_parallel_rank):
        for leaf in result.sums:
            for name, value in leaf.items():
                sums[name] = sums.get(name, 0.0) + value
    tokens = max(sums.get("tokens", 0.0), 1.0)
    metrics = {
        "train/grad_norm": results[0].grad_norm,
        "train/lr": results[0].lr,
        "train/skipped_steps": float(bool(results[0].skipped)),
    }
    metrics |= {MEANS[name]: value for name, value in sums.items() if name in MEANS}
    metrics |= {PER_TOKEN[name]: value / tokens for name, value in sums.items() if name in PER_TOKEN}
    return {OF_CRITIC.get(name, name): value for name, value in metrics.items()} if critic else metrics


def mismatch_metrics(sequences: Sequence[TrainSequence], train_log_probs: Sequence[np.ndarray]) -> dict[str, float]:
    """Compare engine and trainer on every trained token; see :func:`corrections.mismatch_metrics`.

    ``train_log_probs``, float32 [T] per sequence, come from the trainer's own forward pass with the weights that
    generated the samples. Returns nothing where no token is trained.
    """
    rollout = [s.rollout_log_probs for s in sequences if s.rollout_log_probs is not None]
    masks = [(s.loss_weights != 0).astype(np.float32) for s in sequences]
    found = corrections.mismatch_metrics(list(train_log_probs), rollout, masks)
    return {f"train/{name}": value for name, value in found.items()}


def pass_at_k(correct: Sequence[tuple[int, int]], k: int) -> float:
    """Return the unbiased pass@k from the successes c and the number n of samples of each prompt: the mean of
    1 - C(n - c, k) / C(n, k) over the prompts that have k samples or more, of which there must be one.

    Source: Chen et al., "Evaluating Large Language Models Trained on Code" (arXiv 2107.03374), eq. 1.
    """
    # where n - c < k one of the factors is 0; the product form avoids big binomials
    misses = [np.prod(1.0 - k / np.arange(n - c + 1, n + 1)) for c, n in correct if n >= k]
    return 1.0 - float(np.mean(misses))
