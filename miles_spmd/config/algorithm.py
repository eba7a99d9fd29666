"""`[algorithm]`: what is computed from rewards and log-probs."""

from typing import Annotated, Literal

from pydantic import Field

from miles_spmd.config.checks import ERRORS, TRAINING, Messages, Settings, rule
from miles_spmd.config.table import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, Table, plug_point

ESTIMATORS = (
    *("grpo", "gspo", "cispo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo", "rae"),
)


class AlgorithmConfig(Table):
    """What is computed from rewards and log-probs. A plug point takes a built-in's name or `module:function`; the
    functions' signatures are in `miles_spmd/plugins/algorithm.py`. The defaults are plain GRPO."""

    # rewards
    reward_post_process: Annotated[str, plug_point()] | None = None
    """Plug point: changes the rewards of a rollout before anything is computed from them."""
    overlong_buffer_len: NonNegativeInt = 0
    """Soft over-long penalty (DAPO) on the last so many tokens before `rollout_max_response_len`; 0: no penalty."""
    overlong_penalty_factor: NonNegativeFloat = 1.0
    """The penalty of a response of full length; it rises linearly over the buffer."""
    dynamic_sampling_filter: Annotated[str, plug_point("reward_nonzero_std")] | None = None
    """Plug point: which groups are trained on. `reward_nonzero_std` drops those whose rewards are all equal (DAPO)."""
    sample_filter: Annotated[str, plug_point()] | None = None
    """Plug point: which samples of a step the loss counts; the others stay in the baselines of their groups."""
    too_few_groups: Literal["train", "skip", "stop"] = "train"
    """What happens where nine batches of prompts did not give enough groups: train on those that were kept (`train`),
    end the step without an update (`skip`), or end the run (`stop`). A warning says which rewards the others had."""

    # advantages
    advantage_estimator: Annotated[str, plug_point(*ESTIMATORS)] = "grpo"
    """Plug point: how advantages are computed: `grpo`, `gspo`, `cispo`, `dr_grpo`, `rloo`, `reinforce_plus_plus`,
    `reinforce_plus_plus_baseline`, `ppo` or `rae`. `gspo` and `cispo` have GRPO's advantages and a loss of their own;
    `ppo` needs a critic; `rae` is for environments with several roles."""
    grpo_std_normalization: bool = True
    """Divide group-centred rewards by the group's standard deviation (`grpo`, `gspo`, `cispo`)."""
    gamma: Fraction = 1.0
    """Discount per trained token (`ppo`, `reinforce_plus_plus`)."""
    lambd: Fraction = 1.0
    """Decay lambda of generalised advantage estimation (`ppo`)."""
    rae_decay: Fraction = 0.95
    """How much of a role's baseline stays when the reward of a rollout is added to it (`rae`)."""
    normalize_advantages: bool | None = None
    """Whiten advantages over all trained tokens of the rollout. The default is true where the estimator is defined so:
    `reinforce_plus_plus` and `reinforce_plus_plus_baseline`."""

    # on-policy distillation
    opd_kl_coef: NonNegativeFloat = 0.0
    """Weight of the log-ratio of student to teacher that is subtracted from each token's advantage; 0: no distillation.
    """
    opd_log_prob_top_k: NonNegativeInt = 0
    """Compare the distributions on so many most probable tokens; 0: on the sampled token alone."""
    opd_top_k_strategy: Literal["only-student", "only-teacher", "intersection", "union", "xor"] = "only-student"
    """Whose most probable tokens are compared."""
    opd_reward_weight_mode: Literal["student_p", "teacher_p", "none"] = "student_p"
    """Whose probabilities weight the compared tokens; `none` weights all alike."""

    # policy loss
    loss_type: Annotated[str, plug_point("ppo", "gspo", "cispo")] | None = None
    """Plug point: the policy term of the loss (`ppo`, `gspo`, `cispo`). The default is the one that
    `advantage_estimator` names, else `ppo`."""
    eps_clip: NonNegativeFloat = 0.2
    """The ratio is clipped below 1 - `eps_clip`. GSPO's own value is 3e-4; CISPO's is 1, which sets no lower bound."""
    eps_clip_high: NonNegativeFloat | None = None
    """The ratio is clipped above 1 + `eps_clip_high`; the default is `eps_clip`."""
    eps_clip_c: Annotated[float, Field(gt=1)] | None = None
    """Constant c of dual clip; `none` switches dual clip off."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus of the loss."""
    use_rollout_logprobs: bool = False
    """Take the engine's log-probs as those of the old policy, instead of the trainer's own."""
    keep_old_actor: bool = False
    """Where rollouts lag behind (`update_weights_interval` > 1): take the log-probs of the old policy from a snapshot
    of the weights that generated, kept in host memory, instead of from the newest weights."""
    use_opsm: bool = False
    """Off-policy sequence masking: drop sequences with a negative advantage that the policy has moved away from."""
    opsm_delta: float = 1e-4
    """Mean log-ratio of old to current policy above which `use_opsm` drops a sequence."""
    loss_aggregation: Annotated[str, plug_point("rollout_mean", "token_mean", "constant")] = "rollout_mean"
    """Plug point: how token losses become one number. `rollout_mean` is the mean of per-response token means,
    `token_mean` the mean over all tokens, `constant` the sum over tokens / (responses x maximum response length)."""

    # KL to the reference policy
    kl_coef: NonNegativeFloat = 0.0
    """KL penalty inside the reward: of the whole response where groups are compared, else of each token."""
    kl_loss_coef: NonNegativeFloat = 0.0
    """Weight of the KL term of the loss."""
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = "k3"
    """Estimator of both KL terms; `low_var_kl` is k3 with bounds."""
    use_unbiased_kl: bool = False
    """Multiply the KL term of the loss by the ratio of current to old policy (DeepSeek-V3.2)."""
    ref_update_interval: NonNegativeInt = 0
    """Make the current policy the reference every n rollouts; 0: never."""

    # train/inference mismatch
    use_tis: bool = False
    """Weight the policy term by the ratio of the trainer's to the engine's probability of each token."""
    tis_function: Annotated[str, plug_point("tis", "icepop", "mis")] = "tis"
    """Plug point: `tis` clips the ratio to [`tis_clip_low`, `tis_clip`], `icepop` drops tokens outside, `mis` is set up
    by the settings below."""
    tis_clip: PositiveFloat = 2.0
    """Upper bound of the ratio (`tis`, `icepop`)."""
    tis_clip_low: NonNegativeFloat = 0.0
    """Lower bound of the ratio (`tis`, `icepop`)."""
    tis_level: Literal["token", "sequence", "geometric"] = "token"
    """`mis`: the ratio of each token, their product over the sequence, or its geometric mean."""
    tis_mode: Literal["truncate", "clip", "mask"] = "truncate"
    """`mis`: bound the ratio from above, bound it from both sides, or drop what is outside."""
    tis_upper_bound: PositiveFloat = 2.0
    """`mis`: upper bound of the weights."""
    tis_lower_bound: NonNegativeFloat | None = None
    """`mis`: lower bound of the weights; the default is 1 / `tis_upper_bound`."""
    tis_batch_normalize: bool = True
    """`mis`: scale the weights that are kept to mean 1 over the rollout."""
    use_rs: bool = True
    """`mis`: also drop what is outside [`rs_lower_bound`, `rs_upper_bound`] at `rs_level`."""
    rs_level: Literal["token", "sequence", "geometric"] = "token"
    """`mis`: the ratio that `use_rs` judges by: of the token, its sequence's product, or its geometric mean."""
    rs_upper_bound: PositiveFloat | None = None
    """`mis`: upper bound of what `use_rs` keeps; the default is `tis_upper_bound`."""
    rs_lower_bound: NonNegativeFloat | None = None
    """`mis`: lower bound of what `use_rs` keeps; the default is the lower bound of the weights."""
    rs_veto_threshold: PositiveFloat | None = 1e-4
    """`mis`: drop a whole sequence when the ratio of any of its tokens is smaller; `none`: never."""

    # critic and preferences
    value_clip: NonNegativeFloat = 0.2
    """How far the critic's value may move from its old one before its loss is clipped (`ppo`)."""
    preference_loss: Literal["dpo", "ipo", "simpo"] = "dpo"
    """Loss of mode `dpo`; SimPO needs no reference policy."""
    dpo_beta: PositiveFloat = 0.1
    """Beta of all three preference losses, which IPO calls tau. SimPO's own value is 2."""
    simpo_gamma: NonNegativeFloat = 1.0
    """Target margin of SimPO."""

    @property
    def surrogate(self) -> str:
        """The policy term of the loss, by name."""
        own = self.advantage_estimator if self.advantage_estimator in ("gspo", "cispo") else "ppo"
        return self.loss_type or own

    @property
    def whitens_advantages(self) -> bool:
        if self.normalize_advantages is None:
            return self.advantage_estimator in ("reinforce_plus_plus", "reinforce_plus_plus_baseline")
        return self.normalize_advantages


