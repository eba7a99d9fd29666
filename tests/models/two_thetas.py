"""A family that nobody has published: Llama with another theta in every second layer and a soft-cap of its logits."""

from __future__ import annotations

from dataclasses import replace

from miles_spmd.models.families.llama import Llama
from miles_spmd.models.rope import Rope


class TwoThetas(Llama):
    fields = ("second_theta", "logit_softcapping")

    def rope(self, number: int) -> Rope | None:
        rope = super().rope(number)
        return replace(rope, theta=self.config["second_theta"]) if rope and number % 2 else rope

    @property
    def logit_softcap(self) -> float:
        return self.config["logit_softcapping"]
