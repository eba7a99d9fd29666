"""Every setting of a run, where it stands, with its default and its meaning. Imports no torch.

Three layers: our tables below; ``[megatron]``, passed unchanged to Megatron-core's dataclasses; ``[sglang]``, passed
unchanged to SGLang's ``ServerArgs``. Leaf names are unique, so an override may name a leaf alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def plug_point(*builtins: str) -> AfterValidator:
    """Accepts a built-in's name, or anybody's function as `module:function`."""

    def check(name: str) -> str:
        module, _, function = name.partition(":")
        if name in builtins or (module and function):
            return name
        raise ValueError(" or ".join([", ".join(builtins), "`module:function`"]) if builtins else "`module:function`")

    return AfterValidator(check)


def _no_torch_engine(engine: str) -> str:
    if engine == "torch":
        raise ValueError("sglang or `module:function` (this engine is 'tests.reference_engine:TorchEngine' now)")
    return engine


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class RunConfig(Table):
    mode: Literal["rl", "sft", "dpo", "rm"] = "rl"
    """`rl` generates and trains on rewards; `sft` trains on the answers in the data; `dpo` trains the policy, and `rm`
    a reward model, on pairs of a preferred and a rejected answer."""
    name: str = "run"
    output_dir: Path = Path("runs")
    """The run lives in `output_dir/name`: resolved config, metrics.jsonl, checkpoints, report."""
    seed: int = 1234
    """All randomness (data order, sampling, initialisation) is a function of this and of identities."""
    num_rollout: PositiveInt = 100
    """Number of rollouts (`rl`) or optimizer steps (other modes) in the run."""


class ModelConfig(Table):
    hf_checkpoint: Path
    """Folder with config.json, tokenizer and safetensors; the run starts from it. `random:qwen3-0.6b` (`-1.7b`, `-4b`,
    `-8b`, `-30b-a3b`, `random:qwen2.5-1.5b`, `random:llama-3.2-1b`) is a model of that shape with random weights."""
    ref_load: Path | None = None
    """Checkpoint folder of the reference policy for KL terms and `dpo`; default: `hf_checkpoint`."""
    critic_load: Path | None = None
    """Checkpoint folder that the critic starts from, a policy's or a reward model's; default: `hf_checkpoint`."""
    teacher_load: Path | None = None
    """Checkpoint folder of the teacher of on-policy distillation: any size, the same vocabulary."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Parameter dtype of trainer and engine."""


class DataConfig(Table):
    prompt_data: str
    """JSONL or parquet file; `path@[0:1000]` takes a slice of its rows."""
    input_key: str = "prompt"
    """Column with a string or a list of chat messages."""
    label_key: str | None = "label"
    chosen_key: str = "chosen"
    """Column of the preferred answer (`dpo`, `rm`): a string, or the messages that continue the input's."""
    rejected_key: str = "rejected"
    metadata_key: str | None = "metadata"
    apply_chat_template: bool = False
    """Wrap a plain string as one user message; message lists always go through the template."""
    rollout_shuffle: bool = True
    rollout_max_prompt_len: PositiveInt | None = None
    """A longer prompt is an error naming its line, unless `drop_long_prompts`."""
    drop_long_prompts: bool = False


class RolloutConfig(Table):
    rollout_batch_size: PositiveInt = 32
    """Prompts per rollout."""
    n_samples_per_prompt: PositiveInt = 8
    rollout_max_response_len: PositiveInt = 1024
    rollout_temperature: NonNegativeFloat = 1.0
    rollout_top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    rollout_top_k: int = -1
    rollout_stop: list[str] = []
    rollout_stop_token_ids: list[int] = []
    rollout_num_gpus: NonNegativeInt = 0
    """Disaggregated layout: the last so many ranks only generate, on devices of their own, and the others only train.
    0: colocated, every rank does both in turns."""
    engine: Annotated[str, AfterValidator(_no_torch_engine), plug_point("sglang")] = "sglang"
    """Plug point: `sglang`, or `module:function` of a factory of another engine; its Protocol, `EngineFactory`, is in
    `miles_spmd/generation/engine.py`."""
    offload_rollout: Literal["auto", "nothing", "kv_cache", "all"] = "auto"
    """What an engine gives up while the trainer works on the same device: nothing; its KV cache and CUDA graphs; its
    weights, too. `auto`: the least that leaves the trainer what it is planned to need, with `memory_allowance`."""


