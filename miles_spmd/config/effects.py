"""Which settings have an effect on a run only where others have certain values; any other run names them."""

import functools
from collections.abc import Callable
from typing import Any

from miles_spmd.config.checks import WARNINGS, Messages, Settings, rule
from miles_spmd.config.environment import SINGLE_TURN
from miles_spmd.config.reward import scores_by
from miles_spmd.config.table import walk

PREFERENCES = "preference_loss dpo_beta simpo_gamma"  # of [algorithm], read in mode "dpo"
# of [rollout], read by evaluations of a run of mode "sft"
EVALUATION = "rollout_max_response_len rollout_stop rollout_stop_token_ids rollout_num_gpus engine offload_rollout"
MIS = (
    "tis_level tis_mode tis_upper_bound tis_lower_bound tis_batch_normalize use_rs rs_level rs_upper_bound "
    "rs_lower_bound rs_veto_threshold"
)
OF_JUDGE = ("url", "hf_checkpoint", "prompt", "scores", "reader", "arguments", "default")
JUDGE = " ".join(f"reward.judge_{name}" for name in OF_JUDGE)
OF_PROCESSES = ("kwargs", "workers", "concurrency", "cache_share", "timeout", "memory_gib", "variables", "retries")
ENVIRONMENT = " ".join(
    [
        *(f"environment.environment_{name}" for name in OF_PROCESSES),
        "environment.on_environment_failure environment.max_environment_failures",
    ]
)
# What has to hold -> whether it holds, and the settings that have no effect otherwise.
NEEDED: dict[str, tuple[Callable[[Settings], bool], str]] = {
    "algorithm.advantage_estimator = 'ppo'": (
        lambda s: s.advantage_estimator == "ppo" or ":" in s.advantage_estimator,
        "lambd value_clip train.critic_lr train.critic_lr_warmup_iters train.num_critic_only_steps",
    ),
    "algorithm.advantage_estimator = 'ppo' or 'reinforce_plus_plus'": (
        lambda s: s.advantage_estimator in ("ppo", "reinforce_plus_plus") or ":" in s.advantage_estimator,
        "gamma",
    ),
    "algorithm.opd_kl_coef above 0": (
        lambda s: s.opd_kl_coef > 0,
        "opd_log_prob_top_k opd_top_k_strategy opd_reward_weight_mode",
    ),
    "algorithm.overlong_buffer_len above 0": (lambda s: s.overlong_buffer_len > 0, "overlong_penalty_factor"),
    "algorithm.use_opsm = true": (lambda s: s.use_opsm, "opsm_delta"),
    "algorithm.kl_loss_coef above 0": (lambda s: s.kl_loss_coef > 0, "use_unbiased_kl"),
    "algorithm.kl_coef or algorithm.kl_loss_coef above 0": (
        lambda s: s.kl_coef > 0 or s.kl_loss_coef > 0,
        "kl_loss_type ref_update_interval",
    ),
    "algorithm.use_tis = true": (lambda s: s.use_tis, f"tis_function tis_clip tis_clip_low {MIS}"),
    "algorithm.tis_function = 'mis'": (
        lambda s: not s.use_tis or s.tis_function == "mis" or ":" in s.tis_function,
        MIS,
    ),
    "algorithm.tis_function = 'tis' or 'icepop'": (
        lambda s: not s.use_tis or s.tis_function != "mis",
        "tis_clip tis_clip_low",
    ),
    "train.reduction_leaves above 0": (lambda s: s.reduction_leaves > 0, "train.leaf_tokens"),
    "the reward 'remote'": (lambda s: scores_by(s, "remote"), "reward.remote_url reward.remote_key_variable"),
    "the reward 'judge'": (lambda s: scores_by(s, "judge"), JUDGE),
    "reward.judge_url": (lambda s: s.judge_url is not None, "reward.judge_key_variable reward.judge_model"),
    "reward.judge_hf_checkpoint": (lambda s: s.judge_hf_checkpoint is not None, "reward.judge_sglang"),
    "the reward 'remote', or reward.judge_url": (
        lambda s: scores_by(s, "remote") or s.judge_url is not None,
        "reward.service_requests",
    ),
    "an environment other than 'single_turn'": (lambda s: s.environment != SINGLE_TURN, ENVIRONMENT),
    "algorithm.dynamic_sampling_filter, or an environment that can fail": (
        lambda s: s.dynamic_sampling_filter is not None or s.environment != SINGLE_TURN,
        "too_few_groups",
    ),
    "algorithm.dynamic_sampling_filter, another rollout.acceptance, or rollout.partial_rollout": (
        lambda s: (
            s.dynamic_sampling_filter is not None
            or s.environment != SINGLE_TURN
            or s.acceptance != "submission_order"
            or s.partial_rollout
        ),
        "rollout.over_sampling_batch_size",
    ),
    "a function of your own in reward.rm_type": (lambda s: ":" in s.rm_type, "reward.reward_batched"),
}


