"""Numbers that carry their gradient: exact derivatives of the oracle's loops without torch's autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Dual:
    value: float
    slopes: tuple[float, ...] = ()  # one per variable; () is a constant

    def _with(self, value: float, factor: float) -> Dual:
        return Dual(value, tuple(factor * s for s in self.slopes))

    def __add__(self, other: Dual | float) -> Dual:
        if not isinstance(other, Dual):
            return self._with(self.value + other, 1.0)
        if not self.slopes or not other.slopes:
            return Dual(self.value + other.value, self.slopes or other.slopes)
        return Dual(self.value + other.value, tuple(a + b for a, b in zip(self.slopes, other.slopes)))

    def __mul__(self, other: Dual | float) -> Dual:
        if not isinstance(other, Dual):
            return self._with(self.value * other, other)
        value = self.value * other.value
        return Dual(value) + self._with(0.0, other.value) + other._with(0.0, self.value)

    def __neg__(self) -> Dual:
        return self * -1.0

    def __sub__(self, other: Dual | float) -> Dual:
        return self + -other

    __radd__, __rmul__ = __add__, __mul__

    def exp(self) -> Dual:
        return self._with(math.exp(self.value), math.exp(self.value))

    def log(self) -> Dual:
        return self._with(math.log(self.value), 1 / self.value)

    def clamp(self, low: float, high: float) -> Dual:
        return self if low <= self.value <= high else Dual(min(max(self.value, low), high))

    def constant(self) -> Dual:
        return Dual(self.value)


def larger(a: Dual, b: Dual) -> Dual:
    return a if a.value > b.value else b


def smaller(a: Dual, b: Dual) -> Dual:
    return a if a.value < b.value else b


def total(terms: Sequence[Dual]) -> Dual:
    out = Dual(0.0)
    for term in terms:
        out = out + term
    return out


def variables(values: Sequence[float]) -> list[Dual]:
    return [Dual(v, tuple(float(i == j) for j in range(len(values)))) for i, v in enumerate(values)]


def log_softmax(logits: Sequence[Dual]) -> list[Dual]:
    peak = max(x.value for x in logits)
    log_sum = total([(x - peak).exp() for x in logits]).log() + peak
    return [x - log_sum for x in logits]
