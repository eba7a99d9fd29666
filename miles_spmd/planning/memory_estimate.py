"""The memory that a rank needs, from the shapes of the checkpoint's tensors. An estimate: allocators and workspaces
come on top.

Weights, gradients and optimizer states are counted exactly. Activations follow Korthikanti et al., "Reducing Activation
Recomputation in Large Transformer Models" (arXiv 2205.05198), section 4, restated for grouped-query attention that
keeps no score matrix, SwiGLU and no dropout: what each layer keeps for its backward pass, per token, is listed in
:meth:`miles_spmd.models.blocks.layer.Layer.activations`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from miles_spmd.config import Config
from miles_spmd.config.checks import settings
from miles_spmd.data.dataset import DataError, read_rows
from miles_spmd.models import Family, load_family
from miles_spmd.models.blocks import Elements, Sizes
from miles_spmd.models.family import EMBEDDING, HEAD
from miles_spmd.planning.parallel_layout import ParallelLayout
from miles_spmd.types.engine_group import JUDGE

FP32 = 4
MAX_LOGITS = 2**27  # of a chunk, as training/output_layer.py has it
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
STATIC_FRACTION = 0.85  # of a GPU for weights and KV cache, where [sglang] mem_fraction_static leaves it to SGLang


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each kind, each on the rank that needs most of it."""

    engine_weights: int
    kv_bytes_per_token: int
    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0  # of a chunk, and the output layer's gradient
    sums: int = 0  # gradients of parts of the batch that wait for the rest of it, where there are reduction_leaves
    received: int = 0  # another rank's gradient, which is added then, when the activations are freed
    update: int = 0  # temporary, in the optimizer step, when the activations are freed
    others: int = 0  # weights of another model, on the device while it runs forward
    critic: int = 0  # its parameters, gradients and optimizer
    copies: int = 0  # of weights in FP8, which Transformer Engine keeps
    colocated: bool = False  # trainer and engine are on the same devices
    engine_stays: bool = False  # the engine keeps its weights while the trainer works, because rollouts lag behind
    host: int = 0  # in host memory: weights of the reference policy, the old actor, the teacher; optimizers that move
    # out; copies of what a checkpoint saves; gradients that cells exchange
    moves_out: int = 0  # of all that is trained, while the engine generates: optimizers to host memory, gradients away

    @property
    def trainer(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.critic + self.copies

    @property
    def working(self) -> int:
        """The peak on top of that while the trainer works."""
        return max(self.activations + self.logits + self.sums, self.received, self.update, self.others + self.logits)

    @property
    def training(self) -> int:
        return self.trainer + self.working + (self.engine_weights if self.colocated and self.engine_stays else 0)

    @property
    def beside(self) -> int:
        """What the trainer keeps on a shared device while the engine generates."""
        return self.trainer - self.moves_out if self.colocated else 0

    @property
    def generating(self) -> int:
        """Without KV cache."""
        return self.beside + self.engine_weights

    def kv_tokens(self, device_bytes: int, static_fraction: float) -> int:
        """Return the tokens of KV cache: SGLang takes ``static_fraction`` of the free memory for weights and cache."""
        free = (device_bytes - self.beside) * static_fraction - self.engine_weights
        return max(0, int(free)) // self.kv_bytes_per_token


def estimate_memory(config: Config, family: Family, layout: ParallelLayout) -> MemoryEstimate:
    s = settings(config)
    bytes_each = DTYPE_BYTES[config.model.dtype]
    shards, expert_shards = (layout.dp * layout.cp, layout.edp) if layout.distributed_optimizer else (1, 1)
    # two moments, and the main parameters where the weights themselves are not fp32
    state_bytes = 2 * FP32 + (0 if bytes_each == FP32 else FP32)
    grad_bytes = FP32 if config.megatron.get("grad_reduce_in_fp32", True) else bytes_each  # the trainer's default

    def trained(model: Family) -> tuple[int, int, int, int]:
        dense, expert = max(local_parameters(model, layout, s), key=sum)
        states = dense // shards + expert // expert_shards
        saved = _save_copies(config, dense, expert, layout)
        return (dense + expert) * bytes_each, (dense + expert) * grad_bytes, states * state_bytes, saved

    parameters, gradients, optimizer, saved = trained(family)
    models = config.model
    critic = load_family(models.critic_load or models.hf_checkpoint, value_head=True) if config.has_critic else None
    of_critic = trained(critic) if critic else (0, 0, 0, 0)
    teacher = load_family(models.teacher_load) if config.has_teacher and models.teacher_load else None
    copies = int(config.has_reference) + int(config.algorithm.keep_old_actor)
    leaves, gradient = config.train.reduction_leaves, max(gradients, of_critic[1])  # they train in turns
    return MemoryEstimate(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        activations=_activations(config, family, layout, s) * bytes_each,
        logits=_head_bytes(config.train.max_tokens_per_gpu, family, layout.tp, bytes_each),
        sums=_waiting_subtrees(config, layout) * gradient,
        received=gradient if leaves and layout.dp > 1 else 0,
        update=0 if grad_bytes == FP32 else optimizer // state_bytes * FP32,
        others=max(parameters if copies else 0, trained(teacher)[0] if teacher else 0),
        critic=sum(of_critic[:3]),
        copies=_fp8_copies(family, layout, s),
        engine_weights=_engine_parameters(family, layout.engine_tp) * bytes_each,
        kv_bytes_per_token=_kv_bytes(family, layout.engine_tp, bytes_each),
        colocated=not layout.rollout_num_gpus,
        engine_stays=config.refit.update_weights_interval > 1,
        host=copies * parameters
        + (trained(teacher)[0] if teacher else 0)
        + (_pinned(optimizer) + _pinned(of_critic[2]) if config.train.offload_train else 0)
        + saved
        + of_critic[3]
        + _kept_gradients(config, gradients, of_critic[1]),
        moves_out=gradients + optimizer + sum(of_critic[1:3]) if config.train.offload_train else 0,
    )


def estimate_judge(config: Config) -> MemoryEstimate:
    """Return the memory of a rank that holds a part of a judge, and nothing else."""
    group, bytes_each = config.engine_group(JUDGE), DTYPE_BYTES[config.model.dtype]
    family = load_family(group.hf_checkpoint)
    return MemoryEstimate(
        engine_weights=_engine_parameters(family, group.tp_size) * bytes_each,
        kv_bytes_per_token=_kv_bytes(family, group.tp_size, bytes_each),
    )


def checkpoint_bytes(config: Config) -> int:
    """Return the size of a resumable checkpoint, of which the layout does not matter: weights in fp32 and the
    optimizer's state of everything that is trained, and reference policies that change."""
    return sum(_checkpoint_bytes(config.of_policy(name)) for name in config.policies)


def _checkpoint_bytes(config: Config) -> int:
    m, policy = config.model, load_family(config.model.hf_checkpoint, value_head=config.run.mode == "rm")
    trained = policy.num_parameters()
    if config.has_critic:
        trained += load_family(m.critic_load or m.hf_checkpoint, value_head=True).num_parameters()
    moments = 2 if settings(config)["optimizer"] == "adam" else 1
    reference = policy.num_parameters() if config.saves_reference else 0
    return trained * FP32 * (1 + moments) + reference * DTYPE_BYTES[m.dtype]


def _save_copies(config: Config, dense: int, expert: int, layout: ParallelLayout) -> int:
    """Return the bytes of host memory that a save copies to: data-parallel ranks share what they hold alike. What has
    moved out of the device is in host memory already."""
    if not config.saves:
        return 0
    kinds = 3 if not config.train.offload_train else int(DTYPE_BYTES[config.model.dtype] == FP32)
    return (dense // (layout.dp * layout.cp) + expert // layout.edp) * kinds * FP32


def _waiting_subtrees(config: Config, layout: ParallelLayout) -> int:
    """Return how many sums of leaves wait for their siblings on a rank when it computes its last leaf: one of each
    size. A cell computes one part of the batch at a time."""
    own_leaves = config.train.reduction_leaves // config.resilience.cells // layout.dp
    return max(0, own_leaves.bit_length() - 1)


def _kept_gradients(config: Config, *sizes: int) -> int:
    """Return the bytes of host memory that a cell keeps until an update is made: the gradient of its own part of the
    batch, where it computes another one that a lost cell has left, as long as half of the cells are there."""
    pinned = {_pinned(size) for size in sizes}  # actor and critic train in turn, and share memory of the same size
    return sum(pinned) if config.resilience.cells > 1 else 0


def _pinned(nbytes: int) -> int:
    """Return the bytes that torch allocates for pinned memory: it rounds up to a power of two."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


def local_parameters(family: Family, layout: ParallelLayout, s: dict[str, Any]) -> list[Elements]:
    """Return the parameters of one rank of each pipeline stage."""
    counts, last = layers_per_stage(family.num_layers, layout.pp, s), layout.pp - 1
    stage_of = [stage for stage, count in enumerate(counts) for _ in range(count)]
    stages = [Elements(0)] * layout.pp
    for stage, layer in zip(stage_of, family.held(Sizes(layout.tp, layout.etp, layout.ep))):
        stages[stage] = stages[stage].plus(layer)
    for name, elements in _outside(family, layout.tp):
        first = name == EMBEDDING
        on = ({0, last} if family.tied_embeddings else {0}) if first else {last}
        for stage in on:
            stages[stage] = stages[stage].plus(Elements(elements))
    return stages


def _outside(family: Family, tp: int) -> Iterator[tuple[str, int]]:
    """Yield what one of ``tp`` ranks holds of the tensors that belong to no layer; a vocabulary is split."""
    for name, shape in family.outside.items():
        yield name, -(-shape[0] // tp) * shape[1] if name in (EMBEDDING, HEAD) else prod(shape)


def _fp8_copies(family: Family, layout: ParallelLayout, s: dict[str, Any]) -> int:
    """Return the bytes of two FP8 copies of each matrix, one transposed, which are kept from step to step."""
    if not s["fp8"] or s["transformer_impl"] != "transformer_engine" or s["disable_parameter_transpose_cache"]:
        return 0
    layers = layers_per_stage(family.num_layers, layout.pp, s)[0]
    matrices = [shape for layer in family.layers[:layers] for shape in layer.tensors.values() if len(shape) > 1]
    return 2 * sum(map(prod, matrices)) // layout.tp


def layers_per_stage(num_layers: int, stages: int, s: dict[str, Any]) -> list[int]:
    """Even, but for Megatron's settings of the first and the last stage."""
    ends = {0: s["num_layers_in_first_pipeline_stage"], stages - 1: s["num_layers_in_last_pipeline_stage"]}
    given = {stage: layers for stage, layers in ends.items() if layers is not None}
    rest = stages - len(given)
    even = (num_layers - sum(given.values())) // rest if rest else 0
    return [given.get(stage, even) for stage in range(stages)]


def _engine_parameters(family: Family, tp: int) -> int:
    layers = family.held(Sizes(tp, engine=True))
    vocabulary = tp if family.sglang_splits_vocabulary else 1
    return sum(map(sum, layers)) + sum(elements for _, elements in _outside(family, vocabulary))


def _kv_bytes(family: Family, tp: int, bytes_each: int) -> int:
    """Return the bytes of a token's keys and values on one rank of an engine."""
    return family.cached(tp) * bytes_each


def _head_bytes(tokens: int, family: Family, tp: int, bytes_each: int) -> int:
    """Return the bytes of a chunk's logits, cut as in training/output_layer.py, and of the output weight's gradient,
    which is summed in fp32 where there are several chunks."""
    logits, limit = tokens * family.vocab_size // tp * bytes_each, MAX_LOGITS * (bytes_each + 2 * FP32)
    gradient = family.vocab_size * family.hidden_size // tp * (bytes_each if logits <= limit else FP32)
    return min(logits, limit) + gradient


def _activations(config: Config, family: Family, layout: ParallelLayout, s: dict[str, Any]) -> int:
    """Return the elements kept for the backward pass on the first stage, which has the most micro-batches under way."""
    count = layers_per_stage(family.num_layers, layout.pp, s)[0]
    split_input = family.hidden_size // (layout.tp if layout.sequence_parallel else 1)
    sizes, recomputes = Sizes(layout.tp, layout.etp, layout.ep), s["transformer_impl"] == "local"
    layers = [layer.activations(sizes, recomputes, split_input) for layer in family.layers[:count]]
    kept, working = sum(layers), 0  # of each micro-batch under way; of the one whose backward pass runs
    if s["recompute_granularity"] == "full":
        number = min(s["recompute_num_layers"] or 1, count)
        if s["recompute_method"] == "block":  # the first layers run again, one by one, when the others are done with
            kept = number * split_input + max(sum(layers[number:]), max(layers))
        else:  # groups of layers run again together
            kept, working = -(-count // number) * split_input, number * max(layers)
    return config.train.max_tokens_per_gpu * (kept * layout.pp + working)


# --- KV cache --------------------------------------------------------------------------------------------------------

MOST_REQUESTS = 4096  # SGLang's default limit of running requests
SPARE_TOKENS = 256  # SGLang admits a request only with a page more than it fills


def needed_tokens(config: Config, engine_ranks: int) -> int | None:
    """Return the tokens that one of the engines of ``engine_ranks`` ranks needs for the larger of rollout and
    evaluation: as many sequences as run at a time, each of the maximum length, in whole pages. None where the user has
    set the size of the cache.

    Without ``rollout_max_prompt_len`` a sequence may be as long as a micro-batch, or as the context.
    """
    s = settings(config)
    if s["mem_fraction_static"] is not None or s["max_total_tokens"] is not None:
        return None
    page, engines = s["page_size"] or 1, engine_ranks // s["tp_size"]
    prompt, r = config.data.rollout_max_prompt_len, config.rollout

    def need(prompts: int, samples: int, response: int, longest: int) -> int:
        requests = min(ceil(prompts / engines) * samples, s["max_running_requests"] or MOST_REQUESTS)
        length = longest if prompt is None else min(prompt + response, longest)
        return requests * (ceil(length / page) + 1) * page

    needs = [0]
    context = load_family(config.model.hf_checkpoint).max_sequence_length
    if config.run.mode == "rl":
        longest = min(context, config.micro_batch_tokens)  # what is trained on fits a micro-batch
        needs.append(need(r.rollout_batch_size, r.n_samples_per_prompt, r.rollout_max_response_len, longest))
    for one in config.eval_sets:
        if one.eval_interval:
            rows = _rows(one.prompt_data)
            needs.append(need(rows, one.n_samples_per_eval_prompt or 1, one.eval_max_response_len or 0, context))
    return max(needs) + SPARE_TOKENS


def _rows(source: str) -> int:
    """Return the number of rows of a dataset; 0 where it cannot be read, which the controller reports."""
    try:
        return sum(1 for _ in read_rows(source, []))
    except (OSError, DataError):
        return 0
