"""The policy: Megatron's GPT with a forward pass over packed streams that ends in log-probs; its pipeline chunks."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from miles_spmd.models import Family
from miles_spmd.training.layer_spec import LastLayer, block_spec
from miles_spmd.training.log_probs import log_probs_and_entropy
from miles_spmd.training.packing import PackedBatch
from miles_spmd.training.parallel import Coordinates, device
from miles_spmd.training.settings import Settings

# Logits that may be alive at once on a rank. More are made and dropped part by part, and made again in the backward
# pass: 16k positions of a vocabulary of 152k would take 25 GiB otherwise, the matrix product costs a few percent.
MAX_LOGITS = 2**28


class PolicyModel(GPTModel):
    """One pipeline chunk. ``vocab_size`` counts real tokens; the embedding may have rows of padding behind them."""

    def __init__(self, *args: Any, real_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.real_vocab_size = real_vocab_size
        self.last_layer_selects = any(isinstance(layer, LastLayer) for layer in self.decoder.layers)
        if self.post_process:
            # the head runs on selected positions of the gathered stream, see _score
            self.output_layer.sequence_parallel = False
            self.output_layer.disable_grad_reduce = self.config.sequence_parallel

    def forward(self, batch: PackedBatch, temperature: float, differentiate_entropy: bool) -> Tensor:
        """Hidden states [T, 1, hidden] between stages; log-probs and entropy, fp32 [2, S], from the last one."""
        hidden = self.embedding(batch.tokens, batch.positions) if self.pre_process else None
        self._set_rotary(batch)
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=batch.sequences)
        if not self.post_process:
            return hidden
        return self._score(hidden, batch, temperature, differentiate_entropy)

    def _set_rotary(self, batch: PackedBatch) -> None:
        """Cosine and sine of every position of the stream, once for all layers (and chunks)."""
        if batch.sequences.cos is None:
            table = self.rotary_pos_emb.get_emb(batch.sequences.max_seqlen_q)[:, 0]
            angles = table.index_select(0, batch.positions)
            batch.sequences.cos = angles.cos().to(self.config.params_dtype)
            batch.sequences.sin = angles.sin().to(self.config.params_dtype)

    def _score(self, hidden: Tensor, batch: PackedBatch, temperature: float, differentiate_entropy: bool) -> Tensor:
        """The vocabulary-sized work, on scored positions only."""
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        if not self.last_layer_selects:
            hidden = hidden.index_select(0, batch.sequences.scored)
        head = functools.partial(self._head, temperature=temperature, differentiate_entropy=differentiate_entropy)
        rows = max(1, MAX_LOGITS // self.output_layer.output_size_per_partition)
        if len(hidden) <= rows:
            return head(hidden, batch.targets)
        parts = zip(hidden.split(rows), batch.targets.split(rows))
        return torch.cat([checkpoint(head, *part, use_reentrant=False, preserve_rng_state=False) for part in parts], 1)

    def _head(self, hidden: Tensor, targets: Tensor, temperature: float, differentiate_entropy: bool) -> Tensor:
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits = self.output_layer(hidden, weight=weight)[0].squeeze(1)
        first_id = parallel_state.get_tensor_model_parallel_rank() * logits.shape[1]
        logits = logits[:, : self.real_vocab_size - first_id]
        return torch.stack(
            log_probs_and_entropy(
                logits,
                targets,
                temperature=temperature,
                first_id=first_id,
                group=parallel_state.get_tensor_model_parallel_group(),
                differentiate_entropy=differentiate_entropy,
            )
        )


def build_chunks(settings: Settings, family: Family, where: Coordinates) -> list[DistributedDataParallel]:
    """This rank's pipeline chunks (several with virtual stages), ready to train. Weights are as allocated."""
    config = settings.transformer
    virtual_stages = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(virtual_stages or 1):
        vp_stage = stage if virtual_stages else None
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        model: torch.nn.Module = PolicyModel(
            config=config,
            transformer_layer_spec=block_spec(config, vp_stage, last),
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=last,
            vp_stage=vp_stage,
            real_vocab_size=family.vocab_size,
            **family.gpt_model(tp_size=where.tp_size),
        ).to(device())
        if config.bf16:
            model = Float16Module(config, model)
        chunks.append(DistributedDataParallel(config, settings.ddp, model, disable_bucketing=stage > 0))
    return chunks


def global_names(chunks: list[DistributedDataParallel], where: Coordinates) -> dict[str, torch.nn.Parameter]:
    """Every parameter of this rank by its name in the whole model: global layer and global expert numbers."""
    parameters = {}
    for chunk in chunks:
        policy = unwrap(chunk)
        first_layer = policy.decoder.layers[0].layer_number - 1 if len(policy.decoder.layers) else 0
        experts = (policy.config.num_moe_experts or 0) // where.ep_size
        for name, parameter in policy.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(int(parts[2]) + first_layer)
            if "local_experts" in parts:
                index = parts.index("local_experts") + 1
                parts[index] = str(int(parts[index]) + where.ep_rank * experts)
            parameters[".".join(parts)] = parameter
    return parameters


def release(chunks: list[DistributedDataParallel]) -> None:
    """Make chunks forget model, gradient buffers and process groups, after which nothing can be done with them.

    Megatron's gradient hooks hold their chunk from C++ nodes of the autograd graph, where the garbage collector does
    not see that the chunk holds the nodes: left alone, memory and the groups' threads would never be given back.
    """
    for chunk in chunks:
        chunk.__dict__.clear()


def unwrap(chunk: torch.nn.Module) -> PolicyModel:
    while not isinstance(chunk, PolicyModel):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk
