"""The engine: how responses are generated and on which GPUs (`[rollout]`), how it receives weights (`[refit]`)."""

from typing import Annotated, Literal

from pydantic import Field

from miles_spmd.config.checks import ERRORS, TRAINING, Messages, Settings, heads_divide, rule
from miles_spmd.config.data import evaluates
from miles_spmd.config.table import NonNegativeInt, PositiveInt, Table, Temperature, TopK, must_be, plug_point

# an earlier version's name of the engine that is in the tests now
_not_torch = must_be(
    "sglang or `module:function`, such as tests.reference_engine:TorchEngine", lambda name: name != "torch"
)

TIMED_ACCEPTANCE = ("first_finished", "balanced")
ACCEPTANCE = ("submission_order", *TIMED_ACCEPTANCE)


class RolloutConfig(Table):
    rollout_batch_size: PositiveInt = 32
    """Number of prompts in a rollout."""
    n_samples_per_prompt: PositiveInt = 8
    """Number of responses to each prompt; they are the group that estimators compare."""
    over_sampling_batch_size: PositiveInt | None = None
    """Number of prompts that a step begins, of which it trains on `rollout_batch_size`; `none`: no more than these."""
    acceptance: Annotated[str, plug_point(*ACCEPTANCE)] = "submission_order"
    """Plug point: which groups a step trains on: the first in the order of submission, which time does not change;
    those that finish first (`first_finished`); or (`balanced`) those that finish first, while the prompts of the others
    are collected until they are a batch of their own, for which a step waits. A function chooses among all groups that
    a step has begun, when they are complete."""
    partial_rollout: bool = False
    """Continue in the next step, under its weights, what a step has begun and does not train on."""
    mask_offpolicy_in_partial_rollout: bool = False
    """Leave tokens out of the loss that older weights than the step's have sampled."""
    durable: bool = False
    """Keep finished responses on disk until a checkpoint is complete that has their step. A run that is killed and then
    continued with `checkpoint.resume` takes them from there, so that episodes go on behind their last finished turn."""
    rollout_max_response_len: PositiveInt = 1024
    """Longest response in tokens, at which generation stops; of several turns all tokens behind the prompt."""
    rollout_temperature: Temperature = 1.0
    """Sampling temperature; 0 always takes the top-1 token."""
    rollout_top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens whose probabilities sum to this; 1: from the whole vocabulary."""
    rollout_top_k: TopK = -1
    """Sample from so many most probable tokens; -1: from the whole vocabulary."""
    rollout_stop: list[Annotated[str, must_be("a text that is not empty", bool)]] = []
    """Texts at which a response ends."""
    rollout_stop_token_ids: list[NonNegativeInt] = []
    """Tokens at which a response ends, beside the tokenizer's end-of-sequence token."""
    rollout_num_gpus: NonNegativeInt = 0
    """Disaggregated layout: the last so many ranks only generate, on devices of their own, and the others only train.
    0: colocated, every rank does both in turns."""
    engine: Annotated[str, _not_torch, plug_point("sglang")] = "sglang"
    """Plug point: the rollout engine. A function builds an engine other than SGLang; its Protocol, `EngineFactory`, is
    in `generation/engine.py`."""
    engine_replacements: NonNegativeInt = 3
    """How often in one rollout all engines are replaced by new ones with the trainer's weights after one has raised an
    exception; 0, and with `update_weights_interval` > 1: the first one ends the run."""
    offload_rollout: Literal["auto", "nothing", "kv_cache", "all"] = "auto"
    """What an engine releases while the trainer works on the same device: nothing; its KV cache and CUDA graphs; its
    weights, too. `auto`: the least that leaves the trainer what it is planned to need, with `memory_allowance`."""

    @property
    def collected_groups(self) -> int:
        """Number of complete groups for which a step waits: a user's function chooses among all that it begins."""
        return self.rollout_batch_size if self.acceptance in ACCEPTANCE else self.submitted_groups

    @property
    def submitted_groups(self) -> int:
        """Number of prompts that a step begins."""
        return self.over_sampling_batch_size or self.rollout_batch_size


COMPARE_GROUPS = ("grpo", "gspo", "cispo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline")


@rule(TRAINING)
def _groups_differ(s: Settings) -> Messages:
    if s.mode != "rl" or s.advantage_estimator not in COMPARE_GROUPS:
        return
    if s.n_samples_per_prompt == 1:
        yield (
            f"rollout.n_samples_per_prompt: {s.advantage_estimator} compares the responses to a prompt; take at least 2"
        )
    if s.rollout_temperature == 0:
        yield "rollout.rollout_temperature: at 0 all samples of a group are equal and nothing is learnt; take 1.0"
    if s.rollout_top_k == 1:
        yield "rollout.rollout_top_k: at 1 all samples of a group are equal and nothing is learnt; take -1"


