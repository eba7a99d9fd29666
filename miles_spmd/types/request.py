"""Requests to an engine and its outputs: plain data that the control plane carries."""

import math

import msgspec

from miles_spmd.types.trajectory import FinishReason


class SamplingParams(msgspec.Struct, frozen=True):
    """How to sample one response.

    Each token is sampled from ``softmax(logits / temperature)``, truncated to its ``top_k`` most likely tokens and to
    the smallest set of probability at least ``top_p`` (:func:`~miles_spmd.algorithms.truncation.threshold`), and
    renormalised. The sampled token is a function of ``seed``, its position in the sequence and that distribution only;
    it does not depend on the batch.
    """

    max_new_tokens: int
    temperature: float = 1.0  # 0 (anything below 1e-6): greedy, the top-1 token
    top_p: float = 1.0
    top_k: int = -1  # -1: the whole vocabulary; 1: greedy
    stop: list[str] = []  # the response ends with the token that completes one of these strings
    stop_token_ids: list[int] = []  # in addition to the model's own end-of-sequence tokens
    ignore_eos: bool = False  # neither end-of-sequence nor stop tokens end the response; stop strings do
    seed: int = 0  # 63-bit, a pure function of (run seed, step, prompt, sample, turn)


class Begun(msgspec.Struct, frozen=True):
    """The first tokens of a response that an engine with the same weights has sampled for the same request."""

    output_ids: list[int]
    output_log_probs: list[float]  # of them
    top1_ids: list[int] | None = None  # at their places, where the request asks for it


class Request(msgspec.Struct, frozen=True):
    rid: str  # unique among the requests of an engine
    input_ids: list[int]
    sampling: SamplingParams
    return_prompt_log_probs: bool = False
    return_top1: bool = False
    begun: Begun | None = None  # the response continues these tokens
    order: int = 0  # where not all requests can run, those of lower order begin first


class Output(msgspec.Struct):
    """A finished (or aborted) request.

    ``output_ids`` includes the token that stopped it, if one did. ``output_log_probs`` is aligned with it: the natural
    log of each token's probability in the distribution that it was sampled from, after top-k and top-p; for a greedy
    request, in ``softmax(logits / temperature)`` over the whole vocabulary (at temperature 1 if the request has 0). A
    trainer that processes its logits in the same way computes the same number.
    """

    rid: str
    output_ids: list[int]
    output_log_probs: list[float]
    finish_reason: FinishReason
    weight_versions: list[tuple[int, int]]  # (version, number of tokens), in order
    prompt_log_probs: list[float] | None = None  # of input_ids[1:] at temperature 1, if requested
    top1_ids: list[int] | None = None  # top-1 token at each place of output_ids (lowest id of equals), if requested
    cached_tokens: int = 0  # of the prompt, whose keys and values the engine had from another request


def check_request(request: Request, context_length: int) -> None:
    """Raise ValueError naming the rid and everything that keeps the request from being served."""
    prompt, new, sampling = len(request.input_ids), request.sampling.max_new_tokens, request.sampling
    problems = []
    if prompt < 1 or new < 1:
        problems.append(f"needs at least one token of prompt ({prompt}) and of response ({new})")
    begun = request.begun
    if begun is not None and not len(begun.output_ids) == len(begun.output_log_probs) < new:
        tokens, log_probs = len(begun.output_ids), len(begun.output_log_probs)
        problems.append(f"continues {tokens} tokens with {log_probs} log-probs, and has room for {new}")
    if begun is not None and request.return_prompt_log_probs:
        problems.append("continues a response, which has no log-probs of its prompt")
    if prompt + new > context_length:
        problems.append(f"{prompt} prompt + {new} new tokens exceed the context of {context_length}")
    if not 0 <= sampling.temperature < math.inf:
        problems.append(f"temperature {sampling.temperature} must be finite and not negative")
    if not 0 < sampling.top_p <= 1:
        problems.append(f"top_p {sampling.top_p} must be in (0, 1]")
    if sampling.top_k != -1 and sampling.top_k < 1:
        problems.append(f"top_k {sampling.top_k} must be positive, or -1 for the whole vocabulary")
    if problems:
        raise ValueError(f"request {request.rid}: " + "; ".join(problems))
