"""The head on a GPU, where 16-bit products of chunks are summed in another way than on a CPU."""

from __future__ import annotations

from tests.gpu.machine import needs
from tests.training.test_log_probs import bf16_gradients_of_weight, relative_error


@needs(1)
def test_chunks_add_no_rounding() -> None:
    whole, chunked, exact = bf16_gradients_of_weight("cuda")
    assert relative_error(chunked, exact) <= 2**-7  # of the factors, and of the sum
    assert relative_error(whole, exact) <= 2**-7
