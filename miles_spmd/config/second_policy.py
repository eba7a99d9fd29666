"""`[second_policy]`: a policy beside that of `[model]`, which plays other roles of the same episodes."""

from miles_spmd.config.checks import ERRORS, FILES, Messages, Settings, checkpoint_shape, rule
from miles_spmd.config.environment import SINGLE_TURN
from miles_spmd.config.model import Checkpoint, folder_errors
from miles_spmd.config.table import NonNegativeInt, PositiveFloat, Table


class SecondPolicyConfig(Table):
    """A second policy, which is trained on the games that both play. It has ranks of its own, which train it and
    generate with it, and all settings of this configuration but those here."""

    second_num_gpus: NonNegativeInt = 0
    """The last so many ranks, before those of a judge, have the second policy and nothing of the first; 0: there is
    none."""
    second_roles: list[str] = []
    """The roles of the environment that the second policy plays; the first one plays all others."""
    second_hf_checkpoint: Checkpoint | None = None
    """Checkpoint folder that it starts from, and that its reference policy has; the default is `model.hf_checkpoint`.
    It may have any size but needs the same tokenizer."""
    second_lr: PositiveFloat | None = None
    """Its learning rate; the default is `megatron.lr`."""


@rule(ERRORS)
def _a_second_policy_has_ranks_and_roles(s: Settings) -> Messages:
    if not s.second_num_gpus:
        if s.second_roles or s.second_hf_checkpoint is not None or s.second_lr is not None:
            yield "second_policy.second_num_gpus: must be at least 1: a second policy has ranks of its own"
        return
    if not s.second_roles:
        yield "second_policy.second_roles: is required by second_num_gpus: name the roles that the second policy plays"
    if s.mode != "rl" or s.environment == SINGLE_TURN:
        yield "second_policy.second_num_gpus: requires run.mode = 'rl' and an environment with several roles"
    if s.cells > 1:
        yield "second_policy.second_num_gpus: must be 0 with resilience.cells > 1: all ranks of a cell train one policy"


@rule(ERRORS)
def _ranks_remain_for_the_first_policy(s: Settings) -> Messages:
    others = s.second_num_gpus + s.judge_num_gpus
    if s.second_num_gpus and s.rollout_num_gpus < s.world_size <= others + s.rollout_num_gpus:
        yield (
            f"second_policy.second_num_gpus: {s.second_num_gpus} and the ranks of engines and judge leave none of "
            f"{s.world_size} ranks to train the first policy"
        )


@rule(ERRORS)
def _its_replicas_fill_its_ranks(s: Settings) -> Messages:
    sizes = ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size")
    replica = s[sizes[0]] * s[sizes[1]] * s[sizes[2]]
    for what, size in (("replicas of the trainer", replica), ("engines", s.tp_size)):
        if s.second_num_gpus % size:
            yield (
                f"second_policy.second_num_gpus: {what} of {size} ranks, as the first policy has them, do not divide "
                f"{s.second_num_gpus} ranks"
            )


@rule(ERRORS)
def _both_have_the_same_tokens(s: Settings) -> Messages:
    other = None if s.second_hf_checkpoint is None else checkpoint_shape(s.second_hf_checkpoint)
    if other is not None and other.get("vocab_size") != s.shape.get("vocab_size"):
        yield (
            f"second_policy.second_hf_checkpoint: {s.second_hf_checkpoint} has vocab_size {other.get('vocab_size')}, "
            f"model.hf_checkpoint has {s.shape.get('vocab_size')}"
        )


@rule(FILES)
def _second_checkpoint(s: Settings) -> Messages:
    if s.second_hf_checkpoint is not None:
        yield from folder_errors("second_policy.second_hf_checkpoint", s.second_hf_checkpoint)