@functools.cache
def _defaults() -> dict[str, Any]:
    from miles_spmd.config import Config

    return {s.dotted: s.field.default for s in walk(Config) if not s.field.is_required()}


def _is_set(s: Settings, path: str) -> bool:
    """Whether a setting differs from its default; a resolved configuration lists those that do not, too."""
    return path in s and s[path] != _defaults()[path]


@rule(WARNINGS)
def _settings_of_the_algorithm(s: Settings) -> Messages:
    if s.mode != "rl":
        return
    for what, (holds, names) in NEEDED.items():
        for name in names.split():
            path = name if "." in name else f"algorithm.{name}"
            if not holds(s) and _is_set(s, path):
                yield f"{path}: has no effect without {what}"
    for path in ("algorithm.preference_loss", "algorithm.dpo_beta", "algorithm.simpo_gamma"):
        if _is_set(s, path):
            yield f"{path}: has no effect in mode 'rl', only in mode 'dpo'"


@rule(WARNINGS)
def _settings_of_the_mode(s: Settings) -> Messages:
    if s.mode == "rl":
        return
    evaluates = s.mode == "sft" and s.eval_interval > 0
    read = {"algorithm": PREFERENCES if s.mode == "dpo" else "", "rollout": "rollout_batch_size"}
    read |= dict.fromkeys(("environment", "reward"), "")
    if evaluates:
        read["rollout"] += f" {EVALUATION}"
    for path in _defaults():
        table, _, name = path.partition(".")
        unread = name and table in read and name not in read[table].split()
        if unread and not (evaluates and table in ("environment", "reward")) and _is_set(s, path):
            yield f"{path}: has no effect in mode {s.mode!r}, only in mode 'rl'"


@rule(WARNINGS)
def _settings_of_data(s: Settings) -> Messages:
    if s.curriculum is not None and _is_set(s, "data.rollout_shuffle"):
        yield "data.rollout_shuffle: has no effect with data.curriculum, which gives each epoch its order"


@rule(WARNINGS)
def _settings_of_evaluations(s: Settings) -> Messages:
    if s.evaluator is not None and s.mode in ("dpo", "rm"):
        yield f"eval.evaluator: has no effect in mode {s.mode!r}, which compares pairs"
    for path in _defaults():
        if path.startswith("eval.") and not s.eval_interval and _is_set(s, path):
            yield f"{path}: has no effect while eval.eval_interval is 0; `miles-spmd eval` reads it"


@rule(WARNINGS)
def _settings_of_cells(s: Settings) -> Messages:
    for path in _defaults():
        if path.startswith("resilience.") and s.cells == 1 and _is_set(s, path):
            yield f"{path}: has no effect without resilience.cells above 1"


@rule(WARNINGS)
def _settings_of_outputs(s: Settings) -> Messages:
    if s.export_dir is not None and not s.export_final:
        yield "checkpoint.export_dir: has no effect while checkpoint.export_final is false"
    if s.exporter is not None and not s.export_final:
        yield "checkpoint.exporter: has no effect while checkpoint.export_final is false"
    for name in ("keep_every", "keep_best"):
        if s[name] and not s.keep_last:
            yield f"checkpoint.{name}: has no effect without checkpoint.keep_last: all checkpoints are kept"
    if not s.use_wandb and _is_set(s, "telemetry.wandb_project"):
        yield "telemetry.wandb_project: has no effect without telemetry.use_wandb"
