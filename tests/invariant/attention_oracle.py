"""Attention of one sequence in float64, written plainly."""

from __future__ import annotations

import torch
from torch import Tensor

from miles_spmd.models.attention import PLAIN, Form


def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, form: Form = PLAIN, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the result [T, H, V], and the log of each row's sum of exponentials [H, T], from ``query`` [T, H, D], the
    sequence's last ones, ``key`` [K, G, D], ``value`` [K, G, V] and ``sinks`` [H]."""
    share, before = query.shape[1] // key.shape[1], len(key) - len(query)
    keys, values = (x.double().repeat_interleave(share, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    if form.softcap:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    last = torch.arange(before, len(key), device=key.device)[:, None]
    place = torch.arange(len(key), device=key.device)
    hidden = place > last
    if form.window:
        hidden = hidden | (place <= last - form.window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, len(query), 1)), 2)
    probabilities = scores.softmax(2)[..., : len(key)]
    return torch.einsum("hqk,khd->qhd", probabilities, values), scores.logsumexp(2)
