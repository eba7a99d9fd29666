"""Qwen2 and Qwen2.5 dense models: biases on query, key and value projections."""

from __future__ import annotations

from miles_spmd.models.family import Family


class Qwen2(Family):
    model_type = "qwen2"
    qkv_bias = True
