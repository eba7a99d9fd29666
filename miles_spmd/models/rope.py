"""Rotary positions of an attention layer, as a config.json describes them: one description for trainer and engine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

from miles_spmd.models.hf_config import differing_spellings, is_positive, malformed_rope, rope_parameters

_COMMON = {"rope_type", "rope_theta", "partial_rotary_factor"}
_ORIGINAL = "original_max_position_embeddings"

# By kind: the parameters that must be positive numbers, and those that may be absent or null.
_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (_ORIGINAL,),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "longrope": (_ORIGINAL,),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "attention_factor"),
}
_MAY_BE_ZERO = ("mscale", "mscale_all_dim")  # which is as if they were absent
_FACTORS = ("short_factor", "long_factor")  # of longrope: lists of a number for each frequency
KINDS = tuple(_REQUIRED)


@dataclass(frozen=True)
class Rope:
    """Rotary positions (https://arxiv.org/abs/2104.09864) of an attention layer, by the names of transformers' rotary
    parameters. Layers whose positions are equal are equal here. :mod:`miles_spmd.invariant.rope` computes the numbers.

    Two kinds depend on the length of a sequence in transformers. The keys that a decoding engine has cached cannot be
    rotated again, so trainer and engine have one set of frequencies for all sequences of a run, those that transformers
    has for a sequence as long as the run's context:

    - ``longrope``: ``short_factor`` if the context is at most ``original_length``, else ``long_factor``.
    - ``dynamic``: unscaled if the context is at most ``original_length``, which is ``max_position_embeddings``, else
      scaled for the context.

    In a context of at most ``original_length`` they are transformers' for every sequence, and therefore a model's
    context is no longer unless an engine is given a longer one. Then sequences of up to ``original_length`` tokens have
    other frequencies than in transformers, and for ``dynamic`` all that are shorter than the context. SGLang's own
    layers differ from both: those of ``dynamic`` are scaled for ``factor`` times ``original_length`` whatever the
    context, and those of ``longrope`` take ``long_factor`` for all tokens of a batch that has one behind
    ``original_length``.
    """

    theta: float
    rotary_dim: int  # how many dimensions of head_dim are rotated, its first
    kind: str = "default"
    interleaved: bool = False  # pairs are neighbours; otherwise ``rotary_dim / 2`` apart
    factor: float = 1.0
    attention_factor: float = 1.0  # of cosines and sines
    original_length: int = 0  # 0 where the kind does not depend on it
    low_freq_factor: float = 0.0  # of llama3
    high_freq_factor: float = 0.0
    beta_fast: float = 0.0  # of yarn
    beta_slow: float = 0.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()  # of longrope
    long_factor: tuple[float, ...] = ()

    @property
    def exact_length(self) -> int | None:
        """The longest context in which every sequence has transformers' frequencies; None: any context."""
        return self.original_length if self.kind in ("dynamic", "longrope") else None

    @classmethod
    def of(cls, config: dict[str, Any], head_dim: int, *, layer_type: str = "", interleaved: bool = False) -> Self:
        """Return the rotary positions of layers of ``layer_type`` (a key of ``layer_types``, where a model has
        parameters by type of layer) by the contents of a config.json without :func:`rope_problems`.

        ``interleaved``: whether the model's family rotates neighbours, of which a config.json says nothing.
        """
        rope = {name: value for name, value in rope_parameters(config, layer_type).items() if value is not None}
        kind = rope["rope_type"]
        constants: dict[str, Any] = {}
        match kind:
            case "linear" | "dynamic" | "llama3":
                constants["factor"] = float(rope["factor"])
            case "yarn" | "longrope":
                constants["factor"] = float(rope.get("factor") or config["max_position_embeddings"] / rope[_ORIGINAL])
                attention = rope.get("attention_factor")
                default = _yarn_attention if kind == "yarn" else _longrope_attention
                constants["attention_factor"] = float(
                    default(constants["factor"], rope) if attention is None else attention
                )
        match kind:
            case "llama3":
                constants |= {name: float(rope[name]) for name in ("low_freq_factor", "high_freq_factor")}
            case "yarn":
                constants |= {
                    "beta_fast": float(rope.get("beta_fast") or 32),
                    "beta_slow": float(rope.get("beta_slow") or 1),
                }
                constants |= {name: float(rope.get(name, 0)) for name in ("mscale", "mscale_all_dim")}
                constants["truncate"] = rope.get("truncate", True)
            case "longrope":
                constants |= {name: tuple(map(float, rope[name])) for name in _FACTORS}
        if kind == "dynamic":
            constants["original_length"] = config["max_position_embeddings"]
        elif _ORIGINAL in _REQUIRED[kind]:
            constants["original_length"] = rope[_ORIGINAL]
        return cls(float(rope["rope_theta"]), _rotary_dim(rope, head_dim), kind, interleaved, **constants)


def rope_problems(config: dict[str, Any], head_dim: int, *, layer_type: str = "") -> list[str]:
    """Return messages about everything in a config.json that leaves open which rotary positions were meant: unknown
    kinds and parameters, and values that are missing, malformed, or spelled twice and differently. ``head_dim``: 0 if
    it is unknown. ``layer_type``: as for :meth:`Rope.of`."""
    if malformed := malformed_rope(config, layer_type):
        return malformed
    rope, problems = rope_parameters(config, layer_type), differing_spellings(config, layer_type)
    if (kind := rope["rope_type"]) not in KINDS:
        return [*problems, f"rope type {kind!r} is not supported (supported: {', '.join(KINDS)})"]

    def is_number(name: str) -> bool:
        if is_positive(rope.get(name)) or (name in _MAY_BE_ZERO and rope[name] == 0):
            return True
        problems.append(f"{_named(name, kind)} must be a positive number, not {rope.get(name)!r}")
        return False

    optional = [name for name in _OPTIONAL.get(kind, ()) if rope.get(name) is not None]
    numbers = {name: is_number(name) for name in ("rope_theta", "partial_rotary_factor", *_REQUIRED[kind], *optional)}
    known = {*_COMMON, *_REQUIRED[kind], *_OPTIONAL.get(kind, ())}
    known |= {"longrope": set(_FACTORS), "yarn": {"truncate"}}.get(kind, set())
    if unknown := sorted(rope.keys() - known):
        problems.append(f"rope type {kind} has no {', '.join(unknown)} here; remove what has no effect on the model")
    if not numbers["partial_rotary_factor"]:
        return problems
    width = _rotary_dim(rope, head_dim)
    if head_dim and (width % 2 or not 0 < width <= head_dim):
        problems.append(
            f"partial_rotary_factor = {rope['partial_rotary_factor']} of head_dim = {head_dim} is not an even number "
            "of dimensions"
        )
    elif kind == "longrope":
        problems += _malformed_factors(rope, width // 2)
    if kind == "yarn" and "factor" not in rope:  # it may be null, for the ratio of the lengths
        problems.append(f"{_named('factor', kind)} is missing")
    if kind == "yarn" and not isinstance(rope.get("truncate", True), bool):
        problems.append(f"rope truncate must be true or false, not {rope['truncate']!r}")
    if kind == "yarn" and layer_type and not rope.get("truncate", True):
        problems.append(
            "rope truncate = false in a table by type of layer is not supported, because transformers ignores it"
        )
    if numbers.get(_ORIGINAL) and not isinstance(rope[_ORIGINAL], int):
        problems.append(f"{_named(_ORIGINAL, kind)} must be an integer, not {rope[_ORIGINAL]!r}")
    if kind == "llama3" and all(numbers.values()) and rope["low_freq_factor"] == rope["high_freq_factor"]:
        problems.append(f"rope low_freq_factor and high_freq_factor must differ, both are {rope['low_freq_factor']!r}")
    if kind == "dynamic" and width == 2:
        problems.append("rope type dynamic is not supported for 2 dimensions")
    return problems


def _malformed_factors(rope: dict[str, Any], count: int) -> list[str]:
    problems = []
    for name in _FACTORS:
        values = rope.get(name)
        if not isinstance(values, list) or not all(map(is_positive, values)):
            problems.append(f"{_named(name, 'longrope')} must be a list of positive numbers, not {values!r}")
        elif count and len(values) != count:
            problems.append(f"{_named(name, 'longrope')} has {len(values)} numbers for {count} frequencies")
    return problems


def _named(name: str, kind: str) -> str:
    return name if name in _COMMON else f"the {name} of rope type {kind}"


def _rotary_dim(rope: dict[str, Any], head_dim: int) -> int:
    return int(head_dim * rope["partial_rotary_factor"])


def _yarn_attention(factor: float, rope: dict[str, Any]) -> float:
    """The factor of https://arxiv.org/abs/2309.00071, or the ratio of two that DeepSeek-V2 has introduced."""

    def of(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return of(rope["mscale"]) / of(rope["mscale_all_dim"])
    return of(1)


def _longrope_attention(factor: float, rope: dict[str, Any]) -> float:
    """The factor of https://arxiv.org/abs/2402.13753."""
    return math.sqrt(1 + math.log(factor) / math.log(rope[_ORIGINAL])) if factor > 1 else 1.0
