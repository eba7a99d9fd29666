"""The keys of `[megatron]` and `[sglang]`, read from the installed packages' source without importing them.

Importing either backend takes seconds and initialises torch; parsing its dataclasses takes a tenth of a second and
gives the keys of exactly the version that will run.
"""

import ast
import builtins
import functools
import importlib.util
import math
import typing
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

BACKENDS = ("megatron", "sglang")
MEGATRON_CLASSES = (
    ("model_parallel_config.py", "ModelParallelConfig"),
    ("transformer/transformer_config.py", "TransformerConfig"),
    ("optimizer/optimizer_config.py", "OptimizerConfig"),
    ("distributed/distributed_data_parallel_config.py", "DistributedDataParallelConfig"),
)
SGLANG_CLASSES = (("srt/server_args.py", "ServerArgs"),)
TOML_TYPES = {bool, int, float, str, list, dict}

# Keys whose values are derived from other settings or from the checkpoint, so that a second one could only conflict:
# reason -> keys.
REFUSED: dict[str, dict[str, str]] = {
    "megatron": {
        "it is derived from the checkpoint's config.json": (
            "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels num_moe_experts "
            "moe_ffn_hidden_size moe_router_topk moe_layer_freq moe_shared_expert_intermediate_size "
            "moe_shared_expert_gate normalization layernorm_epsilon layernorm_zero_centered_gamma gated_linear_unit "
            "activation_func add_bias_linear add_qkv_bias qk_layernorm rotary_interleaved window_size softmax_scale "
            "softmax_type multi_latent_attention mtp_num_layers"
        ),
        "weights are divided by tensor, pipeline and expert parallelism only": (
            "gtp_weight_remat_size expert_gtp_weight_remat_size tensor_parallel_num_weight_shards "
            "expert_tensor_parallel_num_weight_shards"
        ),
        "the model has no such multipliers": "use_mup",
        "an update is skipped only where its gradient is not finite": "grad_norm_skip_threshold",
        "set model.dtype instead": "bf16 fp16 params_dtype pipeline_dtype autocast_dtype",
        "set train.min_lr instead": "min_lr",
        "it is derived from transformer_impl": "moe_grouped_gemm",
        "packed sequences and global loss weights need their own value": (
            "variable_seq_lengths calculate_per_token_loss hidden_dropout attention_dropout perform_initialization "
            "use_cpu_initialization"
        ),
        "the trainer sets this function itself": (
            "finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func param_sync_func timers init_method "
            "output_layer_init_method embedding_init_method"
        ),
    },
    "sglang": {
        "set model.hf_checkpoint instead": "model_path tokenizer_path served_model_name revision context_length",
        "set model.dtype instead": "dtype",
        "set run.seed instead": "random_seed",
        "set determinism.deterministic instead": "enable_deterministic_inference",
        "an engine holds shared experts apart from the others": "disable_shared_experts_fusion",
        "weights come from the trainer": "load_format model_loader_extra_config weight_loader_disable_mmap",
        "the engine runs inside the worker's process, without server, port and tokenizer": (
            "host port nccl_port dist_init_addr nnodes node_rank base_gpu_id gpu_id_step api_key admin_api_key "
            "skip_tokenizer_init tokenizer_worker_num detokenizer_worker_num stream_interval enable_memory_saver "
            "skip_server_warmup"
        ),
        "an engine is one replica whose ranks are the worker processes": (
            "pp_size dp_size enable_dp_attention speculative_algorithm disable_overlap_schedule device sampling_backend"
        ),
    },
}


# Defaults of ours, in the place of Megatron's own; "local" runs everywhere, and in the same way everywhere.
DEFAULTS: dict[str, dict[str, Any]] = {
    "megatron": {"transformer_impl": "local", "fp8_recipe": "blockwise", "lr": 1e-6, "weight_decay": 0.01}
}


# Values that the backends accept and cannot run with: table -> what a value must be -> whether it is, and the keys.
LIMITS: dict[str, dict[str, tuple[Callable[[float], bool], str]]] = {
    "megatron": {
        "at least 0": (
            lambda value: value >= 0,
            "lr weight_decay clip_grad adam_eps recompute_num_layers moe_aux_loss_coeff moe_z_loss_coeff",
        ),
        "at least 0 and below 1": (lambda value: 0 <= value < 1, "adam_beta1 adam_beta2 sgd_momentum"),
        "at least 1": (
            lambda value: value >= 1,
            "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size expert_model_parallel_size "
            "expert_tensor_parallel_size virtual_pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage",
        ),
    },
    "sglang": {
        "above 0 and below 1": (lambda value: 0 < value < 1, "mem_fraction_static"),
        "at least 1": (
            lambda value: value >= 1,
            "tp_size ep_size page_size max_running_requests max_total_tokens max_prefill_tokens",
        ),
        "-1 (off) or at least 1": (lambda value: value == -1 or value >= 1, "chunked_prefill_size"),
        "above 0": (lambda value: value > 0, "schedule_conservativeness watchdog_timeout"),
    },
}


