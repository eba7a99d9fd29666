"""Llama 2 and 3 dense models; 3.1 and later scale the rotary frequencies (rope type llama3)."""

from __future__ import annotations

from miles_spmd.models.family import Family


class Llama(Family):
    model_type = "llama"
    rope_types = ("default", "llama3")