class AlgorithmConfig(Table):
    """What is computed from rewards and log-probs. A plug point takes a built-in's name or `module:function`; the
    functions' signatures are in `miles_spmd/plugins/algorithm.py`. The defaults are plain GRPO."""

    # rewards
    reward_post_process: Annotated[str, plug_point()] | None = None
    """Plug point: changes the rewards of a rollout before anything is computed from them."""
    overlong_buffer_len: NonNegativeInt = 0
    """Soft over-long penalty (DAPO) on the last so many tokens before `rollout_max_response_len`; 0: off."""
    overlong_penalty_factor: NonNegativeFloat = 1.0
    """The penalty of an answer of full length."""
    dynamic_sampling_filter: Annotated[str, plug_point("reward_nonzero_std")] | None = None
    """Plug point: which groups are trained on. `reward_nonzero_std` drops those whose rewards are all equal (DAPO)."""

    # advantages
    advantage_estimator: Annotated[
        str,
        plug_point(
            "grpo", "gspo", "cispo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo"
        ),
    ] = "grpo"
    """Plug point. `gspo` and `cispo` have GRPO's advantages and a loss of their own; `ppo` needs a critic."""
    grpo_std_normalization: bool = True
    """Divide group-centred rewards by the group's standard deviation (`grpo`, `gspo`, `cispo`)."""
    gamma: Fraction = 1.0
    """Discount per trained token (`ppo`, `reinforce_plus_plus`)."""
    lambd: Fraction = 1.0
    """Decay of generalised advantages (`ppo`)."""
    normalize_advantages: bool | None = None
    """Whiten advantages over all trained tokens of the rollout; default: only where the estimator is defined so, which
    `reinforce_plus_plus` and `reinforce_plus_plus_baseline` are."""

    # on-policy distillation
    opd_kl_coef: NonNegativeFloat = 0.0
    """Weight of the log-ratio of student to teacher that is taken off each token's advantage; 0: no distillation."""
    opd_log_prob_top_k: NonNegativeInt = 0
    """Compare this many likely tokens instead of the sampled one; 0: the sampled one."""
    opd_top_k_strategy: Literal["only-student", "only-teacher", "intersection", "union", "xor"] = "only-student"
    """Whose most likely tokens are compared."""
    opd_reward_weight_mode: Literal["student_p", "teacher_p", "none"] = "student_p"
    """Whose probabilities weight the compared tokens; `none`: all the same."""

    # policy loss
    loss_type: Annotated[str, plug_point("ppo", "gspo", "cispo")] | None = None
    """Plug point: the policy term of the loss; default: the one that `advantage_estimator` names, else `ppo`."""
    eps_clip: NonNegativeFloat = 0.2
    """The ratio is clipped below 1 - `eps_clip`. GSPO's own value is 3e-4; CISPO has no lower bound at 1."""
    eps_clip_high: NonNegativeFloat | None = None
    """The ratio is clipped above 1 + `eps_clip_high`; default: `eps_clip`."""
    eps_clip_c: Annotated[float, Field(gt=1)] | None = None
    """Dual-clip constant c; None switches dual clip off."""
    entropy_coef: float = 0.0
    use_rollout_logprobs: bool = False
    """Take the engine's log-probs as those of the old policy, instead of the trainer's own."""
    keep_old_actor: bool = False
    """Where rollouts lag behind (`update_weights_interval` > 1): take the log-probs of the old policy from a copy of
    the weights that generated, kept in host memory, instead of from the newest weights."""
    use_opsm: bool = False
    """Off-policy sequence masking: drop sequences with negative advantage that the policy has left."""
    opsm_delta: float = 1e-4
    """... further than this mean log-ratio of old to current policy."""
    loss_aggregation: Annotated[str, plug_point("rollout_mean", "token_mean", "constant")] = "rollout_mean"
    """Plug point: mean of per-rollout token means; mean over all tokens; sum over tokens / (rollouts x max response
    length)."""

    # KL to the reference policy
    kl_coef: NonNegativeFloat = 0.0
    """KL penalty inside the reward: of the whole answer where groups are compared, else of each token."""
    kl_loss_coef: NonNegativeFloat = 0.0
    """KL term of the loss."""
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = "k3"
    """Estimator of both; `low_var_kl` is k3 with bounds."""
    use_unbiased_kl: bool = False
    """Multiply the KL term of the loss by the ratio of current to old policy (DeepSeek-V3.2)."""
    ref_update_interval: NonNegativeInt = 0
    """Make the current policy the reference every n rollouts; 0: never."""

    # train/inference mismatch
    use_tis: bool = False
    """Weight the policy term by the trainer's over the engine's probability of each token."""
    tis_function: Annotated[str, plug_point("tis", "icepop", "mis")] = "tis"
    """Plug point: `tis` clips the ratio to [`tis_clip_low`, `tis_clip`], `icepop` drops tokens outside, `mis` does what
    the settings below say."""
    tis_clip: PositiveFloat = 2.0
    tis_clip_low: NonNegativeFloat = 0.0
    tis_level: Literal["token", "sequence", "geometric"] = "token"
    """`mis`: the ratio of each token, their product over the sequence, or its geometric mean."""
    tis_mode: Literal["truncate", "clip", "mask"] = "truncate"
    """`mis`: bound from above; from both sides; drop what is outside."""
    tis_upper_bound: PositiveFloat = 2.0
    tis_lower_bound: NonNegativeFloat | None = None
    """Default: 1 / `tis_upper_bound`."""
    tis_batch_normalize: bool = True
    """`mis`: scale the weights that are kept to mean 1 over the rollout."""
    use_rs: bool = True
    """`mis`: also drop what is outside [`rs_lower_bound`, `rs_upper_bound`] at `rs_level`."""
    rs_level: Literal["token", "sequence", "geometric"] = "token"
    rs_upper_bound: PositiveFloat | None = None
    """Default: `tis_upper_bound`."""
    rs_lower_bound: NonNegativeFloat | None = None
    """Default: the lower bound of the weights."""
    rs_veto_threshold: PositiveFloat | None = 1e-4
    """`mis`: drop a whole sequence when the ratio of any of its tokens is smaller; None: never."""

    # critic and preferences
    value_clip: NonNegativeFloat = 0.2
    """How far the critic's value may move from its old one before its loss is clipped (`ppo`)."""
    preference_loss: Literal["dpo", "ipo", "simpo"] = "dpo"
    dpo_beta: PositiveFloat = 0.1
    """Beta of all three; IPO calls it tau. SimPO's own value is 2."""
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


