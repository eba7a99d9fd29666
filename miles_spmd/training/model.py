"""Megatron's GPT with a forward pass over packed streams that ends in log-probs or values, and its pipeline chunks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from miles_spmd.config import Config
from miles_spmd.invariant.rope import frequencies, rotary_table
from miles_spmd.models import Family
from miles_spmd.training.layer_spec import LastLayer, block_spec
from miles_spmd.training.log_probs import Distribution, linear_log_probs, log_probs_of, top_candidates
from miles_spmd.training.megatron_config import NetworkConfig
from miles_spmd.training.output_layer import OutputLayer
from miles_spmd.training.packing import PackedBatch
from miles_spmd.training.parallel import Coordinates, device


@dataclass(frozen=True)
class Scoring:
    """Which numbers a policy's head computes. A value head computes its one number whatever this is."""

    distribution: Distribution
    differentiate_entropy: bool = False
    invariant: bool = False  # log-probs bitwise equal to the engine's
    top_k: int = 0  # number of candidates: top tokens of each position, with their log-probs

    @classmethod
    def of(cls, config: Config) -> Self:
        """Return what training asks for: log-probs under the distribution that responses are sampled from.

        Greedy sampling trains the plain distribution, whose log-probs engines report then.
        """
        invariant = config.determinism.parity == "bitwise"
        if config.run.mode != "rl":
            return cls(Distribution(), invariant=invariant)
        r = config.rollout
        distribution = Distribution(r.rollout_temperature or 1.0)
        if r.rollout_temperature > 0 and r.rollout_top_k != 1:
            distribution = replace(distribution, top_p=r.rollout_top_p, top_k=r.rollout_top_k)
        return cls(distribution, config.algorithm.entropy_coef != 0, invariant)


