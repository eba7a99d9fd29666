"""What a server offers over HTTP: OpenAI's APIs, sessions, the weights, and whether it is there.

A request to OpenAI's APIs is a session of one turn, with the distribution and the seed that it asks for. A session made
by ``POST /sessions`` lasts until it is deleted, and gives its trajectories to whoever has the key of the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import secrets
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from miles_spmd.environments.context import ModelView
from miles_spmd.environments.serving.context import ServedContext, Submit
from miles_spmd.environments.serving.messages import Load
from miles_spmd.environments.sessions.endpoint import (
    Body,
    Endpoint,
    api_routes,
    as_json,
    has_key,
    models,
    respond,
    written,
)
from miles_spmd.environments.sessions.protocol import DISTRIBUTION, ENDED, RequestError, check_seed, read_json
from miles_spmd.environments.sessions.session import Session
from miles_spmd.types.request import SamplingParams
from miles_spmd.types.seeds import derive_seed
from miles_spmd.types.trajectory import Trajectory, train_once

MAX_SESSIONS = 4096
SEEDS = 2**63
_PLAIN = ""  # in place of a session's name, of the requests without one
_HOTTEST = 100.0  # temperature
T = TypeVar("T")


class OpenRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A new session: its seed, None for a random one, and the distribution of its requests, None for [rollout]'s."""

    seed: int | None = None
    temperature: Any = None
    top_p: Any = None
    top_k: Any = None


class LoadRequest(msgspec.Struct, forbid_unknown_fields=True):
    """New weights. ``version``: None for the next number. ``running``: see :class:`Load`."""

    path: str
    version: int | None = None
    running: Literal["wait", "continue", "abort"] = "wait"


class TrajectoryBody(msgspec.Struct, frozen=True):
    """One of a session's trajectories, as a trainer has it. Lists but ``prompt_tokens`` are about ``tokens``, those
    behind it."""

    prompt_tokens: list[int]
    tokens: list[int]
    log_probs: list[float]  # natural log, of what was sampled from; 0 for tokens that the model did not sample
    loss_mask: list[int]  # 1 where it did, and no trajectory before this one has the same
    weight_versions: list[tuple[int, int]]  # (version, number of tokens) of what it sampled, in order
    turns: int
    finish_reason: str
    response: str  # what it said last
    messages: list[dict[str, Any]]  # empty for texts

    @classmethod
    def of(cls, line: Trajectory) -> TrajectoryBody:
        return cls(
            prompt_tokens=line.start,
            tokens=line.response,
            log_probs=line.log_probs,
            loss_mask=line.loss_mask,
            weight_versions=line.weight_versions,
            turns=line.turns,
            finish_reason=str(line.finish_reason),
            response=line.text or "",
            messages=line.messages,
        )


class Weights(msgspec.Struct, frozen=True):
    version: int
    path: str


class Policy(NamedTuple):
    """What every conversation is made with."""

    model: ModelView
    variables: Mapping[str, Any]  # of the chat template
    params: SamplingParams
    submit: Submit


