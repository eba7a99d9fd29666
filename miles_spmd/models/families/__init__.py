"""The model families, each a short file: which blocks its layers have, and which fields of config.json decide it."""

from __future__ import annotations

from miles_spmd.models.families.llama import Llama
from miles_spmd.models.families.qwen import Qwen2, Qwen3, Qwen3Moe
from miles_spmd.models.family import Family

FAMILIES: dict[str, type[Family]] = {family.model_type: family for family in (Llama, Qwen2, Qwen3, Qwen3Moe)}