class ValueHead(torch.nn.Module):
    """One number per position, fp32 [S]. Every tensor-parallel rank holds and computes the whole head."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype, device=device()))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.weight.float()).squeeze(-1)


class PackedModel(GPTModel):
    """One pipeline chunk of a policy, or of a critic or reward model with a value head.

    The embedding may have rows of padding behind those of the family's tokens.
    """

    def __init__(self, *args: Any, family: Family, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.family = family
        # a number of the weights' dtype, as transformers has it
        self.embedding_scale = torch.tensor(family.embedding_scale, dtype=self.config.params_dtype).item()
        here = [self.config.layers[layer.layer_number - 1].attention.rope for layer in self.decoder.layers]
        self.frequencies = {rope: frequencies(rope, self.config.context).to(device()) for rope in here if rope}
        self.last_layer_selects = any(isinstance(layer, LastLayer) for layer in self.decoder.layers)
        if family.value_head and self.post_process:
            self.output_layer = ValueHead(self.config)

    def forward(self, batch: PackedBatch, scoring: Scoring) -> Tensor | tuple[Tensor, ...]:
        """Return hidden states [T, 1, hidden] between pipeline stages; on the last stage what :meth:`_score` does."""
        hidden = self.embedding(batch.tokens, batch.sequences.positions) if self.pre_process else None
        if hidden is not None and self.embedding_scale != 1:
            hidden = hidden * self.embedding_scale
        self._set_rotary(batch)
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=batch.sequences)
        if not self.post_process:
            return hidden
        return self._score(hidden, batch, scoring)

    def _set_attention_backend(self) -> None:
        """Skip Megatron's function for the local layers, which have their own attention. It sets environment variables
        for Transformer Engine, and raises an error where another model of this process has set them otherwise."""
        if self.config.transformer_impl == "transformer_engine":
            super()._set_attention_backend()

    def _set_rotary(self, batch: PackedBatch) -> None:
        """Compute the angles of rotary positions once for all layers and chunks."""
        sequences, positions = batch.sequences, batch.sequences.positions
        for rope, steps in self.frequencies.items():
            if rope not in sequences.tables:
                sequences.tables[rope] = rotary_table(steps, sequences.max_seqlen_q, rope.attention_factor)
            if self.config.transformer_impl == "transformer_engine" and rope not in sequences.angles:
                sequences.angles[rope] = torch.outer(positions.float(), steps).repeat(1, 2).unsqueeze(1)

    def _score(self, hidden: Tensor, batch: PackedBatch, scoring: Scoring) -> tuple[Tensor, ...]:
        """Return log-probs of the targets and the entropy, fp32 [S]; with ``top_k`` also ids (int32) and log-probs
        (fp32) of the top tokens, [S, top_k]; with the batch's ``candidates`` also their log-probs, fp32 [S, K]. Of a
        value head return the values, fp32 [S].

        The head runs on scored positions only. Candidates are compared over the whole vocabulary, also where sampling
        was cut by top-k or top-p.
        """
        if self.config.sequence_parallel:
            # Either head gives every rank the whole gradient, so the backward pass takes a rank's part without a sum.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        if not self.last_layer_selects:
            hidden = hidden.index_select(0, batch.sequences.scored)
        hidden = hidden.squeeze(1)
        if isinstance(self.output_layer, ValueHead):
            return (self.output_layer(hidden),)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        layer = OutputLayer(
            weight,
            first_id=parallel_state.get_tensor_model_parallel_rank() * len(weight),
            vocab_size=self.family.vocab_size,
            group=parallel_state.get_tensor_model_parallel_group(),
            softcap=self.family.logit_softcap,
        )
        outputs: tuple[Tensor, ...] = linear_log_probs(
            hidden,
            replace(layer, invariant=scoring.invariant),
            batch.targets,
            scoring.distribution,
            differentiate_entropy=scoring.differentiate_entropy,
        )
        temperature = scoring.distribution.temperature
        if scoring.top_k:
            outputs += top_candidates(hidden, layer, scoring.top_k, temperature)
        if batch.candidates is not None:
            outputs += (log_probs_of(hidden, layer, batch.candidates, temperature),)
        return outputs


def build_chunks(config: NetworkConfig, family: Family, where: Coordinates) -> list[torch.nn.Module]:
    """Return this rank's pipeline chunks (several with virtual stages). Weights are not initialised."""
    virtual_stages = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(virtual_stages or 1):
        vp_stage = stage if virtual_stages else None
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        model: torch.nn.Module = PackedModel(
            config=config,
            transformer_layer_spec=block_spec(config, vp_stage, last),
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=last,
            vp_stage=vp_stage,
            family=family,
            **family.gpt_model(tp_size=where.tp_size),
        ).to(device())
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                # Gives experts an optimizer of their own, also where their parallelism does not require one: another
                # layout that loads the checkpoint may have one.
                parameter.allreduce = False  # type: ignore[attr-defined]
        chunks.append(Float16Module(config, model) if config.bf16 else model)
    return chunks


def global_names(chunks: list[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """Return every parameter of this rank by its name in the whole model, with global layer numbers."""
    parameters = {}
    for chunk in chunks:
        model = unwrap(chunk)
        first_layer = model.decoder.layers[0].layer_number - 1 if len(model.decoder.layers) else 0
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(int(parts[2]) + first_layer)
            parameters[".".join(parts)] = parameter
    return parameters


def release(chunks: list[torch.nn.Module]) -> None:
    """Drop the chunks' references to model, gradient buffers and process groups, after which they are unusable.

    Megatron's gradient hooks refer to their chunk from C++ nodes of the autograd graph, and the garbage collector does
    not see that the chunk refers to the nodes: without this, memory and the groups' threads would never be released.
    """
    for chunk in chunks:
        chunk.__dict__.clear()


def unwrap(chunk: torch.nn.Module) -> PackedModel:
    """Return the model inside Megatron's wrappers for data parallelism and 16 bits."""
    while not isinstance(chunk, PackedModel):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk
