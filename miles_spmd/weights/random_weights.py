"""Weights made up on the spot, element by element: a rank makes its own slices only, on its own device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import torch

CHUNK = 1 << 24  # elements at a time; each takes three words of 8 bytes meanwhile


class RandomTensor:
    """A tensor of which every element is a function of the tensor's name and the element's place.

    Norms are 1 and biases 0, as a new model has them; all else is uniform with standard deviation ``std``.
    """

    def __init__(self, name: str, shape: tuple[int, ...], std: float, device: torch.device) -> None:
        self.name, self.shape, self.std, self.device = name, shape, std, device

    def __getitem__(self, region: tuple[slice, ...]) -> torch.Tensor:
        """The rectangle in fp32, on the device."""
        shape = [at.stop - at.start for at in region]
        if len(shape) == 1:
            return torch.full(shape, 0.0 if self.name.endswith("bias") else 1.0, device=self.device)
        rows, columns = region
        seed = int.from_bytes(blake2b(self.name.encode(), digest_size=8).digest(), "little", signed=True)
        column = torch.arange(columns.start, columns.stop, device=self.device)
        values = torch.empty(shape, device=self.device)
        each = max(1, CHUNK // shape[1])
        for first in range(0, shape[0], each):
            part = values[first : first + each]
            row = torch.arange(rows.start + first, rows.start + first + len(part), device=self.device)
            places = row[:, None] * self.shape[1] + column
            part.copy_(_mix(places.mul_(_GOLDEN).add_(seed)) >> 40 & 0xFFFFFF)
        return values.add_(0.5 - 2**23).mul_(2**-24 * self.std * math.sqrt(12))


def random_slices(shapes: Mapping[str, tuple[int, ...]], std: float, device: torch.device) -> dict[str, Any]:
    """To be indexed as the lazy slices of a safetensors file are."""
    return {name: RandomTensor(name, shape, std, device) for name, shape in shapes.items()}


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser, in place. Its shifts are logical; torch's copy the sign, which the masks take off."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> shift & (1 << 64 - shift) - 1
        x *= factor - (1 << 64)
    x ^= x >> 31 & (1 << 33) - 1
    return x


_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
