"""Frequencies of rotary positions and tables of their cosines and sines, which trainer and engine share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from miles_spmd.models.rope import Rope


def frequencies(rope: Rope, context: int) -> Tensor:
    """Return the angles of neighbouring places, in radians: fp32 [rotary_dim / 2], on the CPU, so that they are those
    of transformers, bitwise, whatever the device.

    ``context``: the longest sequence of the run. Kinds that depend on the length of a sequence have the frequencies of
    a sequence of that length; see :class:`~miles_spmd.models.rope.Rope`.
    """
    width, theta = rope.rotary_dim, rope.theta
    if rope.kind == "dynamic":
        longest = max(context, rope.original_length)
        growth = rope.factor * longest / rope.original_length - (rope.factor - 1)
        theta *= growth ** (width / (width - 2))
    # of a pair's full turn; transformers' functions divide in this order, which rounds otherwise than a product would
    periods = theta ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)
    match rope.kind:
        case "linear":
            return 1.0 / periods / rope.factor
        case "llama3":
            return _llama3(rope, 1.0 / periods)
        case "yarn":
            return _yarn(rope, periods)
        case "longrope":
            factors = rope.long_factor if context > rope.original_length else rope.short_factor
            return 1.0 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * periods)
    return 1.0 / periods


def rotary_table(frequencies: Tensor, length: int, factor: float = 1.0) -> Tensor:
    """Return cosines, then sines, of the angles of places 0 .. ``length - 1``, times ``factor``: fp32 [length, D], on
    the device of ``frequencies``, fp32 [D / 2] in radians per place."""
    places = torch.arange(length, dtype=torch.float32, device=frequencies.device)
    angles = torch.outer(places, frequencies)
    table = torch.cat([angles.cos(), angles.sin()], -1)
    return table if factor == 1 else table.mul_(factor)


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    """Divide low frequencies by the factor and leave high ones alone, with a linear transition between the two."""
    turns = rope.original_length / (2 * math.pi / plain)  # in the original length
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / plain
    smooth = (turns - low) / (high - low)
    between = (1 - smooth) * plain / rope.factor + smooth * plain
    scaled = torch.where(wavelength > rope.original_length / low, plain / rope.factor, between)
    return torch.where(wavelength < rope.original_length / high, plain, scaled)


def _yarn(rope: Rope, periods: Tensor) -> Tensor:
    """Divide frequencies by the factor where few turns fit into the original length, and leave those of many turns
    alone, with a linear transition between the two (https://arxiv.org/abs/2309.00071)."""
    width = rope.rotary_dim

    def dimension(turns: float) -> float:
        """Return the dimension that makes so many turns."""
        return width * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(width // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp_(0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * periods) * (1 - kept) + 1.0 / periods * kept