class Door(Endpoint):
    """``load`` gives the engines other weights, and returns "" or why they have kept theirs."""

    def __init__(
        self,
        place: tuple[str, int],
        key: str,
        policy: Policy,
        weights: Weights,
        load: Callable[[Load], Coroutine[Any, Any, str]],
    ) -> None:
        super().__init__(*place)
        self._key, self._policy, self._weights, self._load = key, policy, weights, load
        self._loading = asyncio.Lock()
        self._numbers = itertools.count()
        self._opened: dict[str, tuple[int, ServedContext]] = {}  # seeds and contexts of sessions

    def _routes(self) -> list[Route]:
        return [
            *super()._routes(),
            *api_routes("/v1", self._sample_once, self._list_models),
            Route("/sessions", self._open, methods=["POST"]),
            Route("/sessions/{name}", self._show, methods=["GET"]),
            Route("/sessions/{name}", self._delete, methods=["DELETE"]),
            Route("/weights", self._show_weights, methods=["GET"]),
            Route("/weights", self._load_weights, methods=["POST"]),
            Route("/health", self._health, methods=["GET"]),
        ]

    def _admit(self, http: Request) -> None:
        """Raises RequestError."""
        if not has_key(http, self._key):
            raise RequestError(401, "Authorization is not 'Bearer' and the key of this server", "invalid_api_key")

    def _context(self, params: SamplingParams, seed_of: Callable[[str], int]) -> ServedContext:
        policy = self._policy
        return ServedContext(next(self._numbers), policy.model, policy.variables, params, seed_of, policy.submit)

    # --- requests without a session ----------------------------------------------------------------------------------

    async def _sample_once(self, api: ModuleType, http: Request) -> Response:
        self._admit(http)
        with Body(self._under_way, _PLAIN) as body:
            request = api.decode(await body.read(http))
            asked = request.asked(lambda key: None)  # it continues nothing
            for name in DISTRIBUTION.keys() - {"temperature", "top_p", "top_k"}:
                if getattr(asked, name) not in (None, DISTRIBUTION[name]):
                    raise RequestError(400, f"{name} is not supported: it would have no effect", param=name)
            seed = secrets.randbelow(SEEDS) if asked.seed is None else asked.seed % SEEDS
            # the first choice has the seed itself, so that whoever knows that of a response gets it again
            seeds = itertools.chain([seed], (derive_seed("choice", seed, choice) for choice in itertools.count(1)))
            session = Session(self._context(_distribution(self._policy.params, asked), lambda path: next(seeds)))
            try:
                response = await _while_connected(http, respond(session, asked))
            finally:
                await session.close()
        return written(api, request, response)

    async def _list_models(self, http: Request) -> Response:
        self._admit(http)
        return models()

    # --- sessions ----------------------------------------------------------------------------------------------------

    async def _open(self, http: Request) -> Response:
        asked = await self._read(http, OpenRequest)
        if len(self._opened) >= MAX_SESSIONS:
            raise RequestError(
                429, f"there are {MAX_SESSIONS} sessions; delete those that have ended", "rate_limit_exceeded"
            )
        check_seed(asked.seed)
        seed = secrets.randbelow(SEEDS) if asked.seed is None else asked.seed % SEEDS
        params = _distribution(self._policy.params, asked)
        context = self._context(params, partial(derive_seed, "session", seed))
        session = Session(context)
        name = self._add(session)
        self._opened[name] = seed, context
        return as_json(200, {"id": name, "seed": seed, "base_url": session.base_url, "api_key": session.api_key})

    async def _show(self, http: Request) -> Response:
        name, session = self._named(http)
        seed, context = self._opened[name]
        lines = session.trajectories
        train_once(lines)
        return as_json(
            200,
            {"id": name, "seed": seed, "trajectories": [TrajectoryBody.of(line) for line in lines]}
            | {"counts": context.counts},
        )

    async def _delete(self, http: Request) -> Response:
        name, session = self._named(http)
        del self._sessions[name], self._opened[name]
        await session.close()
        return as_json(200, {"id": name, "deleted": True})

    def _named(self, http: Request) -> tuple[str, Session]:
        """Raises RequestError."""
        self._admit(http)
        name = http.path_params["name"]
        if (session := self._sessions.get(name)) is None:
            raise RequestError(404, "this session does not exist, or was deleted", ENDED)
        return name, session

    # --- weights -----------------------------------------------------------------------------------------------------

    async def _show_weights(self, http: Request) -> Response:
        self._admit(http)
        return as_json(200, msgspec.structs.asdict(self._weights))

    async def _load_weights(self, http: Request) -> Response:
        asked = await self._read(http, LoadRequest)
        if not Path(asked.path).is_absolute():
            raise RequestError(400, f"path: {asked.path!r:.200} is not an absolute path", param="path")
        async with self._loading:
            version = self._weights.version + 1 if asked.version is None else asked.version
            if not 0 <= version < SEEDS or version == self._weights.version:
                raise RequestError(
                    400, f"version: {version} is negative, or that of the weights in use; take another", param="version"
                )
            # to its end, also where the client leaves: the engines have these weights then
            if problem := await asyncio.shield(self._load(Load(asked.path, version, asked.running))):
                text = f"weights {self._weights.version} stay in use: {problem}"
                raise RequestError(400, text, "weights_refused", "path")
            self._weights = Weights(version, asked.path)
        return as_json(200, msgspec.structs.asdict(self._weights))

    async def _health(self, http: Request) -> Response:
        return as_json(200, {"status": "ok"})

    async def _read(self, http: Request, kind: type[T]) -> T:
        """Raises RequestError."""
        self._admit(http)
        with Body(self._under_way, _PLAIN) as body:
            return read_json(await body.read(http) or b"{}", kind)


def _distribution(params: SamplingParams, asked: Any) -> SamplingParams:
    """Return ``params`` with what ``asked`` has of temperature, top_p and top_k. Raises RequestError."""
    ranges = {
        "temperature": (lambda value: 0 <= value <= _HOTTEST, f"a number from 0 to {_HOTTEST:g}"),
        "top_p": (lambda value: 1e-6 <= value <= 1, "a number from 1e-6 to 1"),
        "top_k": (lambda value: value == int(value) and -1 <= value < 2**30, "a whole number from -1 to 2**30 - 1"),
    }
    changes = dict[str, Any]()
    for name, (holds, what) in ranges.items():
        if (value := getattr(asked, name)) is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not (is_number and holds(value)):
            raise RequestError(400, f"{name} = {value!r:.80} is not {what}", param=name)
        changes[name] = (int(value) or -1) if name == "top_k" else float(value)
    return msgspec.structs.replace(params, **changes)


async def _while_connected(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what ``work`` returns; it is cancelled where the client, whose whole request was read, has left. Raises
    RequestError."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestError(400, "the client has left")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gone


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
