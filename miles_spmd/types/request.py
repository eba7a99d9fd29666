"""What an engine is asked for and what it returns: plain data that the control plane carries."""

from __future__ import annotations

import math

import msgspec

from miles_spmd.types.sample import FinishReason


class SamplingParams(msgspec.Struct, frozen=True):
    """How to draw one answer.

    Each token is drawn from ``softmax(logits / temperature)``, cut to its ``top_k`` likeliest tokens and to the
    smallest set of probability at least ``top_p`` (:func:`~miles_spmd.algorithms.truncation.threshold`), and
    renormalised. The draw is a function of ``seed``, the token's position in the sequence and that distribution alone,
    not of what else is in the batch.
    """

    max_new_tokens: int
    temperature: float = 1.0  # 0 (anything below 1e-6): greedy, the likeliest token
    top_p: float = 1.0
    top_k: int = -1  # -1: the whole vocabulary; 1: greedy
    stop: list[str] = []  # the answer ends with the token that completes one of these strings
    stop_token_ids: list[int] = []  # besides the model's own end-of-sequence tokens
    ignore_eos: bool = False  # neither end-of-sequence nor stop tokens end the answer; stop strings do
    seed: int = 0  # 63-bit, a pure function of (run seed, step, prompt, sample, turn)


class Request(msgspec.Struct, frozen=True):
    rid: str
    input_ids: list[int]
    sampling: SamplingParams
    return_prompt_log_probs: bool = False
    return_top1: bool = False


class Output(msgspec.Struct):
    """A finished (or aborted) request.

    ``output_ids`` ends with the token that stopped it, if one did. ``output_log_probs`` is aligned with it: the natural
    log of each token's probability in the distribution that it was drawn from, after top-k and top-p; for a greedy
    request, which draws nothing, in ``softmax(logits / temperature)`` over the whole vocabulary (at temperature 1 if it
    asks for 0). It is what a trainer that treats its logits in the same way computes for the token.
    """

    rid: str
    output_ids: list[int]
    output_log_probs: list[float]
    finish_reason: FinishReason
    weight_versions: list[tuple[int, int]]  # (version, number of tokens), in order
    prompt_log_probs: list[float] | None = None  # of input_ids[1:] at temperature 1, when asked for
    top1_ids: list[int] | None = None  # in the place of each of output_ids; of equally likely ones the lowest


def check_request(request: Request, context_length: int) -> None:
    """Raise ValueError naming the rid and everything that keeps the request from being served."""
    prompt, wanted = len(request.input_ids), request.sampling
    problems = []
    if prompt < 1 or wanted.max_new_tokens < 1:
        problems.append(f"needs at least one token of prompt ({prompt}) and of answer ({wanted.max_new_tokens})")
    if prompt + wanted.max_new_tokens > context_length:
        problems.append(f"{prompt} prompt + {wanted.max_new_tokens} new tokens exceed the context of {context_length}")
    if not 0 <= wanted.temperature < math.inf:
        problems.append(f"temperature {wanted.temperature} must be finite and not negative")
    if not 0 < wanted.top_p <= 1:
        problems.append(f"top_p {wanted.top_p} must be in (0, 1]")
    if wanted.top_k != -1 and wanted.top_k < 1:
        problems.append(f"top_k {wanted.top_k} must be positive, or -1 for the whole vocabulary")
    if problems:
        raise ValueError(f"request {request.rid}: " + "; ".join(problems))
