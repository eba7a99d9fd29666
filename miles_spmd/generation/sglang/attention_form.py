"""What a layer of SGLang's models attends to, in the terms of :mod:`miles_spmd.invariant`."""

from __future__ import annotations

from sglang.srt.layers.radix_attention import RadixAttention

from miles_spmd.models.attention import Form


def form_of(layer: RadixAttention) -> Form:
    """Return the form of ``layer``, whose window counts the keys before a query; -1 or None: there is none."""
    before = layer.sliding_window_size
    return Form(before + 1 if before is not None and before >= 0 else 0, layer.logit_cap or 0.0)
