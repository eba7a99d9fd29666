"""A sampler in place of SGLang's: every request samples with its own seed, and log-probs are the trainer's.

SGLang's own uses the seeds in its deterministic mode only, replaces NaN logits silently, and on a CPU hashes the whole
vocabulary for every token.
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import torch
from sglang.srt.layers import logprob_processor
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.sampler import Sampler, register_sampler_backend
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from miles_spmd.algorithms.truncation import truncated
from miles_spmd.generation.sglang import sampling_kernel
from miles_spmd.invariant.operators import log_softmax

_GREEDY = 1  # the top_k by which SGLang marks a greedy request


def register() -> None:
    """Make SGLang construct this sampler and pass it the seeds of a batch in every mode, and compute the log-probs of
    prompts by the same log-softmax."""
    register_sampler_backend("pytorch", SeededSampler)  # the only name that SGLang accepts on a CPU
    SamplingBatchInfo.adjusted_from_schedule_batch = _set_seeds  # a hook that SGLang leaves empty
    logprob_processor.torch = _torch_with_our_log_softmax()


def _set_seeds(info: SamplingBatchInfo, batch: ScheduleBatch, vocab_size: int) -> None:
    seeds = [req.sampling_params.sampling_seed for req in batch.reqs]
    info.sampling_seed = torch.tensor(seeds, dtype=torch.int64, device=batch.device)


def _torch_with_our_log_softmax() -> types.ModuleType:
    """Return ``torch`` with another ``torch.nn.functional.log_softmax``, for one module of SGLang: changing torch
    itself would change it for the trainer, too."""

    def with_own(module: types.ModuleType, **own: Any) -> types.ModuleType:
        copied = types.ModuleType(module.__name__)
        vars(copied).update(vars(module) | own)
        return copied

    functional = with_own(torch.nn.functional, log_softmax=lambda values, dim: log_softmax(values))
    return with_own(torch, nn=with_own(torch.nn, functional=functional))


class SeededSampler(Sampler):
    """Samples from ``softmax(logits / temperature)`` truncated by top-k and top-p and reports log-probs of that
    distribution; for greedy requests, log-probs of the distribution without truncation."""

    def forward(
        self,
        logits_output: LogitsProcessorOutput,
        sampling_info: SamplingBatchInfo,
        return_logprob: bool,
        top_logprobs_nums: list[int],
        token_ids_logprobs: list[list[int]],
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Return token ids, int64 [requests]; write their log-probs, float32 [requests], into ``logits_output``.

        ``positions``, int64 [requests]: positions of the last tokens of the sequences."""
        logits = logits_output.next_token_logits
        log_probs = log_softmax(logits.float() / sampling_info.temperatures)
        tokens = top1 = logits.argmax(-1)
        if not sampling_info.is_all_greedy:
            _truncate(log_probs, sampling_info)
            sampled = sample(log_probs, sampling_info.sampling_seed, positions)
            tokens = torch.where(sampling_info.top_ks == _GREEDY, tokens, sampled)
        logits_output.next_token_logprobs = log_probs.gather(-1, tokens[:, None]).squeeze(-1)
        if any(top_logprobs_nums):  # a request asks for at most one, the top-1 token
            logits_output.next_token_top_logprobs_idx = [*top1[:, None]]
            logits_output.next_token_top_logprobs_val = [*log_probs.gather(-1, top1[:, None])]
        self._sync_token_ids_across_tp(tokens, sampling_info)
        return tokens


def _truncate(log_probs: torch.Tensor, info: SamplingBatchInfo) -> None:
    """Truncate in place only the rows that ask for it; the log-probs of the others then do not depend on the batch."""
    if not (info.need_top_k_sampling or info.need_top_p_sampling):
        return
    limited = (info.top_ks < log_probs.shape[-1]) | (info.top_ps < 1)
    rows = (limited & (info.top_ks != _GREEDY)).nonzero().squeeze(1)
    if len(rows):
        log_probs[rows] = truncated(log_probs[rows], info.top_ks[rows, None], info.top_ps[rows, None])


def sample(log_probs: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Sample one category per row of ``log_probs`` [rows, categories], which need not be normalised; int64 [rows].

    A pure function of a row's log-probs, its seed (``seeds``, int64 [rows]) and the position of its sequence's last
    token (``positions``, [rows]). On a GPU by the Gumbel-max trick, on a CPU by inverting the cumulative distribution.
    """
    if log_probs.is_cuda:  # there cumulative sums are not reproducible, and a maximum is
        return sampling_kernel.sample(log_probs, seeds, positions)
    cumulative = log_probs.exp().cumsum(-1, dtype=torch.float64)
    point = uniform(seeds, positions)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, point, right=True).squeeze(-1)
    return index.clamp_(max=log_probs.shape[-1] - 1)  # a row of NaN: any valid id, with log-prob NaN


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return one number in [0, 1) per row, float64: 53 bits of a hash of seed and position (SplitMix64's finaliser,
    applied twice)."""
    place = positions.numpy().astype(np.uint64) + np.uint64(1)
    bits = _mix(_mix(seeds.numpy().view(np.uint64)) ^ place * np.uint64(0x9E3779B97F4A7C15))
    return torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014) on uint64, whose products wrap."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
