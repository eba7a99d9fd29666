"""Stub of ``sgl_kernel``, SGLang's compiled kernels, which have no CPU build on the package index.

SGLang imports many names from it but calls only :func:`assign_req_to_token_pool_cpu` on the paths used here. Every
other name is a function that raises NotImplementedError, so that a path that needs a real kernel fails at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

__version__ = "0.0.0"


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
) -> None:
    """Write each request's newly allocated cache slots into its row of the request-to-token table.

    Request i gets the next ``end_offset[i] - start_offset[i]`` entries of ``out_cache_loc`` at columns
    ``start_offset[i]:end_offset[i]`` of row ``req_pool_indices[i]`` of ``req_to_token`` [requests, context].
    """
    lengths = end_offset - start_offset
    rows = req_pool_indices.repeat_interleave(lengths)
    first = lengths.cumsum(0) - lengths
    columns = torch.arange(rows.numel()) + (start_offset - first).repeat_interleave(lengths)
    req_to_token[rows.long(), columns.long()] = out_cache_loc.to(req_to_token.dtype)


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU implementation here")

    return missing
