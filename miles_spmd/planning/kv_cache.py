"""The number of tokens of KV cache that the requests of a run can fill at most."""

from __future__ import annotations

from math import ceil

from miles_spmd.config import Config
from miles_spmd.config.checks import settings
from miles_spmd.data.dataset import DataError, read_rows
from miles_spmd.models import load_family

MOST_REQUESTS = 4096  # SGLang's default limit of running requests
SPARE = 256  # tokens: SGLang admits a request only with a page more than it fills


def needed_tokens(config: Config, engine_ranks: int) -> int | None:
    """Return the tokens that one of the engines of ``engine_ranks`` ranks needs for the larger of rollout and
    evaluation: as many sequences as run at a time, each of the maximum length, in whole pages. None where the user has
    set the size of the cache.

    Without ``rollout_max_prompt_len`` a sequence may be as long as a micro-batch, or as the context.
    """
    s = settings(config)
    if s["mem_fraction_static"] is not None or s["max_total_tokens"] is not None:
        return None
    page, engines = s["page_size"] or 1, engine_ranks // s["tp_size"]
    prompt, r = config.data.rollout_max_prompt_len, config.rollout

    def need(prompts: int, samples: int, response: int, longest: int) -> int:
        requests = min(ceil(prompts / engines) * samples, s["max_running_requests"] or MOST_REQUESTS)
        length = longest if prompt is None else min(prompt + response, longest)
        return requests * (ceil(length / page) + 1) * page

    needs = [0]
    context = load_family(config.model.hf_checkpoint).max_sequence_length
    if config.run.mode == "rl":
        longest = min(context, config.micro_batch_tokens)  # what is trained on fits a micro-batch
        needs.append(need(r.rollout_batch_size, r.n_samples_per_prompt, r.rollout_max_response_len, longest))
    for one in config.eval_sets:
        if one.eval_interval:
            rows = _rows(one.prompt_data)
            needs.append(need(rows, one.n_samples_per_eval_prompt or 1, one.eval_max_response_len or 0, context))
    return max(needs) + SPARE


def _rows(source: str) -> int:
    """Return the number of rows of a dataset; 0 where it cannot be read, which the controller reports."""
    try:
        return sum(1 for _ in read_rows(source, []))
    except (OSError, DataError):
        return 0
