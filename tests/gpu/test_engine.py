"""SGLang on a GPU in fp32, by the checks that every engine has to pass, and the noise it draws with."""

from __future__ import annotations

import math
import traceback
from pathlib import Path

import torch

from tests.generation import conformance
from tests.gpu.machine import ENGINE, needs
from tests.ranks import Ranks

# Not among them: batch mates change a log-prob's last bits on a GPU (seeds), memory is not the CPU's (memory).
CHECKS = (
    conformance.log_probs,
    conformance.truncation,
    conformance.stopping,
    conformance.end_of_sequence,
    conformance.refusals,
    conformance.aborting,
    conformance.refitting,
    conformance.versions,
    conformance.not_finite,
)


def failed_checks(folders: list[Path]) -> str:
    failures = ""
    with conformance.engine_of("sglang", folders[0], **ENGINE) as engine:
        for check in CHECKS:
            conformance.refit(engine, folders[0], 0)
            try:
                check(engine, folders)
            except Exception:
                failures += f"{check.__name__}: {traceback.format_exc()}\n"
    return failures


@needs(1)
def test_engine(ranks: Ranks, folders: list[Path]) -> None:
    (failures,) = ranks.run(1, failed_checks, folders)
    assert not failures, failures


def continued(folders: list[Path]) -> int:
    from miles_spmd.generation.sglang.engine import SglangEngine

    engine = SglangEngine(folders[0], dtype="bfloat16", server_args=ENGINE, invariant=True)
    try:
        conformance.refit(engine, folders[0], 0)
        outputs = conformance.continuing(engine, folders)
    finally:
        engine.close()
    return sum(len(output.output_ids) for output in outputs.values())


@needs(1)
def test_responses_continue_bitwise(ranks: Ranks, folders: list[Path]) -> None:
    """With batch-invariant operators, keys and values of tokens are the same when they are computed again."""
    (tokens,) = ranks.run(1, continued, folders)
    assert tokens > 200


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, categories: int) -> torch.Tensor:
    """Return standard Gumbel noise, float64 [rows, categories], from a 32-bit hash of seed, position and category: what
    ``sample`` adds to log-probs on a GPU, where a kernel computes it without storing it."""
    from sglang.kernels.ops.sampling.murmur_hash import murmur_hash32

    hashes = murmur_hash32(seeds.to(torch.uint64), positions, torch.arange(categories, device=seeds.device))
    return hashes.to(torch.float64).add_(0.5).mul_(2.0**-32).log_().neg_().log_().neg_()


def noise() -> None:
    from miles_spmd.generation.sglang.sampler import sample

    n = 200_000
    probs = torch.tensor([0.5, 0.0, 0.25, 0.125, 0.1, 0.0249, 0.0001], device="cuda")
    log_probs = probs.log().expand(n, -1)
    same, counting = torch.full((n,), 123, device="cuda"), torch.arange(n, device="cuda")
    for seeds, positions in [(same, counting), (counting, same), (counting << 40, same)]:
        counts = torch.bincount(sample(log_probs, seeds, positions), minlength=len(probs))
        assert counts[1] == 0
        error = (counts / n - probs).abs()
        assert (error <= 4.5 * (probs * (1 - probs) / n).sqrt()).all()

    for rows, categories in [(300, 151_936), (3, 1000)]:  # the kernel samples what the tensor operations sample
        log_probs = torch.randn(rows, categories, device="cuda").mul_(3).log_softmax(-1)
        log_probs[1, 5:] = -math.inf
        seeds = torch.randint(2**63 - 1, (rows,), device="cuda")
        positions = torch.randint(2**20, (rows,), device="cuda")
        reference = gumbel_noise(seeds, positions, categories).add_(log_probs).argmax(-1)
        assert torch.equal(sample(log_probs, seeds, positions), reference)
    log_probs[2, 3] = math.nan
    assert 0 <= sample(log_probs, seeds, positions)[2] < categories

    # every 32-bit hash comes eight times on average, the largest too
    rows, categories = 2**10, 2**17
    for block in range(2**35 // (rows * categories)):
        seeds = torch.arange(block * rows, (block + 1) * rows, device="cuda")
        assert gumbel_noise(seeds, torch.zeros_like(seeds), categories).abs().max() < math.log(2**33) + 1


@needs(1)
def test_noise_is_finite_and_gumbel(ranks: Ranks) -> None:
    ranks.run(1, noise)
