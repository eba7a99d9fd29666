"""From the user's ``[sglang]`` table to SGLang's ServerArgs."""

from __future__ import annotations

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any

import torch
from sglang.srt.server_args import ServerArgs

from miles_spmd.generation.sglang.rotary import overrides
from miles_spmd.invariant.flash import shared_backend
from miles_spmd.models import load_family

_CPU_CACHE_TOKENS = 2**17  # the system provides pages of the cache only when they are first written
_GRAPH_BATCHES = [1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512]  # larger ones run eagerly
_MAX_REQUESTS = 4096  # running requests that SGLang limits itself to on a GPU by default

# The engine is one data-parallel replica that runs on the ranks of its world and is stepped by its host.
_ONLY = {"pp_size": 1, "dp_size": 1, "nnodes": 1, "enable_dp_attention": False, "speculative_algorithm": None}


def build_server_args(
    model_path: str,
    dtype: str,
    context_length: int,
    table: dict[str, Any],
    cache_tokens: int | None = None,
    invariant: bool = False,
) -> ServerArgs:
    """Return ServerArgs for an in-process engine on this machine's device. ``cache_tokens``: upper bound of the cache.
    ``invariant``: the reduction order of attention does not depend on the batch.

    Raises ValueError listing every entry of ``table`` that SGLang does not have or that this engine sets itself, and
    for an ``invariant`` engine with a dtype whose matrix products depend on the batch on this machine.
    """
    on_gpu, family = torch.cuda.is_available(), load_family(model_path)
    if invariant and dtype != ("bfloat16" if on_gpu else "float32"):
        raise ValueError(f"determinism.parity: must be 'off' in {dtype} on a {'GPU' if on_gpu else 'CPU'}")
    fixed = {
        "model_path": model_path,
        "dtype": dtype,
        "context_length": context_length,
        "device": "cuda" if on_gpu else "cpu",
        "load_format": "dummy",  # a refit provides the weights
        "random_seed": 0,  # every request has its own seed
        "skip_tokenizer_init": not any(Path(model_path).glob("tokenizer*")),  # only stop strings need it
        "sampling_backend": "pytorch",
        "enable_memory_saver": on_gpu,
        "disable_shared_experts_fusion": True,  # fused ones would be among the router's experts
        **_ONLY,
    }
    if invariant or not on_gpu:
        fixed["disable_hybrid_swa_memory"] = True  # our attention finds the keys of all layers by one table of slots
    defaults: dict[str, Any] = {"grammar_backend": "none"}
    if on_gpu:
        # Capturing graphs of prefills takes a minute for few batches; SGLang would capture three times as many graphs
        # of decode batches.
        defaults |= {"disable_prefill_cuda_graph": True, "cuda_graph_bs_decode": _GRAPH_BATCHES}
        # For some models SGLang would fuse all-reduces with norms, and compile that for minutes on every node.
        defaults["enforce_disable_flashinfer_allreduce_fusion"] = True
        if dtype == "float32":
            defaults["attention_backend"] = "triton"  # SGLang's default supports 16-bit dtypes only
        if invariant:
            fixed["enable_deterministic_inference"] = True
            defaults["attention_backend"] = shared_backend(None, family.layers[0].attention.head_dim)
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
    model = overrides(family) | family.engine_config() | json.loads(table.get("json_model_override_args", "{}"))
    args["json_model_override_args"] = json.dumps(model)
    # Without a bound, the cache of a small model would have hundreds of millions of tokens, more than SGLang can index.
    bound = cache_tokens or args.get("max_running_requests", _MAX_REQUESTS) * context_length
    args.setdefault("max_total_tokens", bound if on_gpu else min(bound, _CPU_CACHE_TOKENS))
    return ServerArgs(**args)


def _check(table: dict[str, Any], fixed: dict[str, Any]) -> None:
    names = [field.name for field in dataclasses.fields(ServerArgs)]
    problems = []
    for key in table:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            problems.append(f"{key}: SGLang has no such setting" + (f", did you mean {near[0]}?" if near else ""))
        elif key in fixed and table[key] != fixed[key]:
            problems.append(f"{key}: this engine requires {fixed[key]!r}")
    if problems:
        raise ValueError("[sglang] " + "; ".join(problems))
