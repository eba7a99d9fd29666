"""From the user's ``[sglang]`` table to SGLang's ServerArgs."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import torch
from sglang.srt.server_args import ServerArgs

from miles_spmd.invariant.flash import shared_backend
from miles_spmd.models import load_family

_CPU_CACHE_TOKENS = 2**17  # pages of the cache are taken from the system only when first written
_GRAPH_BATCHES = [1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512]  # larger ones run eagerly
_MOST_REQUESTS = 4096  # that SGLang runs at a time on a GPU, unless told otherwise

# The engine is one data-parallel replica with one copy of every request, stepped by its host.
_ONLY = {"pp_size": 1, "dp_size": 1, "nnodes": 1, "enable_dp_attention": False, "speculative_algorithm": None}


def build_server_args(
    model_path: str,
    dtype: str,
    context_length: int,
    table: dict[str, Any],
    cache_tokens: int | None = None,
    invariant: bool = False,
) -> ServerArgs:
    """ServerArgs for an in-process engine on this machine's device. ``cache_tokens``: the most that a cache is of use
    for. ``invariant``: attend to a request's keys in the same order whatever else is in the batch.

    Raises ValueError listing every entry of ``table`` that SGLang does not know or that this engine decides itself, and
    for an ``invariant`` engine in a dtype in which this machine's products depend on the batch.
    """
    on_gpu = torch.cuda.is_available()
    if invariant and dtype != ("bfloat16" if on_gpu else "float32"):
        raise ValueError(f"determinism.parity: must be 'off' in {dtype} on a {'GPU' if on_gpu else 'CPU'}")
    fixed = {
        "model_path": model_path,
        "dtype": dtype,
        "context_length": context_length,
        "device": "cuda" if on_gpu else "cpu",
        "load_format": "dummy",  # weights come by refit
        "random_seed": 0,  # every request brings its own seed
        "skip_tokenizer_init": not has_tokenizer(model_path),  # it is needed for stop strings only
        "sampling_backend": "pytorch",
        "enable_memory_saver": on_gpu,
        **_ONLY,
    }
    defaults: dict[str, Any] = {"grammar_backend": "none"}
    if on_gpu:
        # Capturing prefills takes a minute, and they are few; of decode batches SGLang would capture thrice as many.
        defaults |= {"disable_prefill_cuda_graph": True, "cuda_graph_bs_decode": _GRAPH_BATCHES}
        # Fused with norms, all-reduces of models that SGLang knows would be compiled first, for minutes, on every node.
        defaults["enforce_disable_flashinfer_allreduce_fusion"] = True
        if dtype == "float32":
            defaults["attention_backend"] = "triton"  # SGLang's own choice would take 16-bit numbers only
        if invariant:
            fixed["enable_deterministic_inference"] = True
            defaults["attention_backend"] = shared_backend(None, load_family(model_path).head_dim)
    else:
        fixed |= {
            "attention_backend": "torch_native",
            "disable_cuda_graph": True,
            "disable_overlap_schedule": True,
            "page_size": 1,
        }
        defaults |= {"max_running_requests": 64, "chunked_prefill_size": -1, "mem_fraction_static": 0.5}
    _check(table, fixed)
    args = fixed | defaults | table
    # A small model's cache would otherwise fill the GPU with hundreds of millions of tokens, more than its index bears.
    most = cache_tokens or args.get("max_running_requests", _MOST_REQUESTS) * context_length
    args.setdefault("max_total_tokens", most if on_gpu else min(most, _CPU_CACHE_TOKENS))
    return ServerArgs(**args)


def has_tokenizer(model_path: str) -> bool:
    return any(Path(model_path).glob("tokenizer*"))


def _check(table: dict[str, Any], fixed: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(ServerArgs)]
    problems = []
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            problems.append(f"{key}: SGLang has no such setting" + (f", did you mean {near[0]}?" if near else ""))
        elif key in fixed and table[key] != fixed[key]:
            problems.append(f"{key}: this engine needs {fixed[key]!r}")
    if problems:
        raise ValueError("[sglang] " + "; ".join(problems))