class RewardConfig(Table):
    rm_type: str = "math"
    """`math` (math-verify), `exact`, or `module:function`."""
    reward_timeout: PositiveFloat = 30.0
    """Seconds for one call; a slower one is killed and is an error."""
    reward_memory_gib: PositiveFloat = 4.0
    """Address-space growth allowed to one reward process."""
    reward_workers: PositiveInt = 2
    reward_batched: bool = False
    """Call a custom function once per prompt group instead of once per sample."""


class TrainConfig(Table):
    global_batch_size: PositiveInt | None = None
    """Samples per optimizer step; default: one step per rollout. In `sft` sequences per step, in `dpo`
    and `rm` pairs."""
    max_tokens_per_gpu: PositiveInt = 8192
    """Token budget of one packed micro-batch on one rank (times context-parallel size)."""
    offload_train: bool = False
    """Put moments and main parameters into host memory, and free gradients, while the engine has the device; the
    weights stay. More room for the engine's cache, at the price of two transfers in each step."""
    memory_allowance: NonNegativeFloat = 0.25
    """How much more memory than planned (a fraction, and 2 GiB) may be in use before the run stops."""
    max_skipped_steps: NonNegativeInt = 3
    """Consecutive steps with a non-finite loss or gradient before the run stops."""
    lr_warmup_iters: NonNegativeInt = 0
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    min_lr: NonNegativeFloat = 0.0
    critic_lr: PositiveFloat | None = None
    """Of the critic (`ppo`), decayed as the policy's; default: the policy's."""
    critic_lr_warmup_iters: NonNegativeInt = 0
    num_critic_only_steps: NonNegativeInt = 0
    """Rollouts at the beginning that train the critic alone."""
    reduction_leaves: NonNegativeInt = 0
    """Canonical reduction: sum gradients over a tree with so many leaves (a power of two), each a fixed share of the
    batch. Gradients are then the same bits for every data-parallel size that divides it, and for every
    `max_tokens_per_gpu`. 0: in the order in which sequences happen to be packed."""
    leaf_tokens: NonNegativeInt = 0
    """Pack the sequences of a leaf into micro-batches of so many tokens, at most `max_tokens_per_gpu` times
    context-parallel size. Another number gives other bits. 0: one sequence in each."""


