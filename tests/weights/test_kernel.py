"""The kernel of refits between GPUs, run by Triton's interpreter: what it copies and what it sums up."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import numpy as np
import torch

from miles_spmd.weights import copy_kernel
from miles_spmd.weights.copy_kernel import Kind, Move, launches

copy_kernel.ROWS, copy_kernel.COLUMNS = 4, 64
rng = np.random.default_rng(0)
for dtype, word in ((torch.float32, torch.uint32), (torch.bfloat16, torch.uint16)):
    sources = [torch.from_numpy(rng.standard_normal(shape)).to(dtype) for shape in ((90, 200), (100, 136), (1, 500))]
    targets = [torch.zeros(80, 210, dtype=dtype), torch.zeros(70, 200, dtype=dtype)]
    expected = [target.clone() for target in targets]
    sums, moves = [0, 0], []
    for source, target, rows, columns, at, to, position, bucket in (
        (0, 0, 50, 130, (3, 8), (2, 16), 0, 0),  # wide, aligned
        (1, 0, 9, 7, (1, 1), (60, 5), 50 * 130, 0),  # narrow, not aligned
        (0, 1, 33, 200, (7, 0), (4, 0), 0, 1),  # whole rows on both sides: one run of memory
        (2, 1, 1, 199, (0, 300), (50, 1), 33 * 200, 1),
    ):
        piece = sources[source][at[0] : at[0] + rows, at[1] : at[1] + columns]
        expected[target][to[0] : to[0] + rows, to[1] : to[1] + columns] = piece
        for i, bits in enumerate(piece.contiguous().view(word).flatten().tolist()):
            sums[bucket] += bits * (2 * (position + i) + 1)
        widths = sources[source].shape[1], targets[target].shape[1]
        offsets = at[0] * widths[0] + at[1], to[0] * widths[1] + to[1]
        move = Move(source, offsets[0], widths[0], target, offsets[1], widths[1], rows, columns, position, bucket)
        moves.append((move, Kind(dtype, dtype, True)))
    addresses = [torch.tensor([tensor.data_ptr() for tensor in tensors]) for tensors in (sources, targets)]
    made = launches(moves, torch.device("cpu"))
    assert len(made) == 2, "what is aligned and what is not"
    for copy in (False, True):
        total = torch.zeros(2, dtype=torch.int64)
        for launch in made:
            launch(*addresses, total, copy=copy, checksum=True)
        assert [value % 2**64 for value in total.tolist()] == sums, (dtype, total, sums)
        assert all(torch.equal(a, b) for a, b in zip(targets, expected)) == copy, dtype
print("done")
"""


def test_kernel() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.strip() == "done", done.stderr
