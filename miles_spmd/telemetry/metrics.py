"""Every metric by name, with its unit and what it means. Names are those that slime and Miles write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    unit: str  # "" for a plain number
    meaning: str


METRICS: dict[str, Metric] = {
    "rollout/raw_reward": Metric("", "Mean reward of the samples, before anything is done to it"),
    "rollout/response_len": Metric("tokens", "Mean number of generated tokens"),
    "rollout/response_len_max": Metric("tokens", "Longest response"),
    "rollout/truncated_ratio": Metric("fraction", "Samples that ended at the length limit"),
    "rollout/zero_std_ratio": Metric("fraction", "Prompt groups whose samples all got the same reward: no gradient"),
    "rollout/dropped_groups": Metric("groups", "Prompt groups that dynamic sampling dropped and replaced"),
    "rollout/zero_std_groups": Metric("groups", "Prompt groups whose samples all got the same reward"),
    "rollout/fully_masked_samples": Metric("samples", "Samples without a trained token"),
    "rollout/tis": Metric("", "Mean ratio of the trainer's over the engine's probability of a token"),
    "rollout/tis_abs": Metric("", "Mean distance of that ratio from 1"),
    "rollout/tis_clipfrac": Metric("fraction", "Tokens whose ratio was bounded or dropped by its bounds"),
    "rollout/tis_rejected": Metric("fraction", "Tokens that the correction leaves out"),
    "rollout/tis_weight": Metric("", "Mean weight of a token, as applied"),
    "rollout/tis_normalizer": Metric("", "What the weights were divided by to have mean 1"),
    "rollout/rs_masked": Metric("fraction", "Tokens outside the bounds of the rejection"),
    "rollout/rs_vetoed": Metric(
        "fraction", "Samples with a token so unlikely to the trainer that all of it is dropped"
    ),
    "rollout/value_explained_variance": Metric("fraction", "Variance of the returns that the critic explains"),
    "rollout/opd_reverse_kl": Metric("nats", "Estimated KL(student || teacher), mean over trained tokens"),
    "rollout/extreme_ratios": Metric("tokens", "Tokens whose two log-probs differ by more than 20 nats"),
    "train/loss": Metric("", "Loss that was minimised, summed over all ranks with its global denominator"),
    "train/pg_loss": Metric("", "Policy-gradient part of the loss"),
    "train/pg_clipfrac": Metric("fraction", "Tokens on which the ratio was clipped"),
    "train/ppo_kl": Metric("nats", "Mean of old minus new log-prob over the trained tokens"),
    "train/kl_loss": Metric("nats", "KL estimate between policy and reference"),
    "train/entropy_loss": Metric("nats", "Mean entropy of the policy's next-token distribution"),
    "train/grad_norm": Metric("", "Global norm of the gradient before clipping"),
    "train/lr": Metric("", "Learning rate"),
    "train/opsm_masked": Metric("fraction", "Tokens of sequences that off-policy masking dropped"),
    "train/value_clipfrac": Metric("fraction", "Tokens whose value the critic's loss clipped"),
    "train/critic_loss": Metric("", "Loss of the critic"),
    "train/critic_grad_norm": Metric("", "Global norm of the critic's gradient before clipping"),
    "train/critic_lr": Metric("", "Learning rate of the critic"),
    "train/critic_skipped_steps": Metric("steps", "Left out steps of the critic"),
    "train/reward_accuracy": Metric("fraction", "Pairs of the batch whose preferred answer has the higher score"),
    "train/reward_margin": Metric("", "Mean difference of the two scores of a pair"),
    "train/reward_chosen": Metric("", "Mean score of the preferred answers"),
    "train/reward_rejected": Metric("", "Mean score of the rejected answers"),
    "train/skipped_steps": Metric("steps", "Optimizer steps left out because the loss or a gradient was not finite"),
    "train/train_rollout_logprob_abs_diff": Metric("nats", "Mean |trainer - engine| log-prob of the sampled tokens"),
    "train/train_rollout_logprob_abs_diff_p999": Metric("nats", "The same, 99.9th percentile"),
    "train/train_rollout_logprob_abs_diff_max": Metric("nats", "The same, largest"),
    "train/train_rollout_top1_flips": Metric("fraction", "Places in which another token is most likely to the trainer"),
    "train/train_rollout_kl": Metric("nats", "k3 estimate of KL(engine || trainer)"),
    "train/train_rollout_chi2_token": Metric("", "chi-squared distance of engine and trainer, per token"),
    "train/train_rollout_chi2_seq": Metric("", "The same, of whole answers"),
    "train/train_rollout_ess": Metric(
        "fraction", "Effective sample size under the trainer's over the engine's weights"
    ),
    "train/train_rollout_ppl_ratio": Metric("", "The trainer's perplexity of the answers over the engine's"),
    "train/extreme_ratios": Metric("tokens", "Tokens whose two log-probs differ by more than 20 nats"),
    "parity/tokens": Metric("tokens", "Trained tokens whose log-probs by trainer and engine were compared"),
    "parity/mismatches": Metric("tokens", "Those whose two log-probs are not the same bits"),
    "parity/max_abs_diff": Metric("nats", "Largest difference of the two; 0 where there is none"),
    "perf/start_time": Metric("s", "Waiting for the workers to build trainer and engine"),
    "perf/rollout_time": Metric("s", "Generating, and the rewards that are computed meanwhile"),
    "perf/log_probs_time": Metric("s", "What the models say of the samples before the update"),
    "perf/train_time": Metric("s", "Forward, backward and optimizer"),
    "perf/refit_time": Metric("s", "Copying the trainer's weights into the engine"),
    "perf/eval_time": Metric("s", "Evaluation"),
    "perf/save_time": Metric("s", "Writing the checkpoint"),
    "perf/ledger_time": Metric("s", "The controller's part of the ledger; the ranks' digests are in the other phases"),
    "perf/step_time": Metric("s", "The whole step"),
    "perf/tokens_per_gpu_per_second": Metric("tokens/s", "Prompt and response tokens of the step per rank and second"),
    "train/tokens": Metric("tokens", "Prompt and response tokens that went through the trainer"),
    "memory/start": Metric("GiB", "In use at most on a rank's device while models and engines are built"),
    "memory/rollout": Metric("GiB", "The same while generating; on a CPU, of the process"),
    "memory/log_probs": Metric("GiB", "The same while the models look at the samples"),
    "memory/train": Metric("GiB", "The same in an optimizer step"),
    "memory/refit": Metric("GiB", "The same while weights go into the engine"),
    "memory/checkpoint": Metric("GiB", "The same while a checkpoint is written or read"),
    "memory/activations": Metric("GiB", "At most for activations and other tensors of a step, on a GPU"),
    "memory/rollout_retries": Metric("", "How often a rollout ran out of memory and began again with fewer requests"),
    "refit/bytes": Metric("bytes", "Copied from trainer to engine, over all ranks"),
    "refit/checksum_mismatches": Metric("buckets", "Refit buckets whose checksums differed; must be 0"),
}
PHASES = ("start", "rollout", "log_probs", "train", "refit", "eval", "save", "ledger")  # in the order of a step


def describe(name: str) -> Metric:
    """The metric called ``name``. Unknown names, as of plug-ins, get an empty description."""
    if name in METRICS:
        return METRICS[name]
    if not name.startswith("eval/"):
        return Metric("", "")
    dataset, _, detail = name.removeprefix("eval/").rpartition("-")
    if detail == "response_len" and dataset:
        return Metric("tokens", f"Mean number of generated tokens on {dataset}")
    if detail == "margin" and dataset:
        return Metric("", f"Mean difference of the scores of the pairs of {dataset}")
    if detail.startswith("pass@") and dataset:
        return Metric("fraction", f"Prompts of {dataset} with a right answer among {detail.removeprefix('pass@')}")
    return Metric("fraction", f"Mean score (pass@1) on {name.removeprefix('eval/')}")


def is_score(name: str) -> bool:
    """Whether ``name`` is the plain score of an evaluation set."""
    return name.startswith("eval/") and describe(name).meaning.startswith("Mean score")


def phase_times(metrics: Mapping[str, float]) -> dict[str, float]:
    """Seconds by phase, of those that the step had."""
    named = {phase: metrics.get(f"perf/{phase}_time") for phase in PHASES}
    return {phase: seconds for phase, seconds in named.items() if seconds is not None}
