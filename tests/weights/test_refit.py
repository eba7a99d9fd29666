"""Refit on real gloo ranks: tensors cut by hand for each trainer layout arrive as hand-cut engine tensors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from miles_spmd.models import Family, TensorLayout, load_family
from miles_spmd.models.layout import stack, whole
from miles_spmd.weights import refit as refit_module
from miles_spmd.weights.checksums import RefitError
from miles_spmd.weights.refit import Refit, RefitCounts
from tests.models import parallel, tiny
from tests.models.parallel import Trainer, trainer_rank
from tests.ranks import Ranks

BUCKET = 4096  # small enough that the tiny models fill many, and that large tensors are cut


def engine_rank(
    family: Family, state: dict[str, Tensor], tp: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], list[TensorLayout]]:
    rank = dist.get_rank() % tp
    names = parallel.sglang_names(family, "num_local_experts" in family.config)
    weights = {name: parallel.sglang_tensor(state, family, name, rank, tp).to(dtype) for name in names}
    layouts = [TensorLayout(n, family.sglang_layout(n, tuple(t.shape), rank, tp)) for n, t in weights.items()]
    return weights, layouts


def refit_twice(folder: Path, where: Trainer, engine_tp: int, dtype: torch.dtype) -> RefitCounts:
    family, state = load_family(folder), load_file(folder / "model.safetensors")
    weights, layouts = trainer_rank(family, state, where)
    expected, engine_layouts = engine_rank(family, state, engine_tp, dtype)
    engine = {name: torch.full_like(tensor, torch.nan) for name, tensor in expected.items()}
    refit = Refit(weights, layouts, engine, engine_layouts, bucket_bytes=BUCKET)
    counts = refit.run()
    for name, tensor in engine.items():
        assert torch.equal(tensor, expected[name]), name
    # again, with other weights, after both sides gave their memory back and took it again
    for tensor in (*weights.values(), *engine.values()):
        tensor.data = torch.full_like(tensor, torch.nan)
    for name, tensor in trainer_rank(family, state, where)[0].items():
        weights[name].copy_(tensor * 2)
    assert refit.run() == counts
    for name, tensor in engine.items():
        assert torch.equal(tensor, expected[name] * 2), name
    return counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("world", "name", "where", "engine_tp"),
    [
        (1, "qwen2", Trainer(), 1),
        (2, "qwen3", Trainer(), 1),
        (2, "qwen3", Trainer(tp=2), 1),
        (2, "qwen2", Trainer(), 2),
        (2, "llama", Trainer(tp=2), 2),
        (2, "qwen3-tied", Trainer(pp=2), 2),
        (2, "qwen3-tied", Trainer(pp=2, vpp=2), 1),
        (2, "qwen3_moe", Trainer(ep=2), 1),
        (2, "qwen3_moe", Trainer(tp=2, ep=2), 2),
        (4, "qwen3", Trainer(tp=4), 1),
        (4, "qwen2", Trainer(tp=2, pp=2), 4),
        (4, "qwen3-tied", Trainer(tp=2, pp=2, vpp=2), 2),
        (4, "llama", Trainer(pp=4), 2),
        (4, "qwen3_moe", Trainer(pp=2, ep=2), 4),
        (4, "qwen3_moe", Trainer(tp=2, ep=4), 2),
    ],
)
def test_any_trainer_layout_to_any_engine(
    ranks: Ranks, world: int, name: str, where: Trainer, engine_tp: int, dtype: torch.dtype
) -> None:
    counts: list[RefitCounts] = ranks.run(world, refit_twice, tiny.checkpoint(name), where, engine_tp, dtype)
    family = load_family(tiny.checkpoint(name))
    held = sum(count.bytes_local + count.bytes_received for count in counts)
    assert (
        held >= world // engine_tp * family.num_parameters() * dtype.itemsize
    )  # replicated tensors count on each rank
    if where == Trainer():
        assert all(count.bytes_received == 0 for count in counts)


def test_only_what_is_missing_travels(ranks: Ranks) -> None:
    counts = ranks.run(2, row_shards_to_whole, 64)
    assert [(c.bytes_local, c.bytes_received) for c in counts] == [(32 * 10 * 4, 32 * 10 * 4)] * 2
    counts = ranks.run(2, row_shards_to_whole, 62)  # odd halves of 31 rows: rectangles that do not fill their alignment
    assert [(c.bytes_local, c.bytes_received) for c in counts] == [(31 * 10 * 4, 31 * 10 * 4)] * 2


def row_shards_to_whole(rows: int) -> RefitCounts:
    full = torch.arange(rows * 10.0).view(rows, 10)
    refit, target = shards_to_whole(full, dist.get_rank(), bucket_bytes=300)
    counts = refit.run()
    assert torch.equal(target, full)
    return counts


def shards_to_whole(full: Tensor, shard: int, bucket_bytes: int = BUCKET) -> tuple[Refit, Tensor]:
    """Each of two ranks holds half of the rows of ``w``; both want all."""
    half, target = len(full) // 2, torch.zeros_like(full)
    sources = [TensorLayout("half", stack([("w", shard * half, (shard + 1) * half)], tuple(full.shape[1:])))]
    targets = [TensorLayout("all", whole("w", tuple(full.shape)))]
    weights = {"half": full.chunk(2)[shard].clone()}
    return Refit(weights, sources, {"all": target}, targets, bucket_bytes=bucket_bytes), target


def test_a_corrupted_bucket_is_detected_and_named(ranks: Ranks) -> None:
    assert ranks.run(2, corrupted_on_the_way, True) == [None, (1, "rank 0 -> rank 1: one or more of w")]
    assert ranks.run(2, corrupted_on_the_way, False) == [None, None]  # so it was the checksum that saw it


def corrupted_on_the_way(checksums: bool) -> tuple[int, str] | None:
    """One bit of what rank 1 receives is flipped."""
    refit, _ = shards_to_whole(torch.ones(64, 10), dist.get_rank(), bucket_bytes=300)
    refit.checksums = checksums
    original = refit_module.exchange
    calls = 0

    def flip(outgoing: Tensor, to: int, incoming: Tensor, source: int, group: dist.ProcessGroup | None) -> None:
        nonlocal calls
        original(outgoing, to, incoming, source, group)
        calls += 1
        if dist.get_rank() == 1 and calls == 2:
            incoming[37] ^= 4

    refit_module.exchange = flip
    try:
        refit.run()
    except RefitError as error:
        return error.mismatches, str(error).splitlines()[1].strip()
    finally:
        refit_module.exchange = original
    return None


def test_a_write_that_does_not_last_is_detected(ranks: Ranks) -> None:
    (message,) = ranks.run(1, written_over)
    assert "one or more of a, b" in message


def written_over(device: str = "cpu") -> str:
    """Two engine tensors share their storage, as after a mistaken hand-over of memory."""
    shared = torch.zeros(8, device=device)
    layouts = [TensorLayout(name, whole(name, (8,))) for name in "ab"]
    weights = {"a": torch.ones(8, device=device), "b": torch.full((8,), 2.0, device=device)}
    refit = Refit(weights, layouts, {"a": shared, "b": shared}, layouts, bucket_bytes=BUCKET)
    with pytest.raises(RefitError) as raised:
        refit.run()
    return str(raised.value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "missing",
            r"no rank holds the part of w that starts at \(32, 0\) with shape \(32, 10\), needed for all on rank 0",
        ),
        ("shape", "all of shape .* is filled in 640 of its 650 elements only"),
    ],
)
def test_faults_of_one_rank_stop_all(ranks: Ranks, fault: str, message: str) -> None:
    for text in ranks.run(2, faulty, fault):
        assert re.search(message, text)


def faulty(fault: str) -> str:
    full = torch.ones(64, 10)
    try:
        if fault == "missing":
            shards_to_whole(full, 0)
        else:
            rows = 65 if dist.get_rank() == 1 else 64
            layouts = [TensorLayout("all", whole("w", (64, 10)))]
            Refit({"all": full}, layouts, {"all": torch.ones(rows, 10)}, layouts, bucket_bytes=BUCKET)
    except ValueError as error:
        return str(error)
    return "no error"