@rule(ERRORS)
def _over_sampling(s: Settings) -> Messages:
    submits = s.over_sampling_batch_size or s.rollout_batch_size
    if submits < s.rollout_batch_size:
        yield (
            f"rollout.over_sampling_batch_size: {submits} prompts are fewer than the rollout_batch_size = "
            f"{s.rollout_batch_size} that a step trains on"
        )
    leave = {"rollout.partial_rollout": s.partial_rollout, "rollout.acceptance": s.acceptance != "submission_order"}
    timed = {"rollout.partial_rollout": s.partial_rollout, "rollout.acceptance": s.acceptance in TIMED_ACCEPTANCE}
    for name, chosen in leave.items():
        if chosen and submits <= s.rollout_batch_size:
            yield f"{name}: needs rollout.over_sampling_batch_size above rollout_batch_size, or no group is left over"
        if timed[name] and s.deterministic:
            yield f"{name}: with determinism.deterministic what a step trains on may not depend on time"
    if s.partial_rollout and s.acceptance not in ACCEPTANCE:
        yield "rollout.partial_rollout: a function of rollout.acceptance waits for all groups; choose one of the two"
    if s.partial_rollout and s.acceptance == "balanced":
        yield "rollout.partial_rollout: 'balanced' begins anew what did not finish in time; choose one of the two"
    if s.mask_offpolicy_in_partial_rollout and not s.partial_rollout:
        yield "rollout.mask_offpolicy_in_partial_rollout: needs rollout.partial_rollout"


@rule(ERRORS)
def _durable_responses_have_weights(s: Settings) -> Messages:
    if s.durable and not s.ledger:
        yield "rollout.durable: needs determinism.ledger, whose digests say which weights have sampled a response"


@rule(ERRORS)
def _responses_fit_the_context(s: Settings) -> Messages:
    context = s.shape.get("max_position_embeddings")
    if context is None:
        return
    prompt = s.rollout_max_prompt_len or 1
    lengths = {"rollout.rollout_max_response_len": s.rollout_max_response_len} if s.mode == "rl" else {}
    if evaluates(s) and s.eval_max_response_len is not None:
        lengths["eval.eval_max_response_len"] = s.eval_max_response_len
    for number, one in enumerate(s.sets):
        if one.eval_max_response_len is not None:
            lengths[f"eval.sets.{number}.eval_max_response_len"] = one.eval_max_response_len
    for name, response in lengths.items():
        if prompt + response > context:
            yield f"{name}: {prompt} prompt + {response} response tokens exceed the model's context of {context}"


@rule(ERRORS)
def _stop_tokens_are_tokens(s: Settings) -> Messages:
    vocabulary = s.shape.get("vocab_size")
    unknown = [token for token in s.rollout_stop_token_ids if vocabulary is not None and token >= vocabulary]
    if unknown:
        yield f"rollout.rollout_stop_token_ids: {unknown[0]} must be below {vocabulary}, the model's vocab_size"


# --- ranks that generate ----- ----------------------------------------------------------------------------------------


@rule(ERRORS)
def _ranks_remain_to_train(s: Settings) -> Messages:
    if s.rollout_num_gpus >= s.world_size:
        yield f"rollout.rollout_num_gpus: {s.rollout_num_gpus} of {s.world_size} ranks leave none to train"


@rule(ERRORS)
def _engines_have_work(s: Settings) -> Messages:
    if s.rollout_num_gpus and (s.mode in ("dpo", "rm") or (s.mode == "sft" and not evaluates(s))):
        yield f"rollout.rollout_num_gpus: must be 0, because this run of mode {s.mode!r} generates nothing"


@rule(ERRORS)
def _nothing_to_release(s: Settings) -> Messages:
    if s.rollout_num_gpus and s.offload_train:
        yield "train.offload_train: must be false with rollout_num_gpus; no engine needs the trainers' memory"
    if s.rollout_num_gpus and s.offload_rollout not in ("auto", "nothing"):
        yield "rollout.offload_rollout: must be 'nothing' or 'auto' with rollout_num_gpus; no trainer needs the memory"


@rule(ERRORS)
def _engines_fill_their_ranks(s: Settings) -> Messages:
    if s.engine_ranks % s.tp_size:
        yield f"sglang.tp_size: engines of {s.tp_size} ranks do not divide the {s.engine_ranks} that generate"


@rule(ERRORS)
def _engine_heads(s: Settings) -> Messages:
    yield from heads_divide("sglang.tp_size", s.tp_size, s.shape)


class RefitConfig(Table):
    update_weights_interval: PositiveInt = 1
    """Give the engine new weights every n rollouts."""
    refit_checksums: bool = True
    """Compare checksums of every bucket after each refit; a mismatch stops the run."""
    refit_bucket_mib: PositiveInt = 256
    """MiB of the buckets in which weights are copied, sent and compared."""


@rule(ERRORS)
def _lagging_rollouts(s: Settings) -> Messages:
    intervals = {"checkpoint.save_interval": s.save_interval, "eval.eval_interval": s.eval_interval}
    intervals |= {f"eval.sets.{number}.eval_interval": one.eval_interval or 0 for number, one in enumerate(s.sets)}
    for name, interval in intervals.items():
        if interval % s.update_weights_interval:
            yield (
                f"{name}: {interval} is not a multiple of update_weights_interval {s.update_weights_interval}; saving "
                "and evaluating refit the engine, which would shorten the interval; set it to a multiple"
            )
