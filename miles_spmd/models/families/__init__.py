"""The model families, each a short file: which blocks its layers have, and which fields of config.json decide it."""

from __future__ import annotations

from miles_spmd.models.families.gemma import Gemma2, Gemma3
from miles_spmd.models.families.glm import Glm4, Glm4Moe
from miles_spmd.models.families.llama import Llama
from miles_spmd.models.families.mistral import Mistral, Mixtral
from miles_spmd.models.families.olmo import Olmo2
from miles_spmd.models.families.phi import Phi3
from miles_spmd.models.families.qwen import Qwen2, Qwen2Moe, Qwen3, Qwen3Moe
from miles_spmd.models.family import Family

_DENSE = (Gemma2, Gemma3, Glm4, Llama, Mistral, Olmo2, Phi3, Qwen2, Qwen3)
_ROUTED = (Glm4Moe, Mixtral, Qwen2Moe, Qwen3Moe)
FAMILIES: dict[str, type[Family]] = {family.model_type: family for family in (*_DENSE, *_ROUTED)}
if len(FAMILIES) < len(_DENSE) + len(_ROUTED):
    raise ImportError("two families have the same model_type, of which one would never be found")
