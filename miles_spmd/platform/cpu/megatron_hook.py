"""Import hook by which megatron-core, which uses CUDA devices, streams and events throughout, runs on CPUs with gloo.

The hook, for ``megatron.core`` modules only, rewrites each module's syntax tree while it is loaded; no file and nothing
of torch is changed:

- ``torch.cuda`` becomes a stand-in whose device is the CPU and whose streams and events do nothing, which is correct
  because operations on a CPU run in program order;
- device strings ``"cuda"`` become ``"cpu"``, type names ``"torch.cuda.FloatTensor"`` become ``"torch.FloatTensor"``;
- ``x.cuda(...)`` becomes ``x.cpu()``.

Three modules are patched further after they were loaded (``_PATCHES``). The rewritten bytecode is cached beside
Python's own, which shortens the import of Megatron from 2.0 s to 0.8 s in every process.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import marshal
import os
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SUPPORTED_VERSION = "0.16.1"
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
    sys.meta_path.insert(0, _Finder(_cuda_stand_in()))


# --- the stand-in for torch.cuda -------------------------------------------------------------------------------------


class _Event:
    """An event that has always happened already."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: _Event) -> float:
        return 0.0


class _Stream:
    """The only stream: operations run in program order."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


def _cuda_stand_in() -> types.ModuleType:
    """Return ``torch.cuda`` as Megatron uses it, on the CPU; every other attribute is the real module's."""
    import torch

    class CudaOnCpu(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(torch.cuda, name)

    def nothing(*_: Any, **__: Any) -> None: ...

    def no_context(*_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def zero_bytes(*_: Any, **__: Any) -> int:
        return 0

    def get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    stand_in: Any = CudaOnCpu("torch.cuda (on CPU)")
    stand_in.current_device = lambda: torch.device("cpu")
    stand_in.device_count = lambda: 1
    stand_in.set_device = stand_in.synchronize = stand_in.empty_cache = nothing
    stand_in.memory_allocated = stand_in.max_memory_allocated = stand_in.memory_reserved = zero_bytes
    stand_in.Stream, stand_in.Event = _Stream, _Event
    stand_in.current_stream = stand_in.default_stream = lambda *_, **__: _Stream()
    stand_in.stream = no_context
    stand_in.get_rng_state, stand_in.set_rng_state = get_rng_state, set_rng_state
    stand_in.random = types.SimpleNamespace(get_rng_state=get_rng_state, set_rng_state=set_rng_state)
    stand_in.manual_seed = lambda seed: nothing(torch.manual_seed(seed))
    stand_in.nvtx = types.SimpleNamespace(range_push=nothing, range_pop=nothing, range=no_context)
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
    def __init__(self, name: str, path: str, cuda: types.ModuleType) -> None:
        super().__init__(name, path)
        self._cuda = cuda

    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)
        stat = os.stat(path)
        stamp = (stat.st_mtime_ns, stat.st_size)
        cache = importlib.util.cache_from_source(path, optimization=_CACHE_TAG)
        with contextlib.suppress(OSError, EOFError, ValueError, TypeError):
            cached_stamp, code = marshal.loads(Path(cache).read_bytes())
            if cached_stamp == stamp:
                return code
        tree = ast.fix_missing_locations(_CudaToCpu().visit(ast.parse(self.get_data(path), path)))
        code = compile(tree, path, "exec", dont_inherit=True)
        if not sys.dont_write_bytecode:
            self.set_data(cache, marshal.dumps((stamp, code)))  # atomic, and silent where the folder is read-only
        return code

    def exec_module(self, module: types.ModuleType) -> None:
        setattr(module, _STAND_IN, self._cuda)
        super().exec_module(module)
        if patch := _PATCHES.get(module.__name__.removeprefix(_PACKAGE + ".")):
            patch(module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, cuda: types.ModuleType) -> None:
        self._cuda = cuda

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _PACKAGE and not fullname.startswith(_PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path, self._cuda)
        return spec


# --- patches after loading -------------------------------------------------------------------------------------------


def _disable_fuser(jit: Any) -> None:
    """Disable ``jit_fuser``, which is torch.compile: compiling C++ takes longer than the fused lines save here."""
    jit.disable_jit_fuser()


def _use_cpu_generator(random: Any) -> None:
    """Read and write the state of torch's CPU generator: Megatron's way uses torch._C and a lazy CUDA call. Also drop
    the warning of forked generators that the CPU's state has changed."""
    import torch

    random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _move_split_sizes(moe_utils: Any) -> None:
    """Convert split sizes to numpy, as ``all_to_all_single`` requires: Megatron's function ignores CPU tensors."""

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and hasattr(tensor, "numpy") else tensor

    moe_utils.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


_PATCHES: dict[str, Callable[[Any], None]] = {
    "jit": _disable_fuser,
    "tensor_parallel.random": _use_cpu_generator,
    "transformer.moe.moe_utils": _move_split_sizes,
}
