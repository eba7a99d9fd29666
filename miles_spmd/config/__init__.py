"""Settings: what they are, how they are read, overridden, checked, written and listed. Imports no torch.

Three layers: our tables; ``[megatron]``, passed unchanged to Megatron-core's dataclasses; ``[sglang]``, passed
unchanged to SGLang's ``ServerArgs``.
"""

from pathlib import Path
from typing import Any, Self

from miles_spmd.config import effects, judge  # noqa: F401  (registers rules)
from miles_spmd.config.algorithm import AlgorithmConfig
from miles_spmd.config.data import DataConfig, EvalConfig, EvalSet
from miles_spmd.config.determinism import DeterminismConfig
from miles_spmd.config.environment import EnvironmentConfig
from miles_spmd.config.model import ModelConfig
from miles_spmd.config.resilience import ResilienceConfig
from miles_spmd.config.reward import RewardConfig
from miles_spmd.config.reward import RewardTerm as RewardTerm
from miles_spmd.config.rollout import RefitConfig, RolloutConfig
from miles_spmd.config.run import CheckpointConfig, DeadlinesConfig, RunConfig, TelemetryConfig
from miles_spmd.config.second_policy import SecondPolicyConfig
from miles_spmd.config.serve import ServeConfig
from miles_spmd.config.slurm import SlurmConfig
from miles_spmd.config.table import Table
from miles_spmd.config.train import TrainConfig
from miles_spmd.types.engine_group import JUDGE, POLICY, SECOND_POLICY, EngineGroup
from miles_spmd.types.run_files import ENGINES_ALONE


