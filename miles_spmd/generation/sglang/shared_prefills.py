"""Requests that begin alike and arrive at the same time: the first is prefilled alone, and the others find it cached.

SGLang puts all that fits into one batch of prefills, first come, first served, and a request finds only what earlier
batches have left in the cache. So the samples of a prompt, or agents with one system prompt, would each prefill what
they have in common. Holding a request back costs it one step of the engine, or two where batches overlap.
"""

from __future__ import annotations

from array import array
from collections import defaultdict

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

LEAST = 32  # tokens for which a request is held back


class SharedPrefills:
    """``lasts``: number of steps behind its own after which a prefill is in the cache."""

    def __init__(self, cache: BasePrefixCache, page_size: int, lasts: int) -> None:
        self._cache, self._least, self._lasts = cache, max(LEAST, page_size), lasts
        # beginnings that are being prefilled: by which request, and for how many steps still
        self._ahead: dict[bytes, tuple[str, int]] = {}
        self._first: dict[str, bytes] = {}  # by rids, of those that wait and are not held back

    def step(self) -> None:
        """A step of the engine begins."""
        self._ahead = {start: (rid, left - 1) for start, (rid, left) in self._ahead.items() if left > 0}

    def held(self, waiting: list[Req], chunked: Req | None) -> set[str]:
        """Return the rids of those of the requests ``waiting`` that are better prefilled later. ``chunked``: the one
        of which a part has been prefilled, and that goes on first."""
        alike: defaultdict[bytes, list[tuple[str, array[int]]]] = defaultdict(list)
        for req in [*([] if chunked is None else [chunked]), *waiting]:
            tokens = req.origin_input_ids + req.output_ids if req.output_ids else req.origin_input_ids
            if len(tokens) > self._least:
                alike[tokens[: self._least].tobytes()].append((req.rid, tokens))
        if chunked is not None:  # more of it is cached than before
            self._first.pop(chunked.rid, None)
        found, first = set[str](), dict[str, bytes]()
        for some in alike.values():
            if len(some) == 1 and not self._ahead:
                continue
            for rid, tokens in some:
                start = self._first.get(rid) or self._start(tokens)
                leader, _ = self._ahead.get(start, (rid, 0))
                if leader == rid:  # it waits, or goes now
                    self._ahead[start] = rid, self._lasts
                if leader == rid or len(start) == len(tokens) * tokens.itemsize:
                    first[rid] = start
                else:
                    found.add(rid)
        self._first = first
        return found

    def _start(self, tokens: array[int]) -> bytes:
        """Return what is cached of ``tokens``, and the first of those behind it."""
        cached = self._cache.match_prefix(MatchPrefixParams(key=RadixKey(token_ids=tokens))).device_indices
        return tokens[: len(cached) + self._least].tobytes()
