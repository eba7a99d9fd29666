"""What a training step has to compute, and what a GPU can."""

from __future__ import annotations

from miles_spmd.models import Family

# Dense bf16 TFLOP/s by the vendors' data sheets, by a part of the device's name.
PEAK = {"H100": 989.0, "H200": 989.0, "A100": 312.0}


def sequence_flops(family: Family, tokens: int) -> float:
    """Of forward and backward pass of one sequence, nothing recomputed: 6 for every parameter that multiplies a token,
    and causal attention's two products of half a square, three times."""
    embedding = 0 if family.tied_embeddings else family.vocab_size * family.hidden_size  # is looked up
    matrices = 6.0 * (family.num_active_parameters() - embedding) * tokens
    return matrices + 6.0 * family.num_layers * family.num_heads * family.head_dim * tokens**2


def peak_tflops(device: str) -> float:
    """NaN where it is not known."""
    return next((peak for part, peak in PEAK.items() if part in device), float("nan"))
