"""Random weights as a function of name and position: a rank computes its own slices only, on its own device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import torch

CHUNK = 1 << 24  # elements that are computed at a time; each needs three temporary words of 8 bytes


class RandomTensor:
    """A tensor in which every element is a function of the tensor's name and the element's position.

    Norms have the value ``norm`` and biases 0, as in a new model; all other tensors are uniform with standard deviation
    ``std``.
    """

    def __init__(self, name: str, shape: tuple[int, ...], std: float, device: torch.device, norm: float) -> None:
        self.name, self.shape, self.std, self.device, self.norm = name, shape, std, device, norm

    def __getitem__(self, region: tuple[slice, ...]) -> torch.Tensor:
        """Return the rectangle in fp32, on the device."""
        shape = [at.stop - at.start for at in region]
        if len(shape) == 1:
            return torch.full(shape, 0.0 if self.name.endswith("bias") else self.norm, device=self.device)
        rows, columns = region
        seed = int.from_bytes(blake2b(self.name.encode(), digest_size=8).digest(), "little", signed=True)
        column = torch.arange(columns.start, columns.stop, device=self.device)
        values = torch.empty(shape, device=self.device)
        each = max(1, CHUNK // shape[1])
        for first in range(0, shape[0], each):
            part = values[first : first + each]
            row = torch.arange(rows.start + first, rows.start + first + len(part), device=self.device)
            positions = row[:, None] * self.shape[1] + column
            part.copy_(_mix(positions.mul_(_GOLDEN).add_(seed)) >> 40 & 0xFFFFFF)
        # 24 bits are exact in fp32; the width of a uniform distribution is sqrt(12) standard deviations
        return values.add_(0.5 - 2**23).mul_(2**-24 * self.std * math.sqrt(12))


def random_slices(
    shapes: Mapping[str, tuple[int, ...]], std: float, device: torch.device, norm: float = 1.0
) -> dict[str, Any]:
    """Return random tensors by name, which are indexed as the lazy slices of a safetensors file."""
    return {name: RandomTensor(name, shape, std, device, norm) for name, shape in shapes.items()}


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Apply SplitMix64's finaliser in place. Its shifts are logical; torch's copy the sign, which the masks remove."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> shift & (1 << 64 - shift) - 1
        x *= factor - (1 << 64)
    x ^= x >> 31 & (1 << 33) - 1
    return x


_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
