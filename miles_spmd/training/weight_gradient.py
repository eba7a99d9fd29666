"""Gradients of weights, added to their buffer by the matrix product that computes them, rounded once.

Importing this file puts it in the place of Apex's extension, which Megatron's linears call with
``gradient_accumulation_fusion``.
"""

from __future__ import annotations

import sys

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor


def add_product(inputs_TI: Tensor, gradient_TO: Tensor, total_OI: Tensor) -> None:
    """Compute total += gradient^T inputs; ``total`` is fp32 or has the dtype of the factors. T tokens, I inputs of the
    linear, O outputs."""
    if total_OI.dtype == inputs_TI.dtype:
        total_OI.addmm_(gradient_TO.T, inputs_TI)
    else:
        torch.addmm(total_OI, gradient_TO.T, inputs_TI, out_dtype=total_OI.dtype, out=total_OI)


wgrad_gemm_accum_fp32 = wgrad_gemm_accum_fp16 = add_product  # Apex's names
layers.fused_weight_gradient_mlp_cuda = sys.modules[__name__]
layers._grad_accum_fusion_available = True
