"""Peak FLOP/s of GPUs."""

from __future__ import annotations

# Part of the device's name -> dense bf16 TFLOP/s of the vendor's data sheet.
PEAK = {"H100": 989.0, "H200": 989.0, "A100": 312.0}


def peak_tflops(device: str) -> float:
    """Return the peak of the device in bf16 TFLOP/s, NaN where it is unknown."""
    return next((peak for part, peak in PEAK.items() if part in device), float("nan"))