class Config(Table):
    run: RunConfig = RunConfig()
    """What kind of run this is, how long it is, and where it writes."""
    model: ModelConfig
    """The checkpoints that a run starts from."""
    second_policy: SecondPolicyConfig = SecondPolicyConfig()
    """A second policy that plays other roles of the same episodes, and is trained beside the first."""
    data: DataConfig
    """Prompts, responses and preferences to train on."""
    rollout: RolloutConfig = RolloutConfig()
    """How many responses are generated, how they are sampled, and on which GPUs."""
    environment: EnvironmentConfig = EnvironmentConfig()
    """What the policy acts upon between prompt and reward, and the limits of the processes that it runs in."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """What is computed from rewards and log-probs. A plug point takes a built-in's name or `module:function`; the
    functions' signatures are in `miles_spmd/plugins/algorithm.py`. The defaults are plain GRPO."""
    reward: RewardConfig = RewardConfig()
    """Which function scores responses, and the limits of the processes that it runs in."""
    train: TrainConfig = TrainConfig()
    """Optimizer steps, their batches, learning rates and the order in which gradients are summed."""
    eval: EvalConfig = EvalConfig()
    """When and on what a model is evaluated."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What a run saves, exports and resumes from."""
    refit: RefitConfig = RefitConfig()
    """How the engine receives new weights."""
    determinism: DeterminismConfig = DeterminismConfig()
    """Whether runs of one configuration are bitwise equal, and what a run keeps to show it."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """What a run shows of itself."""
    deadlines: DeadlinesConfig = DeadlinesConfig()
    """Seconds after which the wait for something ends the run with a report of where each rank stands."""
    resilience: ResilienceConfig = ResilienceConfig()
    """What a run survives without a new start."""
    serve: ServeConfig = ServeConfig()
    """Where `miles-spmd serve` listens. Other verbs do not read it."""
    slurm: SlurmConfig = SlurmConfig()
    """The job that `miles-spmd slurm` submits. Other verbs do not read it. docs/slurm.md describes jobs."""
    megatron: dict[str, Any] = {}
    """Fields of Megatron-core's TransformerConfig, OptimizerConfig and DistributedDataParallelConfig, by their own
    names (`tensor_model_parallel_size`, `lr`, ...)."""
    sglang: dict[str, Any] = {}
    """Fields of SGLang's ServerArgs, by their own names (`tp_size`, `mem_fraction_static`, ...)."""

    @property
    def run_dir(self) -> Path:
        return self.run.output_dir / self.run.name

    @property
    def saves(self) -> bool:
        """Whether the run writes resumable checkpoints by itself."""
        return bool(self.checkpoint.save_interval or self.checkpoint.save_final)

    @property
    def saves_reference(self) -> bool:
        """Whether checkpoints have a reference policy, which may differ from the one that the run began with."""
        return self.has_reference and self.algorithm.ref_update_interval > 0

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens that one micro-batch may hold over the ranks that share its sequences."""
        return self.train.max_tokens_per_gpu * int(self.megatron.get("context_parallel_size", 1))

    @property
    def sum_terms(self) -> int:
        """Number of partial sums of every product whose columns are split over ranks, for parity: the larger of the
        trainer's and the engine's tensor-parallel sizes."""
        return max(int(self.megatron.get("tensor_model_parallel_size", 1)), int(self.sglang.get("tp_size", 1)))

    @property
    def checkpoints(self) -> list[Path]:
        """The Hugging Face folders that ranks load."""
        others = self.reward.judge_hf_checkpoint, self.second_policy.second_hf_checkpoint
        return [*self.model.checkpoints, *(folder for folder in others if folder is not None)]

    @property
    def has_judge(self) -> bool:
        """Whether engines of the run hold a judge."""
        return self.reward.judge_hf_checkpoint is not None

    @property
    def policies(self) -> list[str]:
        """The policies that are trained, by the names of their groups of ranks."""
        return [POLICY, *([SECOND_POLICY] if self.second_policy.second_num_gpus else [])]

    def plays(self, role: str) -> str:
        """Return the policy that plays ``role``."""
        return SECOND_POLICY if role in self.second_policy.second_roles else POLICY

    def of_policy(self, name: str) -> Self:
        """The configuration that the policy ``name`` is built from: of the second one, this one with its own settings
        as those of the only policy."""
        own = self.second_policy
        if name == POLICY:
            return self
        start = own.second_hf_checkpoint or self.model.hf_checkpoint
        model = self.model.model_copy(update={"hf_checkpoint": start, "ref_load": None})
        lr = {} if own.second_lr is None else {"lr": own.second_lr}
        alone = {
            "second_policy": SecondPolicyConfig(),
            "rollout": self.rollout.model_copy(update={"rollout_num_gpus": 0}),
            "reward": self.reward.model_copy(update={"judge_num_gpus": 0, "judge_hf_checkpoint": None}),
        }
        return self.model_copy(update={"model": model, "megatron": self.megatron | lr, **alone})

    def engine_group(self, name: str = POLICY) -> EngineGroup:
        """Return what the engines called ``name`` serve."""
        if name == JUDGE and self.reward.judge_hf_checkpoint is not None:
            return EngineGroup(JUDGE, self.reward.judge_hf_checkpoint, self.reward.judge_sglang)
        if name in (POLICY, SECOND_POLICY):  # each from the configuration that it is built from
            return EngineGroup(name, self.model.hf_checkpoint, self.sglang)
        raise LookupError(f"this run has no engines called {name!r}")

    def generates(self, task: str) -> bool:
        """Whether ``task`` (such as "train" or "eval") needs an engine."""
        if self.trains_on_pairs:
            return False
        return (
            task in ("eval", *ENGINES_ALONE)
            or self.run.mode == "rl"
            or any(one.eval_interval for one in self.eval_sets)
        )

    def scores(self, task: str) -> bool:
        """Whether ``task`` scores responses: what is only generated need not be, where no row has a label and no
        function of the user's is named."""
        own = any(":" in term.rm_type for term in self.reward.terms)
        return task != "generate" or bool(self.data.label_key) or own

    @property
    def eval_sets(self) -> list[EvalSet]:
        """All held-out sets, with a value for every setting but ``rm_type``."""
        sets = [EvalSet(name=name, prompt_data=source) for name, source in self.eval.eval_prompt_data.items()]
        response_len = self.eval.eval_max_response_len or self.rollout.rollout_max_response_len
        defaults = (
            self.data.model_dump() | self.eval.model_dump() | {"eval_max_response_len": response_len, "rm_type": None}
        )
        return [
            one.model_copy(update={name: defaults[name] for name, own in one if own is None})
            for one in [*sets, *self.eval.sets]
        ]

    @property
    def trains_on_pairs(self) -> bool:
        return self.run.mode in ("dpo", "rm")

    @property
    def has_reference(self) -> bool:
        """Whether a reference policy is kept."""
        if self.run.mode == "dpo":
            return self.algorithm.preference_loss != "simpo"
        return self.run.mode == "rl" and bool(self.algorithm.kl_coef or self.algorithm.kl_loss_coef)

    @property
    def has_critic(self) -> bool:
        return self.run.mode == "rl" and self.algorithm.advantage_estimator == "ppo"

    @property
    def has_teacher(self) -> bool:
        return self.run.mode == "rl" and self.algorithm.opd_kl_coef != 0

    def of_critic(self) -> Self:
        """The configuration that the critic is built from: this one, with the critic's learning rate and schedule."""
        lr = {} if self.train.critic_lr is None else {"lr": self.train.critic_lr}
        train = {"lr_warmup_iters": self.train.critic_lr_warmup_iters, "num_critic_only_steps": 0}
        return self.model_copy(update={"megatron": self.megatron | lr, "train": self.train.model_copy(update=train)})
