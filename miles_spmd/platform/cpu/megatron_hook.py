"""Import hook by which megatron-core, which uses CUDA devices, streams and events throughout, runs on CPUs with gloo.

The hook, for ``megatron.core`` modules only, rewrites each module's syntax tree while it is loaded; no file and nothing
of torch is changed:

- ``torch.cuda`` becomes a stand-in whose device is the CPU and whose streams and events do nothing, which is correct
  because operations on a CPU run in program order;
- device strings ``"cuda"`` become ``"cpu"``, type names ``"torch.cuda.FloatTensor"`` become ``"torch.FloatTensor"``;
- ``x.cuda(...)`` becomes ``x.cpu()``;
- ``@torch.compile`` is left out: at import it loads torch's compiler, which takes longer than the rest of Megatron.

Three modules are patched further after they were loaded (``_PATCHES``). The rewritten bytecode is cached beside
Python's own, which shortens the import of Megatron from 2.9 s to 0.9 s of processor time in every process.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import logging
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

SUPPORTED_VERSION = "0.19.2"
_PACKAGE = "megatron.core"
_STAND_IN = "__cpu_cuda__"  # the name that replaces ``torch.cuda`` inside Megatron's modules


def install() -> None:
    """Prepare this process for ``import megatron.core`` without a GPU. Inert where CUDA is available and when repeated.

    Raises RuntimeError when megatron-core is missing, has another version than the tested one, or was already imported.
    """
    import torch

    if torch.cuda.is_available() or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError as error:
        raise RuntimeError(f"megatron-core is not installed; install megatron-core=={SUPPORTED_VERSION}") from error
    if version != SUPPORTED_VERSION:
        raise RuntimeError(
            f"megatron-core {version} is installed, but running without a GPU was adapted to {SUPPORTED_VERSION} only; "
            f"install megatron-core=={SUPPORTED_VERSION}"
        )
    if _PACKAGE in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before miles_spmd.platform.cpu.install(): move that call before the import"
        )
    # each of Megatron's modules warns that kernels for GPUs are missing
    warnings.filterwarnings("ignore", r"(Transformer Engine and )?Apex (is|are) not installed", UserWarning)
    # that a torch for CUDA finds no GPU
    logging.getLogger("torch.utils.cpp_extension").addFilter(
        lambda record: "No CUDA runtime is found" not in record.getMessage()
    )
    # of forked generators, whose state is the CPU's here
    logging.getLogger(f"{_PACKAGE}.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    sys.meta_path.insert(0, _Finder())


# --- the stand-in for torch.cuda -------------------------------------------------------------------------------------


class _Idle:
    """A stream or an event where operations run in program order: nothing to record, and nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    record = wait = wait_stream = wait_event = synchronize = __init__

    def record_event(self, event: _Idle | None = None) -> _Idle:
        return event or self

    def elapsed_time(self, _: _Idle) -> float:
        return 0.0

    def query(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Idle)

    def __hash__(self) -> int:
        return 0


@cache
def _cuda_stand_in() -> types.ModuleType:
    """Return ``torch.cuda`` as Megatron uses it, on the CPU; every other attribute is the real module's."""
    import torch

    class CudaOnCpu(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(torch.cuda, name)

    def nothing(*_: Any, **__: Any) -> None: ...

    def zero_bytes(*_: Any, **__: Any) -> int:
        return 0

    stand_in: Any = CudaOnCpu("torch.cuda (on CPU)")
    stand_in.current_device = lambda: torch.device("cpu")
    stand_in.device_count = lambda: 1
    stand_in.set_device = stand_in.synchronize = stand_in.empty_cache = nothing
    stand_in.memory_allocated = stand_in.max_memory_allocated = stand_in.memory_reserved = zero_bytes
    stand_in.Stream = stand_in.Event = stand_in.current_stream = stand_in.default_stream = _Idle
    stand_in.stream = lambda *_, **__: contextlib.nullcontext()
    stand_in.get_rng_state = lambda *_, **__: torch.get_rng_state()
    stand_in.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    stand_in.random = stand_in
    stand_in.manual_seed = lambda seed: nothing(torch.manual_seed(seed))
    stand_in.nvtx = types.SimpleNamespace(range_push=nothing, range_pop=nothing, range=stand_in.stream)
    for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor"):
        setattr(stand_in, name, getattr(torch, name))
    return stand_in


# --- the rewriting loader --------------------------------------------------------------------------------------------


class _CudaToCpu(ast.NodeTransformer):
    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return ast.copy_location(ast.Name(_STAND_IN, node.ctx), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            node.func.attr, node.args, node.keywords = "cpu", [], []
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.decorator_list = [each for each in node.decorator_list if ast.unparse(each) != "torch.compile"]
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        text = node.value
        if not isinstance(text, str):
            return node
        if text == "cuda" or text.startswith("cuda:"):
            return ast.copy_location(ast.Constant("cpu"), node)
        if text.startswith("torch.cuda.") and text.endswith("Tensor"):
            return ast.copy_location(ast.Constant(text.replace("torch.cuda.", "torch.")), node)
        return node


# Part of the name of cached bytecode, so that another version of this file does not read it.
_CACHE_TAG = "cpu" + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


class _Loader(importlib.machinery.SourceFileLoader):
    def source_to_code(self, data: Any, path: Any, **_: Any) -> types.CodeType:  # type: ignore[override]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of backslashes in Megatron's docstrings
            tree = ast.fix_missing_locations(_CudaToCpu().visit(ast.parse(data, path)))
            return compile(tree, path, "exec", dont_inherit=True)

    def get_data(self, path: str) -> bytes:
        return super().get_data(_cached(path))

    def set_data(self, path: str, data: Any, **mode: Any) -> None:
        super().set_data(_cached(path), data, **mode)

    def exec_module(self, module: types.ModuleType) -> None:
        setattr(module, _STAND_IN, _cuda_stand_in())
        super().exec_module(module)
        vars(module).update(_PATCHES.get(module.__name__.removeprefix(_PACKAGE + "."), {}))


def _cached(path: str) -> str:
    """Return where the rewritten bytecode is cached in place of Python's own; the path itself of other files."""
    return path if path.endswith(".py") else f"{path.removesuffix('.pyc')}.{_CACHE_TAG}.pyc"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _PACKAGE and not fullname.startswith(_PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def _split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and hasattr(tensor, "numpy") else tensor


# What replaces names of a module after it was loaded.
_PATCHES: dict[str, dict[str, Callable[..., Any]]] = {
    # torch.compile: compiling C++ takes longer than the fused lines save here
    "jit": {"jit_fuser": lambda function: function},
    # Megatron's way to the generator's state uses torch._C and a lazy CUDA call.
    "tensor_parallel.random": {
        "_get_cuda_rng_state": lambda device="cpu", **_: _cuda_stand_in().get_rng_state(),
        "_set_cuda_rng_state": lambda new_state, device=-1, **_: _cuda_stand_in().set_rng_state(new_state),
    },
    # ``all_to_all_single`` requires numpy; Megatron's function ignores CPU tensors.
    "transformer.moe.moe_utils": {"maybe_move_tensor_to_cpu": _split_sizes},
}
