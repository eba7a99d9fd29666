"""Megatron's optimizer and learning-rate schedule, and the update, which is skipped where the gradient is not
finite."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from miles_spmd.config import Config
from miles_spmd.training.megatron_config import MegatronConfig

# Where Transformer Engine is installed Megatron takes its optimizers, even for local layers. Updates and checkpoints
# must not depend on what is installed.
megatron_optimizer.Adam, megatron_optimizer.SGD = torch.optim.AdamW, torch.optim.SGD
megatron_optimizer.USING_PYTORCH_OPTIMIZER = True


def build_optimizer(megatron: MegatronConfig, chunks: list[DistributedDataParallel]) -> ChainedOptimizer:
    """Return Megatron's optimizer over ``chunks``. Main parameters are copies of the present weights."""
    optimizer = get_megatron_optimizer(megatron.optimizer, chunks)
    for inner in inner_optimizers(optimizer):
        if isinstance(inner.optimizer, torch.optim.AdamW | torch.optim.Adam):
            _prepare(inner.optimizer)
        elif isinstance(inner.optimizer, torch.optim.SGD):
            _prepare_sgd(inner.optimizer)
    return optimizer


def inner_optimizers(optimizer: ChainedOptimizer) -> list[MegatronOptimizer]:
    """Return the optimizers of dense and of expert parameters, if they have parameters on this rank."""
    return [inner for inner in optimizer.chained_optimizers if not inner.is_stub_optimizer]


class Share(NamedTuple):
    """The elements [start, stop) of a parameter that this rank updates, and the optimizer's own tensor for them."""

    start: int
    stop: int
    optimizer: MegatronOptimizer
    main: Tensor

    @property
    def state(self) -> dict[str, Tensor]:
        """The optimizer's state that has the shape of ``main``, by kind."""
        state = self.optimizer.optimizer.state[self.main]
        return {kind: value for kind, value in state.items() if torch.is_tensor(value) and value.dim()}


def shares(parameters: Iterable[torch.nn.Parameter], optimizer: ChainedOptimizer) -> dict[torch.nn.Parameter, Share]:
    """Return this rank's share of every parameter that it updates.

    A distributed optimizer has a range of a parameter and its own tensor for it. Other optimizers have whole
    parameters: the fp32 copies of 16-bit ones (``main_param``), or the parameters themselves.
    """
    found = {}
    whole: dict[int, MegatronOptimizer] = {}  # optimizers of whole parameters, by the id of the tensor that they update
    for inner in inner_optimizers(optimizer):
        if isinstance(inner, DistributedOptimizer):
            for parameter, (group, place) in inner.model_param_group_index_map.items():
                where = inner._get_model_param_range_map(parameter)["param"]
                main = inner.optimizer.param_groups[group]["params"][place]
                found[parameter] = Share(where.start, where.end, inner, main)
        else:
            whole |= {id(main): inner for main in inner.get_parameters()}
    for parameter in parameters:
        main = getattr(parameter, "main_param", parameter)
        if id(main) in whole:
            found[parameter] = Share(0, parameter.numel(), whole[id(main)], main)
    return found


def _prepare(adam: torch.optim.Optimizer) -> None:
    """Use the fused kernel, for Megatron configures torch's Adam in its slowest form, a loop of small operations for
    every parameter; and set moments of zero and step 0, as the first update would. A checkpoint can then be loaded
    into, or saved from, an optimizer that has made no update: Megatron's distributed optimizer requires a step in every
    state."""
    for group in adam.param_groups:
        group["fused"], group["foreach"] = True, False
        for parameter in group["params"]:
            adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _prepare_sgd(sgd: torch.optim.SGD) -> None:
    """Set momenta of zero, with which the first update is that without any: what a checkpoint has never changes."""
    for group in sgd.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            sgd.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}


def build_schedule(config: Config, megatron: MegatronConfig, optimizer: ChainedOptimizer) -> OptimizerParamScheduler:
    """Return the schedule: linear warm-up of n updates from lr / (n + 1) to lr n / (n + 1), because an update with a
    learning rate of 0 would be wasted; then constant, linear or cosine decay from lr to ``min_lr`` at the run's last
    planned update. Raises ValueError for a warm-up that is as long as the run."""
    train = config.train
    updates = planned_updates(config)
    if train.lr_warmup_iters >= updates:
        raise ValueError(f"lr_warmup_iters {train.lr_warmup_iters} must be smaller than the run's {updates} updates")
    return OptimizerParamScheduler(
        optimizer,
        init_lr=megatron.optimizer.lr / (train.lr_warmup_iters + 1),
        max_lr=megatron.optimizer.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=train.lr_warmup_iters,
        lr_decay_steps=updates,
        lr_decay_style=train.lr_decay_style,
        start_wd=megatron.optimizer.weight_decay,
        end_wd=megatron.optimizer.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def planned_updates(config: Config) -> int:
    """Return the number of optimizer steps of the whole run."""
    run, train = config.run, config.train
    if run.mode != "rl":
        return run.num_rollout
    samples = config.rollout.rollout_batch_size * config.rollout.n_samples_per_prompt
    rollouts = run.num_rollout - (train.num_critic_only_steps if config.has_critic else 0)
    return rollouts * math.ceil(samples / (train.global_batch_size or samples))


@torch.no_grad()
def update(optimizer: ChainedOptimizer) -> tuple[float, bool]:
    """Clip the gradient and make one update, unless the gradient is not finite. Return its norm before clipping, and
    whether there was an update.

    The norm covers all ranks that hold parts of the model, and data-parallel ranks hold the same sum, so every rank
    comes to the same decision. A skipped update changes neither weights nor moments.
    """
    found_inf = optimizer.prepare_grads()
    norm = _gradient_norm(optimizer)
    if found_inf or not math.isfinite(norm):
        return norm, False
    if 0 < optimizer.config.clip_grad < norm:
        for inner in inner_optimizers(optimizer):
            gradients = [p.grad for p in inner.get_parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, optimizer.config.clip_grad / norm)
    optimizer.step_with_ready_grads()
    return norm, True


def _gradient_norm(optimizer: ChainedOptimizer) -> float:
    """Return the norm over all ranks' parts of the model; inf beyond 2e19.

    The reduction order depends on which rank holds what. Squares are therefore summed in double precision and the sum
    is rounded to single, so that the order changes one of many millions of norms.
    """
    total = 0.0
    # also those without parameters on this rank: other ranks wait in the all-reduce
    for inner in optimizer.chained_optimizers:
        gradients = inner.get_grads_for_grad_norm()
        norms = list(torch._foreach_norm(gradients, dtype=torch.float64)) if gradients else []
        device = "cuda" if torch.cuda.is_available() else "cpu"
        squares = torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64, device=device)
        dist.all_reduce(squares, group=inner.get_grad_stats_parallel_group())
        total += squares.item()
    return math.sqrt(torch.tensor(total, dtype=torch.float32).item())