class EvalConfig(Table):
    eval_interval: NonNegativeInt = 0
    """Evaluate every n rollouts and at both ends; 0: never."""
    eval_prompt_data: dict[str, str] = {}
    """Name -> file, as `prompt_data`. In `dpo` and `rm` these are pairs, and the accuracy of preferring is measured."""
    n_samples_per_eval_prompt: PositiveInt = 1
    """k of pass@k."""
    eval_temperature: NonNegativeFloat = 0.0
    eval_top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    eval_max_response_len: PositiveInt | None = None


class CheckpointConfig(Table):
    save_interval: NonNegativeInt = 0
    """Write a resumable checkpoint every n rollouts; 0: only where `save_final` says so."""
    save_final: bool = False
    export_final: bool = True
    """Write a Hugging Face checkpoint at the end."""
    export_dir: Path | None = None
    """Where to; default: `export/` in the run folder."""
    load: Path | None = None
    """A checkpoint folder of this project to resume from; `latest` inside the run folder when the run is restarted."""
    resume: bool = False
    """Continue from the run folder's newest checkpoint if there is one."""


class RefitConfig(Table):
    update_weights_interval: PositiveInt = 1
    """Give the engine new weights every n rollouts."""
    refit_checksums: bool = True
    """Compare checksums of every bucket after each refit; a mismatch stops the run."""
    refit_bucket_mib: PositiveInt = 256


class DeterminismConfig(Table):
    """Whether runs of one configuration are equal in every bit, and what a run keeps to show it."""

    deterministic: bool = False
    """Two runs on machines alike are equal bit for bit: every kernel and collective adds up in a fixed order, and no
    answer depends on what else the engine computes."""
    ledger: bool = True
    """Keep in `ledger/` a hash chain over what every step read and computed; see `miles-spmd ledger`, `diff`, `replay`.
    """
    ledger_data_gib: NonNegativeFloat = 4.0
    """Beside it keep tokens, log-probs, rewards and advantages of the newest steps, up to so much: by them `diff` finds
    the token and `replay --phase train` does without generating. 0: none."""
    parity: Literal["auto", "bitwise", "off"] = "auto"
    """`bitwise`: engine and trainer compute log-probs by the same batch-invariant kernels, so that they are equal; what
    stands in the way of that is an error. `auto`: the same where nothing does, else `off`, and the log says why."""
    parity_gate: Literal["warn", "mask", "stop"] | None = None
    """What happens when engine and trainer differ by more than is allowed, which with `bitwise` is nothing: a warning,
    once; the tokens are not trained on, which takes a forward pass beforehand; the run ends and says where first.
    Default: `stop`, and `warn` where `auto` has chosen."""
    mismatch_budget: dict[Literal["mean", "p999", "max", "k3", "top1_flips"], PositiveFloat] = {}
    """How far log-probs of engine and trainer may be apart without `bitwise`, by what is measured of a step: mean,
    99.9th percentile and maximum of the difference, k3 of the KL divergence, and the share of places whose most likely
    token is another one, which takes a forward pass beforehand. It depends on model and dtype."""

    @property
    def counts_flips(self) -> bool:
        return "top1_flips" in self.mismatch_budget

    @property
    def masks_tokens(self) -> bool:
        return self.parity_gate == "mask" and (self.parity == "bitwise" or bool(self.mismatch_budget))


