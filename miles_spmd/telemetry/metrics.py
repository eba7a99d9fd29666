"""Every metric by name, with its unit and its meaning. Names are those that slime and Miles write."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from miles_spmd.types.engine_group import SECOND_POLICY


@dataclass(frozen=True)
class Metric:
    unit: str  # "" for a plain number
    meaning: str


METRICS: dict[str, Metric] = {
    "rollout/raw_reward": Metric("", "Mean reward of the samples, before normalisation and shaping"),
    "rollout/reward_std": Metric("", "Standard deviation of the rewards of a prompt's samples, mean over prompts"),
    "rollout/response_len": Metric("tokens", "Mean length of the responses"),
    "rollout/response_len_max": Metric("tokens", "Length of the longest response"),
    "rollout/truncated_ratio": Metric("fraction", "Samples that ended at the length limit"),
    "rollout/zero_std_ratio": Metric("fraction", "Prompt groups whose samples all got the same reward: no gradient"),
    "rollout/prefix_hit_rate": Metric(
        "fraction", "Tokens of the requests' prompts, earlier turns included, that the engine did not have to prefill"
    ),
    "rollout/sessions_max": Metric("", "Largest number of sessions, episodes of several turns, that ran at a time"),
    "rollout/from_disk": Metric(
        "responses", "Responses of an attempt that was killed, which `rollout.durable` has kept"
    ),
    "rollout/dropped_groups": Metric("groups", "Prompt groups that dynamic sampling dropped and replaced"),
    "rollout/zero_std_groups": Metric("groups", "Prompt groups whose samples all got the same reward"),
    "rollout/fully_masked_samples": Metric("samples", "Samples without a trained token"),
    "rollout/tis": Metric("", "Mean ratio of the trainer's probability of a token to the engine's"),
    "rollout/tis_abs": Metric("", "Mean |ratio - 1| of the trainer's probability of a token to the engine's"),
    "rollout/tis_clipfrac": Metric("fraction", "Tokens whose importance ratio was outside its bounds"),
    "rollout/tis_rejected": Metric("fraction", "Tokens that the importance-sampling correction leaves out"),
    "rollout/tis_weight": Metric("", "Mean importance weight of a token, as applied"),
    "rollout/tis_normalizer": Metric("", "Divisor that gives the importance weights mean 1"),
    "rollout/rs_masked": Metric("fraction", "Tokens outside the bounds of rejection sampling"),
    "rollout/rs_vetoed": Metric("fraction", "Samples dropped for a token that is too improbable to the trainer"),
    "rollout/value_explained_variance": Metric("fraction", "Variance of the returns that the critic explains"),
    "rollout/opd_reverse_kl": Metric("nats", "Estimated KL(student || teacher), mean over trained tokens"),
    "rollout/extreme_ratios": Metric("tokens", "Tokens whose importance ratio was clamped: log-probs 20 nats apart"),
    "train/loss": Metric("", "Minimised loss, summed over all ranks with its global denominator"),
    "train/pg_loss": Metric("", "Policy-gradient part of the loss"),
    "train/pg_clipfrac": Metric("fraction", "Tokens whose policy ratio was clipped"),
    "train/ppo_kl": Metric("nats", "Mean of old minus new log-prob over the trained tokens"),
    "train/kl_loss": Metric("nats", "Estimated KL between policy and reference"),
    "train/entropy_loss": Metric("nats", "Mean entropy of the policy's next-token distribution"),
    "train/grad_norm": Metric("", "Global norm of the gradient before clipping"),
    "train/lr": Metric("", "Learning rate"),
    "train/opsm_masked": Metric("fraction", "Tokens of sequences that off-policy sequence masking dropped"),
    "train/value_clipfrac": Metric("fraction", "Tokens whose value was clipped in the critic's loss"),
    "train/critic_loss": Metric("", "Loss of the critic"),
    "train/critic_grad_norm": Metric("", "Global norm of the critic's gradient before clipping"),
    "train/critic_lr": Metric("", "Learning rate of the critic"),
    "train/critic_skipped_steps": Metric("steps", "Skipped optimizer steps of the critic: loss or gradient not finite"),
    "train/reward_accuracy": Metric("fraction", "Pairs of the batch whose chosen response has the higher score"),
    "train/reward_margin": Metric("", "Mean score of the chosen minus that of the rejected response"),
    "train/reward_chosen": Metric("", "Mean score of the chosen responses"),
    "train/reward_rejected": Metric("", "Mean score of the rejected responses"),
    "train/skipped_steps": Metric("steps", "Skipped optimizer steps: loss or gradient not finite"),
    "train/train_rollout_logprob_abs_diff": Metric(
        "nats", "Mean |trainer - engine| of the log-probs of the sampled tokens"
    ),
    "train/train_rollout_logprob_abs_diff_p999": Metric(
        "nats", "99.9th percentile of |trainer - engine| of the log-probs of the sampled tokens"
    ),
    "train/train_rollout_logprob_abs_diff_max": Metric(
        "nats", "Largest |trainer - engine| of the log-probs of the sampled tokens"
    ),
    "train/train_rollout_top1_flips": Metric(
        "fraction", "Positions whose top-1 token differs between engine and trainer"
    ),
    "train/train_rollout_kl": Metric("nats", "k3 estimate of KL(engine || trainer)"),
    "train/train_rollout_chi2_token": Metric("", "Chi-squared divergence of trainer and engine per token"),
    "train/train_rollout_chi2_seq": Metric("", "Chi-squared divergence of trainer and engine per response"),
    "train/train_rollout_ess": Metric("fraction", "Effective sample size with the weights trainer / engine"),
    "train/train_rollout_ppl_ratio": Metric("", "Perplexity of the responses: the trainer's divided by the engine's"),
    "train/extreme_ratios": Metric(
        "tokens", "Tokens whose log-probs of trainer and engine are more than 20 nats apart"
    ),
    "parity/tokens": Metric("tokens", "Trained tokens whose log-probs of trainer and engine were compared"),
    "parity/mismatches": Metric("tokens", "Compared tokens whose two log-probs are not bitwise equal"),
    "parity/max_abs_diff": Metric("nats", "Largest difference of the two log-probs of a compared token"),
    "start/total": Metric("s", "From the start of the controller until every rank is built"),
    "start/join": Metric("s", "The slowest rank's part of the start: import of torch, meeting the other ranks"),
    "start/kernel_cache": Metric("s", "The slowest rank's part of the start: unpacking kernels that were kept"),
    "start/imports": Metric("s", "The slowest rank's part of the start: import of Megatron and SGLang"),
    "start/trainer": Metric("s", "The slowest rank's part of the start: building the models and loading their weights"),
    "start/engine": Metric("s", "The slowest rank's part of the start: building the engine"),
    "start/refit_plan": Metric("s", "The slowest rank's part of the start: planning how weights are copied"),
    "perf/start_time": Metric("s", "Waiting for the workers to build trainer and engine"),
    "perf/rollout_time": Metric("s", "Generation, and the rewards that are computed meanwhile"),
    "perf/log_probs_time": Metric("s", "Log-probs and values of the samples, computed before the update"),
    "perf/train_time": Metric("s", "Forward, backward and optimizer"),
    "perf/refit_time": Metric("s", "Copying the trainer's weights into the engine"),
    "perf/eval_time": Metric("s", "Evaluation"),
    "perf/save_time": Metric(
        "s", "Beginning a checkpoint: training waits, also for an earlier save; what is copied is copied meanwhile"
    ),
    "perf/save_write_time": Metric("s", "Writing the checkpoint that was completed, beside the training"),
    "perf/ledger_time": Metric("s", "The controller's part of the ledger; the ranks' digests are in the other phases"),
    "perf/step_time": Metric("s", "The whole step"),
    "perf/cells": Metric("", "Cells that take part at the step's end, where ranks are divided into several"),
    "perf/rollout_slowest": Metric("", "Time of an engine step on the slowest engine, relative to its peers"),
    "perf/log_probs_slowest": Metric("", "Own time per token of the slowest model replica, relative to its peers"),
    "perf/train_slowest": Metric("", "Own time per token of the slowest model replica, relative to its peers"),
    "perf/tokens_per_gpu_per_second": Metric("tokens/s", "Prompt and response tokens of the step per rank and second"),
    "train/tokens": Metric("tokens", "Prompt and response tokens that went through the trainer"),
    "memory/start": Metric("GiB", "Peak memory of a rank while models and engines are built"),
    "memory/rollout": Metric("GiB", "Peak memory of a rank during generation"),
    "memory/judge_start": Metric("GiB", "Peak memory of a rank of the judge while its engine is built"),
    "memory/judge_rollout": Metric("GiB", "Peak memory of a rank of the judge while it scores responses"),
    "memory/judge_rollout_retries": Metric("", "Times that the judge ran out of memory and began again"),
    "memory/log_probs": Metric("GiB", "Peak memory of a rank while log-probs and values are computed"),
    "memory/train": Metric("GiB", "Peak memory of a rank in an optimizer step"),
    "memory/refit": Metric("GiB", "Peak memory of a rank while weights are copied into the engine"),
    "memory/checkpoint": Metric("GiB", "Peak memory of a rank while a checkpoint is written or read"),
    "memory/activations": Metric("GiB", "Peak memory of activations and other tensors of an optimizer step, on a GPU"),
    "memory/rollout_retries": Metric("", "Rollouts that ran out of memory and began again with fewer requests"),
    "memory/kept_gradients": Metric("GiB", "Host memory of a rank for gradients that cells exchange in an update"),
    "memory/save_buffers": Metric("GiB", "Host memory of a rank that is kept for copies of what a checkpoint saves"),
    "checkpoint/bytes": Metric("bytes", "Size of the checkpoint that was completed"),
    "health/temperature": Metric("degrees C", "Temperature of the hottest GPU"),
    "health/throttled": Metric("GPUs", "GPUs whose clocks are lowered because of heat or a hardware slowdown"),
    "health/ecc_corrected": Metric("errors", "Corrected memory errors of all GPUs since the start of the run"),
    "health/ecc_uncorrected": Metric("errors", "Uncorrected memory errors of all GPUs since the start of the run"),
    "health/xids": Metric("errors", "Errors of GPUs that the driver reported (Xid) in the step"),
    "refit/bytes": Metric("bytes", "Copied from trainer to engine, over all ranks"),
    "refit/checksum_mismatches": Metric("buckets", "Refit buckets whose checksums differed; must be 0"),
}
PHASES = ("start", "rollout", "log_probs", "train", "refit", "eval", "save", "ledger")  # in the order of a step


def describe(name: str) -> Metric:
    """Return unit and meaning of the metric ``name``, an empty description for those of plug-ins."""
    if name.startswith(f"{SECOND_POLICY}/"):
        first = describe(name.removeprefix(f"{SECOND_POLICY}/"))
        return Metric(first.unit, f"{first.meaning}; of the second policy" if first.meaning else "")
    if name in METRICS:
        return METRICS[name]
    if found := re.fullmatch(r"(?:rollout/|eval/(?P<set>.+)-)reward/(?P<detail>.+)/(?P<kind>mean|std)", name):
        kind = {"mean": "Mean", "std": "Standard deviation"}[found["kind"]]
        return Metric(
            "",
            f"{kind} of {found['detail']}, which a reward function returned"
            + (f" on {found['set']}" if found["set"] else ""),
        )
    if found := re.fullmatch(r"(?:rollout/|eval/(?P<set>.+)-)(?:env/(?P<detail>.+)|turns)", name):
        what = f"{found['detail']}, which the environment counted" if found["detail"] else "responses in a trajectory"
        return Metric("", f"Mean number of {what}" + (f" on {found['set']}" if found["set"] else ""))
    if found := re.fullmatch(r"(?:rollout/|eval/(?P<set>.+)-)role/(?P<role>.+)/(?P<what>reward|response_len)", name):
        unit, what = {"reward": ("", "Mean reward"), "response_len": ("tokens", "Mean length of the trajectories")}[
            found["what"]
        ]
        return Metric(unit, f"{what} of the role {found['role']}" + (f" on {found['set']}" if found["set"] else ""))
    if found := re.fullmatch(r"rollout/baseline/(?P<player>.+)", name):
        return Metric("", f"Moving average of the rewards of {found['player']}, game and role, after the rollout")
    if found := re.fullmatch(r"(?:rollout/|eval/(?P<set>.+)-)turn_reward/(?P<turn>\d+)", name):
        where = f" on {found['set']}" if found["set"] else ""
        return Metric("", f"Mean reward of turn {found['turn']} of the trajectories that have one for it{where}")
    if found := re.fullmatch(r"(?:rollout/|eval/(?P<set>.+)-)failed/(?P<kind>.+)", name):
        where = f" on {found['set']}" if found["set"] else ""
        return Metric("episodes", f"Episodes whose environment failed{where}: {found['kind']}")
    if not name.startswith("eval/"):
        return Metric("", "")
    dataset, _, detail = name.removeprefix("eval/").rpartition("-")
    if detail == "response_len" and dataset:
        return Metric("tokens", f"Mean length of the responses on {dataset}")
    if detail == "margin" and dataset:
        return Metric("", f"Mean score of the chosen minus that of the rejected response on {dataset}")
    if detail.startswith("pass@") and dataset:
        return Metric("fraction", f"Prompts of {dataset} solved by one of {detail.removeprefix('pass@')} responses")
    return Metric("", f"Mean score (pass@1) on {name.removeprefix('eval/')}")


def is_score(name: str) -> bool:
    """Return whether ``name`` is the plain score of an evaluation set."""
    return name.startswith("eval/") and describe(name).meaning.startswith("Mean score (pass@1)")


def is_fraction(scores: Iterable[float]) -> bool:
    """Return whether all these scores can be shares of correct responses. Others, such as a mean length, are shown as
    they are."""
    return all(0 <= score <= 1 for score in scores)


def phase_times(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of each phase that the step had, in the order of :data:`PHASES`."""
    return {phase: metrics[f"perf/{phase}_time"] for phase in PHASES if f"perf/{phase}_time" in metrics}
