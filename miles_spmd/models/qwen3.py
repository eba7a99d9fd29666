"""Qwen3 dense models (Qwen3-0.6B ... 32B): queries and keys are normalised per head."""

from __future__ import annotations

from miles_spmd.models.family import Family


class Qwen3(Family):
    model_type = "qwen3"
    qk_norm = True
    required = (*Family.required, "head_dim")