class TelemetryConfig(Table):
    progress: Literal["auto", "rich", "plain", "none"] = "auto"
    use_tensorboard: bool = False
    use_wandb: bool = False
    wandb_project: str = "miles-spmd"
    num_transcripts: NonNegativeInt = 8
    """Sample transcripts kept per evaluation for the report."""


class DeadlinesConfig(Table):
    """Seconds after which the wait for something ends the run with a report of where each rank stands."""

    start_timeout: PositiveFloat = 900.0
    rollout_timeout: PositiveFloat = 3600.0
    train_timeout: PositiveFloat = 1800.0
    refit_timeout: PositiveFloat = 600.0
    checkpoint_timeout: PositiveFloat = 1800.0
    heartbeat_timeout: PositiveFloat = 60.0


class Config(Table):
    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    reward: RewardConfig = RewardConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    refit: RefitConfig = RefitConfig()
    determinism: DeterminismConfig = DeterminismConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()
    megatron: dict[str, Any] = {}
    """Fields of TransformerConfig, OptimizerConfig and DistributedDataParallelConfig, by their own names."""
    sglang: dict[str, Any] = {}
    """Fields of ServerArgs, by their own names (`tp_size`, `mem_fraction_static`, ...)."""

    @property
    def run_dir(self) -> Path:
        return self.run.output_dir / self.run.name

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens that one micro-batch may hold over the ranks that share its sequences."""
        return self.train.max_tokens_per_gpu * int(self.megatron.get("context_parallel_size", 1))

    @property
    def sum_terms(self) -> int:
        """Of every sum that tensor-parallel ranks share, for parity: as many as the side of more ranks has."""
        return max(int(self.megatron.get("tensor_model_parallel_size", 1)), int(self.sglang.get("tp_size", 1)))

    def generates(self, task: str) -> bool:
        """Whether ``task`` ("train", "eval" or "export") needs an engine."""
        if task == "export" or self.trains_on_pairs:
            return False
        return task == "eval" or self.run.mode == "rl" or self.eval.eval_interval > 0

    @property
    def trains_on_pairs(self) -> bool:
        return self.run.mode in ("dpo", "rm")

    @property
    def has_reference(self) -> bool:
        """Whether a reference policy is kept."""
        a = self.algorithm
        if self.run.mode == "dpo":
            return a.preference_loss != "simpo"
        return self.run.mode == "rl" and bool(a.kl_coef or a.kl_loss_coef)

    @property
    def has_critic(self) -> bool:
        return self.run.mode == "rl" and self.algorithm.advantage_estimator == "ppo"

    @property
    def has_teacher(self) -> bool:
        return self.run.mode == "rl" and self.algorithm.opd_kl_coef != 0

    def of_critic(self) -> Config:
        """What the critic is built from: this configuration, with its own learning rate and schedule."""
        lr = {} if self.train.critic_lr is None else {"lr": self.train.critic_lr}
        train = {"lr_warmup_iters": self.train.critic_lr_warmup_iters, "num_critic_only_steps": 0}
        return self.model_copy(update={"megatron": self.megatron | lr, "train": self.train.model_copy(update=train)})