@rule(ERRORS)
def _corrections(s: Settings) -> Messages:
    if s.use_tis and s.use_rollout_logprobs:
        yield "algorithm.use_tis: use_rollout_logprobs makes both policies equal, nothing is left to correct"
    for lower, upper in (
        ("tis_clip_low", "tis_clip"),
        ("tis_lower_bound", "tis_upper_bound"),
        ("rs_lower_bound", "rs_upper_bound"),
    ):
        if s[lower] is not None and s[upper] is not None and s[lower] > s[upper]:
            yield f"algorithm.{lower}: {s[lower]} is above the upper bound {s[upper]}"


@rule(ERRORS)
def _overlong_responses(s: Settings) -> Messages:
    if s.overlong_buffer_len > s.rollout_max_response_len:
        yield (
            f"algorithm.overlong_buffer_len: {s.overlong_buffer_len} is more than rollout_max_response_len "
            f"{s.rollout_max_response_len}"
        )


@rule(TRAINING)
def _old_actor(s: Settings) -> Messages:
    if s.keep_old_actor and s.update_weights_interval == 1:
        yield "algorithm.keep_old_actor: with update_weights_interval = 1 the newest weights are those that generated"
    if s.keep_old_actor and s.use_rollout_logprobs:
        yield "algorithm.keep_old_actor: use_rollout_logprobs already takes the old policy's log-probs from the engine"
