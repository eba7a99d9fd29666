"""Megatron's optimizer and learning-rate schedule, and the one update that may be refused."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from miles_spmd.config import Config
from miles_spmd.training.settings import Settings

# Where Transformer Engine is installed Megatron takes its optimizers, even for layers that have nothing to do with it.
# Updates and checkpoints shall not depend on what is installed.
megatron_optimizer.Adam, megatron_optimizer.SGD = torch.optim.AdamW, torch.optim.SGD
megatron_optimizer.USING_PYTORCH_OPTIMIZER = True


def build_optimizer(settings: Settings, chunks: list[DistributedDataParallel]) -> ChainedOptimizer:
    """Megatron's optimizer over ``chunks``. Main parameters are copies of the weights of this moment."""
    optimizer = get_megatron_optimizer(settings.optimizer, chunks)
    for inner in parts(optimizer):
        if isinstance(inner.optimizer, torch.optim.AdamW | torch.optim.Adam):
            _use_fused_kernel(inner.optimizer)
            _allocate_state(inner.optimizer)
    return optimizer


def parts(optimizer: ChainedOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of dense and of expert parameters that have parameters on this rank."""
    return [inner for inner in optimizer.chained_optimizers if not inner.is_stub_optimizer]


def _use_fused_kernel(adam: torch.optim.Optimizer) -> None:
    """Without Transformer Engine Megatron makes torch's Adam in its slowest form, a loop of small operations."""
    for group in adam.param_groups:
        group["fused"], group["foreach"] = True, False


def _allocate_state(adam: torch.optim.Optimizer) -> None:
    """Moments of zero and step 0, as the first update would make them. A checkpoint can then be loaded into, or saved
    from, an optimizer that has made no update: Megatron's distributed optimizer needs a step in every state."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def build_schedule(config: Config, settings: Settings, optimizer: ChainedOptimizer) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then constant, linear or cosine decay to ``min_lr`` at the run's last planned update."""
    train = config.train
    updates = planned_updates(config)
    if train.lr_warmup_iters >= updates:
        raise ValueError(f"lr_warmup_iters {train.lr_warmup_iters} must be smaller than the run's {updates} updates")
    weight_decay = settings.optimizer.weight_decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.optimizer.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=train.lr_warmup_iters,
        lr_decay_steps=updates,
        lr_decay_style=train.lr_decay_style,
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def planned_updates(config: Config) -> int:
    """Optimizer steps of the whole run."""
    run, train = config.run, config.train
    if run.mode != "rl":
        return run.num_rollout
    samples = config.rollout.rollout_batch_size * config.rollout.n_samples_per_prompt
    rollouts = run.num_rollout - (train.num_critic_only_steps if config.has_critic else 0)
    return rollouts * math.ceil(samples / (train.global_batch_size or samples))


@torch.no_grad()
def update(optimizer: ChainedOptimizer) -> tuple[float, bool]:
    """Clip the gradient and make one update, unless it is not finite. Returns its norm and whether there was an update.

    The norm covers all ranks that hold parts of the model, and data-parallel ranks hold the same sum, so every rank
    comes to the same decision. A refused update changes neither weights nor moments.
    """
    found_inf = optimizer.prepare_grads()
    norm = _gradient_norm(optimizer)
    if found_inf or not math.isfinite(norm):
        return norm, False
    if 0 < optimizer.config.clip_grad < norm:
        for inner in parts(optimizer):
            gradients = [p.grad for p in inner.get_parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, optimizer.config.clip_grad / norm)
    optimizer.step_with_ready_grads()
    return norm, True


def _gradient_norm(optimizer: ChainedOptimizer) -> float:
    """Of all ranks' parts of the model. Squares are added up in double precision and their sum is rounded to single: in
    which order that was, which depends on who holds what, shows in one of many millions of norms. inf beyond 2e19."""
    total = 0.0
    for inner in optimizer.chained_optimizers:  # one without parameters here, too, for the other ranks wait
        gradients = inner.get_main_grads_for_grad_norm()
        norms = list(torch._foreach_norm(gradients, dtype=torch.float64)) if gradients else []
        device = "cuda" if torch.cuda.is_available() else "cpu"
        squares = torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64, device=device)
        dist.all_reduce(squares, group=inner.get_grad_stats_parallel_group())
        total += squares.item()
    return math.sqrt(torch.tensor(total, dtype=torch.float32).item())
