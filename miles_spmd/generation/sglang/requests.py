"""Requests on their way from ``submit`` and ``abort`` to the schedulers of an engine's ranks."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang.srt.managers.io_struct import AbortReq, TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams as SglangSamplingParams

from miles_spmd.types.request import Request

# SGLang aborts every request whose rid starts with the given one. No rid with this suffix is a prefix of another.
END = "\0"

Item = Request | str  # a request to start, or the rid of one to abort

# Fields of a request that SGLang requires and that have no use here.
_NO_OTHER_INPUT: dict[str, Any] = dict.fromkeys(
    ["input_text", "input_embeds", "mm_inputs", "token_type_ids", "token_ids_logprob"]
)


def message(item: Item, tokenizer: Any) -> TokenizedGenerateReqInput | AbortReq:
    """Return the message that SGLang's tokenizer process would send."""
    if isinstance(item, str):
        return AbortReq(rid=item + END)
    sampling = msgspec.structs.asdict(item.sampling)
    stop_token_ids, seed = set(sampling.pop("stop_token_ids")), sampling.pop("seed")
    params = SglangSamplingParams(**sampling, stop_token_ids=stop_token_ids, sampling_seed=seed)
    params.normalize(tokenizer)
    return TokenizedGenerateReqInput(
        rid=item.rid + END,
        input_ids=array("q", item.input_ids),
        sampling_params=params,
        return_logprob=True,
        logprob_start_len=0 if item.return_prompt_log_probs else -1,
        top_logprobs_num=int(item.return_top1),
        stream=False,
        **_NO_OTHER_INPUT,
    )


def broadcast(items: list[Item], group: GroupCoordinator) -> list[Item]:
    """Return the items of the group's first rank, on all of its ranks. Collective. SGLang would send pickles, which can
    run code (docs/security.md)."""
    if group.world_size == 1:
        return items
    data = bytearray(msgspec.msgpack.encode(items) if items and group.is_first_rank else b"")
    size = torch.tensor(len(data))
    dist.broadcast(size, group.first_rank, group.cpu_group)
    if not size:
        return []
    buffer = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(buffer, group.first_rank, group.cpu_group)
    return items if group.is_first_rank else msgspec.msgpack.decode(buffer.numpy().tobytes(), type=list[Item])
