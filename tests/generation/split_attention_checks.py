"""SGLang on a CPU, attending by our Triton kernels in Triton's interpreter: prompts read in chunks, shared prefixes and
decoded tokens against transformers; then windows, soft-caps and sinks in float64.

``TRITON_INTERPRET=1 python -m tests.generation.split_attention_checks`` runs it.
"""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path

from miles_spmd.platform import cpu

cpu.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from sglang.srt.layers.attention.attention_registry import register_attention_backend  # noqa: E402

from miles_spmd.generation.sglang import cpu_attention, split_attention_backend  # noqa: E402
from miles_spmd.invariant import split_attention  # noqa: E402
from tests.generation import checkpoints, conformance  # noqa: E402
from tests.generation.test_cpu_attention import DECODES, FORMS, attend  # noqa: E402


def main() -> None:
    os.environ.update(LOCAL_RANK="0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    split_attention.FEWEST = 16  # a context of 160 has parts of 32
    take_the_place = register_attention_backend("torch_native")  # the only name that engines take on a CPU
    cpu_attention.register = partial(take_the_place, split_attention_backend.SplitAttention)
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoints.write(Path(scratch), 0)
        reference, shared = checkpoints.Reference(folder), conformance.prompt(0, 40)
        asked = [
            conformance.request(f"r{i}", (shared if i % 2 else []) + conformance.prompt(i, 9 * i + 1), max_new_tokens=5)
            for i in range(4)
        ]
        with conformance.engine_of("sglang", folder, chunked_prefill_size=24) as engine:
            runner = engine._scheduler.tp_worker.model_runner
            assert isinstance(runner.attn_backend, split_attention_backend.SplitAttention)
            for one in asked:  # one after the other: prefixes are in the cache
                (output,) = conformance.run(engine, [one]).values()
                assert conformance.difference(reference, one, output) < conformance.TOLERANCE, one
            outputs = conformance.run(engine, asked)
            for one in asked:
                assert conformance.difference(reference, one, outputs[one.rid]) < conformance.TOLERANCE, one
            for layer in FORMS:
                attend(runner, [(37, 1), (0, 40), (120, 7)], False, *layer)
                attend(runner, DECODES[-1], True, *layer)
    print("done")


if __name__ == "__main__":
    main()
