"""The reference engine: transformers on a CPU, one request at a time. It is small, quick to start, and shows how an
engine that is not SGLang is plugged in: ``rollout.engine = "tests.reference_engine:TorchEngine"``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig

from miles_spmd.algorithms.truncation import truncated
from miles_spmd.generation.engine import EngineMemory
from miles_spmd.models import Piece, TensorLayout, load_family
from miles_spmd.types.request import Output, Request, check_request
from miles_spmd.types.trajectory import FinishReason

_GREEDY_BELOW = 1e-6  # temperature


@dataclass
class Running:
    """A request that has not been returned yet."""

    request: Request
    generator: torch.Generator
    cache: DynamicCache | None = None
    output_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    prompt_log_probs: list[float] | None = None
    top1_ids: list[int] = field(default_factory=list)
    weight_versions: list[tuple[int, int]] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class TorchEngine:
    """An :class:`~miles_spmd.generation.engine.Engine` of one rank. Weights are random until the first refit."""

    size = 1
    leader = True

    def __init__(self, model_path: str | Path, *, dtype: str, context_length: int | None = None) -> None:
        """See :class:`~miles_spmd.generation.engine.EngineFactory`."""
        self._family = load_family(model_path)
        self.context_length = context_length or self._family.max_sequence_length
        config = AutoConfig.from_pretrained(model_path)
        self._model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval().requires_grad_(False)
        self._tokenizer = (
            AutoTokenizer.from_pretrained(model_path) if any(Path(model_path).glob("tokenizer*")) else None
        )
        self._eos = _eos_token_ids(model_path, config, self._tokenizer)
        self._requests: dict[str, Running] = {}
        self._weight_version = -1
        self._paused = False
        self._freed: list[int] | None = None  # bytes of the parameters, while released

    cache_tokens = None

    @property
    def weight_version(self) -> int:
        return self._weight_version

    def submit(self, requests: list[Request]) -> None:
        rids = [request.rid for request in requests]
        for request in requests:
            check_request(request, self.context_length)
            if request.rid in self._requests or rids.count(request.rid) > 1:
                raise ValueError(f"request {request.rid}: another request with this rid is in the engine")
            if request.sampling.stop and self._tokenizer is None:
                raise ValueError(f"request {request.rid}: stop strings need a tokenizer in the checkpoint folder")
        for request in requests:
            generator = torch.Generator().manual_seed(request.sampling.seed)
            running = self._requests[request.rid] = Running(request, generator)
            if request.begun is not None:
                running.output_ids += request.begun.output_ids
                if request.sampling.temperature >= _GREEDY_BELOW and request.sampling.top_k != 1:
                    for _ in request.begun.output_ids:  # the numbers that their sampling has taken
                        torch.multinomial(torch.ones(self._model.config.vocab_size), 1, generator=generator)
                running.log_probs += request.begun.output_log_probs
                running.top1_ids += request.begun.top1_ids or []

    def abort(self, rids: list[str] | None = None) -> None:
        for rid in self._requests if rids is None else rids:
            if rid in self._requests:
                self._requests[rid].finish_reason = FinishReason.ABORT

    @torch.no_grad()
    def step(self) -> list[Output]:
        self._require_memory()
        if self._paused:
            return []
        for running in self._requests.values():
            if running.finish_reason is None:
                self._advance(running)
        finished = [r for r in self._requests.values() if r.finish_reason is not None]
        for running in finished:
            del self._requests[running.request.rid]
        return [self._output(running) for running in finished]

    def _advance(self, running: Running) -> None:
        """Generate one more token for one request."""
        sampling = running.request.sampling
        sequence = running.request.input_ids + running.output_ids
        if running.cache is None:
            running.cache = DynamicCache()
        cached = running.cache.get_seq_length()
        # as it was sampled: prompt, then token by token; attention over more queries rounds otherwise
        pieces = [sequence[cached:]] if cached else [running.request.input_ids, *([t] for t in running.output_ids)]
        for piece in pieces:
            logits = self._model(torch.tensor([piece]), past_key_values=running.cache).logits[0].float()
            if running.request.return_prompt_log_probs and running.prompt_log_probs is None:
                targets = torch.tensor(piece[1:])[:, None]
                running.prompt_log_probs = logits[:-1].log_softmax(-1).gather(-1, targets).squeeze(-1).tolist()
        greedy = sampling.temperature < _GREEDY_BELOW
        log_probs = (logits[-1:] / (1 if greedy else sampling.temperature)).log_softmax(-1)
        if log_probs.isnan().any():
            raise FloatingPointError(
                f"request {running.request.rid}: the model of weight version {self._weight_version} computes log-probs "
                "that are not finite"
            )
        token = int(log_probs.argmax())
        running.top1_ids.append(token)
        if not greedy and sampling.top_k != 1:
            if sampling.top_k != -1 or sampling.top_p < 1:
                log_probs = truncated(log_probs, sampling.top_k, sampling.top_p)
            token = int(torch.multinomial(log_probs[0].exp(), 1, generator=running.generator))
        running.output_ids.append(token)
        running.log_probs.append(float(log_probs[0, token]))
        running.finish_reason = self._finish_reason(running)

    def _finish_reason(self, running: Running) -> FinishReason | None:
        sampling = running.request.sampling
        stops = self._eos | set(sampling.stop_token_ids)
        if not sampling.ignore_eos and running.output_ids[-1] in stops:
            return FinishReason.STOP
        if sampling.stop and self._tokenizer is not None:
            text = self._tokenizer.decode(running.output_ids)
            if any(stop in text for stop in sampling.stop):
                return FinishReason.STOP
        return FinishReason.LENGTH if len(running.output_ids) == sampling.max_new_tokens else None

    def _output(self, running: Running) -> Output:
        self._stamp(running)
        assert running.finish_reason is not None
        return Output(
            rid=running.request.rid,
            output_ids=running.output_ids,
            output_log_probs=running.log_probs,
            finish_reason=running.finish_reason,
            weight_versions=running.weight_versions,
            prompt_log_probs=running.prompt_log_probs,
            top1_ids=running.top1_ids if running.request.return_top1 else None,
        )

    def _stamp(self, running: Running) -> None:
        """Attribute the tokens that came since the last call to the current weights."""
        new = len(running.output_ids) - sum(tokens for _, tokens in running.weight_versions)
        if new:
            running.weight_versions.append((self._weight_version, new))

    def retry_smaller(self) -> None:
        """Return None: this engine runs one request at a time already."""

    @property
    def idle(self) -> bool:
        return not self._requests

    def pause(self) -> None:
        self._paused = True

    def unpause(self) -> None:
        self._paused = False

    def flush(self) -> None:
        """Do nothing: this engine has no prefix cache."""
        self._require_idle("flush")

    def release(self, keep_weights: bool = False) -> None:
        self._require_memory()
        self._require_idle("release")
        self._freed = []
        for parameter in () if keep_weights else self._model.parameters():  # there is no other memory
            self._freed.append(parameter.untyped_storage().nbytes())
            parameter.untyped_storage().resize_(0)

    def resume_weights(self) -> None:
        self.resume()

    def resume(self) -> None:
        for parameter, size in zip(self._model.parameters(), self._freed or ()):
            parameter.untyped_storage().resize_(size)
        self._freed = None

    def memory(self) -> EngineMemory:
        """Keys and values live as long as their request and are not counted."""
        return EngineMemory(sum(parameter.untyped_storage().nbytes() for parameter in self._model.parameters()), 0)

    def close(self) -> None:
        """Nothing outlives the object."""

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in self._model.named_parameters()}

    def layout(self) -> list[TensorLayout]:
        """Return a layout in which parameters have the checkpoint's names and shapes. Raises ValueError for a model for
        which transformers uses others."""
        tensors = self._family.checkpoint_tensors()
        layout = []
        for name, tensor in self._model.named_parameters():
            shape = tuple(tensor.shape)
            if tensors.get(name) != shape:
                raise ValueError(
                    f"{name} {shape} of transformers has no equal in the checkpoint; use rollout.engine = 'sglang'"
                )
            zeros = (0,) * len(shape)
            layout.append(TensorLayout(name, (Piece(name, zeros, zeros, shape),)))
        return layout

    def commit(self, version: int) -> None:
        for running in self._requests.values():
            self._stamp(running)
            running.cache = None
        self._weight_version = version

    def _require_memory(self) -> None:
        if self._freed is not None:
            raise RuntimeError("the engine's memory is released: resume() and refit it first")

    def _require_idle(self, what: str) -> None:
        if not self.idle:
            raise RuntimeError(f"{what}() requires an idle engine: step until idle is true, or abort first")


def _eos_token_ids(model_path: str | Path, config: Any, tokenizer: Any) -> set[int]:
    """Return the end-of-sequence ids of all files in which checkpoints name them, as SGLang collects them."""
    sources = [config, tokenizer]
    if Path(model_path, "generation_config.json").is_file():
        sources.append(GenerationConfig.from_pretrained(model_path))
    ids: set[int] = set()
    for source in sources:
        eos = getattr(source, "eos_token_id", None)
        ids |= set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return ids
