"""Matrix products of SGLang's dense layers on a CPU, made independent of how many tokens are in the batch.

A product of fewer than four rows takes another path through the BLAS library, which rounds in another way: a request
alone would give other log-probs than the same request in company.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from torch.nn.functional import pad

_ROWS = 4

_apply = UnquantizedLinearMethod.apply
_compute_lm_head = LogitsProcessor._compute_lm_head


def register() -> None:
    """Have SGLang's unquantized linear layers and output layer see at least four rows."""
    UnquantizedLinearMethod.apply = _apply_padded
    LogitsProcessor._compute_lm_head = _compute_lm_head_padded


def _apply_padded(
    method: UnquantizedLinearMethod, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return _apply(method, layer, _padded(x), bias)[: len(x)]


def _compute_lm_head_padded(
    processor: LogitsProcessor, hidden_states: torch.Tensor, lm_head: torch.nn.Module, *args: Any
) -> torch.Tensor:
    return _compute_lm_head(processor, _padded(hidden_states), lm_head, *args)[: len(hidden_states)]


def _padded(x: torch.Tensor) -> torch.Tensor:
    return pad(x, (0, 0, 0, _ROWS - len(x))) if len(x) < _ROWS else x
