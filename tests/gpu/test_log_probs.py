"""The head on a GPU, where kernels read the logits and 16-bit products of chunks are summed in another way."""

from __future__ import annotations

import pytest
import torch

from miles_spmd.training import output_layer
from miles_spmd.training.log_probs import Distribution, linear_log_probs
from miles_spmd.training.output_layer import OutputLayer
from tests.gpu.machine import needs
from tests.training.test_log_probs import (
    CASES,
    THREE_ROWS,
    actual,
    assert_close,
    bf16_gradients_of_weight,
    case,
    expected,
    relative_error,
)


@needs(1)
def test_chunks_add_no_rounding() -> None:
    whole, chunked, exact = bf16_gradients_of_weight("cuda")
    assert relative_error(chunked, exact) <= 2**-7  # of the factors, and of the sum
    assert relative_error(whole, exact) <= 2**-7


@needs(1)
def test_values_and_gradients() -> None:
    on_gpu = tuple(tensor.cuda() for tensor in case())
    for distribution, with_entropy, max_logits in CASES:
        found = actual(on_gpu, distribution, with_entropy, max_logits)
        assert_close([x.cpu() for x in found], expected(case(), distribution, with_entropy), 3e-6)


@needs(1)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocabulary", [151_936 // 16, 5003, 1000, 18])
def test_log_probs_are_the_engines(vocabulary: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise equal to SGLang's batch-invariant kernel over the same logits, in one chunk and in many."""
    from sglang.srt.batch_invariant_ops.batch_invariant_ops import log_softmax

    logits = (4 * torch.randn(300, vocabulary, device="cuda")).bfloat16()
    targets = torch.randint(vocabulary, (300,), device="cuda")
    expected_log_probs = log_softmax(logits.float() / logits.new_full((), temperature, dtype=torch.float32)).gather(
        1, targets[:, None]
    )[:, 0]
    identity = torch.eye(vocabulary, dtype=torch.bfloat16, device="cuda")
    for max_logits in (2**27, THREE_ROWS * vocabulary):
        monkeypatch.setattr(output_layer, "MAX_LOGITS", max_logits)
        distribution = Distribution(temperature)
        log_probs, _ = linear_log_probs(logits, OutputLayer(identity, vocabulary), targets, distribution)
        assert torch.equal(log_probs, expected_log_probs)


@needs(1)
def test_a_second_backward_pass_gives_the_same() -> None:
    """Though the first has overwritten the logits that were kept."""
    hidden, weight, targets, *_ = (tensor.cuda() for tensor in case(torch.bfloat16))
    hidden.requires_grad_()
    log_probs, _ = linear_log_probs(hidden, OutputLayer(weight, len(weight)), targets, Distribution())
    first, second = (torch.autograd.grad(log_probs.sum(), hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
