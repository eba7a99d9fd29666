"""Gradients of weights added to what is there by the product that makes them, rounded once.

Stands in for Apex's extension, which Megatron's own linears ask for with ``gradient_accumulation_fusion``.
"""

from __future__ import annotations

import sys

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor


def add_product(inputs_TI: Tensor, gradient_TO: Tensor, total_OI: Tensor) -> None:
    """total += gradient^T inputs; ``total`` in fp32 or the dtype of the factors."""
    if total_OI.dtype == inputs_TI.dtype:
        total_OI.addmm_(gradient_TO.T, inputs_TI)
    else:
        torch.addmm(total_OI, gradient_TO.T, inputs_TI, out_dtype=total_OI.dtype, out=total_OI)


wgrad_gemm_accum_fp32 = wgrad_gemm_accum_fp16 = add_product
layers.fused_weight_gradient_mlp_cuda = sys.modules[__name__]
layers._grad_accum_fusion_available = True