@dataclass(frozen=True)
class BackendField:
    """A field of a dataclass: the TOML types that fit (None: any), literal choices, default, meaning."""

    types: frozenset[type] | None
    choices: tuple[Any, ...] | None
    default: Any = None  # None also where the default is not a literal
    meaning: str = ""

    def error(self, value: Any) -> str | None:
        """Return what is wrong with ``value``, or None."""
        if type(value) is float and not math.isfinite(value):
            return f"must be a finite number, got {value}"
        fits = self.types is None or type(value) in self.types or (type(value) is int and float in self.types)
        if not fits:
            expected = " or ".join(sorted(t.__name__ for t in self.types or ()))
            return f"expected {expected}, got {type(value).__name__} {value!r}"
        if self.choices is not None and value not in self.choices:
            return f"must be one of {', '.join(repr(c) for c in self.choices if c is not None)}, got {value!r}"
        return None


# What Megatron's own launcher accepts beside the dataclasses' fields.
LAUNCHER_KEYS = {
    "megatron": {
        "num_layers_per_virtual_pipeline_stage": BackendField(
            frozenset([int]), None, None, "Number of layers of a virtual pipeline stage."
        )
    }
}


class BackendMissingError(ModuleNotFoundError):
    """A backend is not installed, so its table cannot be checked."""


@functools.cache
def backend_fields(table: str) -> dict[str, BackendField]:
    """All keys of ``[megatron]`` or ``[sglang]``. Raises BackendMissingError."""
    package, classes = {"megatron": ("megatron.core", MEGATRON_CLASSES), "sglang": ("sglang", SGLANG_CLASSES)}[table]
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise BackendMissingError(f"[{table}] cannot be checked: {package} is not installed")
    fields: dict[str, BackendField] = {}
    for file, name in classes:
        fields |= _dataclass_fields(Path(spec.origin).parent / file, name)
    ours = {name: replace(fields[name], default=value) for name, value in DEFAULTS.get(table, {}).items()}
    return fields | ours | LAUNCHER_KEYS.get(table, {})


def backend_keys(table: str) -> Iterable[str]:
    """The keys of ``backend_fields``, none where the backend is not installed."""
    try:
        return backend_fields(table)
    except BackendMissingError:
        return ()


def value_error(table: str, key: str, value: Any) -> str | None:
    """Return what is wrong with a value of a known key, or None."""
    if (problem := backend_fields(table)[key].error(value)) is not None:
        return problem
    for what, (holds, keys) in LIMITS[table].items():
        if key in keys.split() and isinstance(value, int | float) and not holds(value):
            return f"must be {what}, got {value!r}"
    return None


def refusal(table: str, key: str) -> str | None:
    """Return why ``key`` cannot be set in ``table``, or None if it can."""
    reason = next((reason for reason, keys in REFUSED[table].items() if key in keys.split()), None)
    return None if reason is None else f"cannot be set here: {reason}"


def _dataclass_fields(file: Path, name: str) -> dict[str, BackendField]:
    tree = ast.parse(file.read_text())
    constants = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    fields = {}
    for node, after in zip(body, [*body[1:], None]):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            types, choices = _annotation(node.annotation)
            if choices is None and types is not None and list not in types:
                choices = _listed_choices(node.annotation, constants)
            fields[node.target.id] = BackendField(types, choices, _default(node.value), _meaning(node, after))
    return fields


def _meaning(node: ast.AnnAssign, after: ast.stmt | None) -> str:
    """The first paragraph of the string below the field, as Megatron has it, or of the one in its annotation, as SGLang
    has it."""
    match (after, node.annotation):
        case (ast.Expr(ast.Constant(str(text))), _):
            pass
        case (_, ast.Subscript(slice=ast.Tuple([_, ast.Constant(str(text))]))):
            pass
        case (_, ast.Subscript(slice=ast.Tuple([_, ast.Call(keywords=keywords)]))):
            help_texts = [k.value.value for k in keywords if k.arg == "help" and isinstance(k.value, ast.Constant)]
            text = str(help_texts[0]) if help_texts else ""
        case _:
            text = ""
    return " ".join(text.split("\n\n")[0].split())


def _listed_choices(annotation: ast.expr, constants: dict[str, ast.expr]) -> tuple[Any, ...] | None:
    """The choices that SGLang lists in a field's annotation, or in a constant that is named there."""
    match annotation:
        case ast.Subscript(slice=ast.Tuple([_, ast.Call(keywords=keywords)])):
            found = next((keyword.value for keyword in keywords if keyword.arg == "choices"), None)
            found = constants.get(found.id) if isinstance(found, ast.Name) else found
            return tuple(_default(found) or ()) or None
    return None


def _default(value: ast.expr | None) -> Any:
    if isinstance(value, ast.Call):  # field(default=..., metadata=...)
        value = next((keyword.value for keyword in value.keywords if keyword.arg == "default"), None)
    try:
        return None if value is None else ast.literal_eval(value)
    except ValueError:
        return None


def _annotation(node: ast.expr) -> tuple[frozenset[type] | None, tuple[Any, ...] | None]:
    """TOML types and literal choices of an annotation; None where it names a type that TOML does not have."""
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("A", "Annotated"):
        node = node.slice.elts[0]  # type: ignore[attr-defined]
    try:
        annotation = eval(ast.unparse(node), {}, defaultdict(lambda: object, vars(builtins) | vars(typing)))
    except AttributeError:  # torch.dtype; a name of the backend's own stands for object
        return None, None
    types: set[type] = set()
    choices = None
    for option in get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]:
        if get_origin(option) is Literal:
            choices = get_args(option)
            types |= set(map(type, choices))
        else:
            types.add(get_origin(option) or option)
    types = {list if kind is tuple else kind for kind in types} - {NoneType}
    return (frozenset(types) if types <= TOML_TYPES else None), choices
