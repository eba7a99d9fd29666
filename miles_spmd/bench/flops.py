"""FLOPs of a training step, and peak FLOP/s of GPUs."""

from __future__ import annotations

from miles_spmd.models import Family

# Part of the device's name -> dense bf16 TFLOP/s of the vendor's data sheet.
PEAK = {"H100": 989.0, "H200": 989.0, "A100": 312.0}


def sequence_flops(family: Family, tokens: int) -> float:
    """Return the FLOPs of forward and backward pass of one sequence without recomputation: 6 per token and active
    parameter, and for causal attention two products over half of the score matrix, three times."""
    embedding = 0 if family.tied_embeddings else family.vocab_size * family.hidden_size  # a lookup, not a product
    matrices = 6.0 * (family.num_active_parameters() - embedding) * tokens
    return matrices + 6.0 * family.num_layers * family.num_heads * family.head_dim * tokens**2


def peak_tflops(device: str) -> float:
    """Return the peak of the device in bf16 TFLOP/s, NaN where it is unknown."""
    return next((peak for part, peak in PEAK.items() if part in device), float("nan"))
