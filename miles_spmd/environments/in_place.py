"""Environments that only wait for the policy, without a process and an event loop of their own."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from miles_spmd.environments.context import EpisodeContext, ModelView
from miles_spmd.environments.messages import Ask, Begin, Cancel, Completed, Event, Order
from miles_spmd.plugins.environment import Environment

Episode = Coroutine[Ask, Completed, Any]


@types.coroutine
def _ask(ask: Ask) -> Generator[Ask, Completed, Completed]:
    """Suspend the environment until the policy has sampled."""
    return (yield ask)


class InPlace:
    """Calls ``environment`` in this thread: each order runs it up to its next request, or its end."""

    def __init__(self, environment: Environment, model: ModelView) -> None:
        self.events: deque[Event] = deque()
        self._environment, self._model = environment, model
        self._running: dict[int, tuple[EpisodeContext, Episode]] = {}

    def send(self, order: Order) -> None:
        """Execute an order; what comes of it is in ``events``."""
        match order:
            case Begin():
                context = EpisodeContext(order, self._model, _ask)
                self._running[order.episode] = context, self._environment(context, order.prompt)  # type: ignore[assignment]
                self._advance(order.episode, lambda episode: episode.send(None))  # type: ignore[arg-type]
            case Completed():
                self._advance(order.episode, lambda episode: episode.send(order))
            case Cancel() if order.episode in self._running:  # else it has ended meanwhile
                self._running.pop(order.episode)[1].close()

    def _advance(self, number: int, resume: Callable[[Episode], Ask]) -> None:
        context, episode = self._running[number]
        try:
            self.events.append(resume(episode))
            return
        except StopIteration as stop:
            self.events.append(context.finished(stop.value))
        except Exception as error:
            self.events.append(context.failed(error))
        del self._running[number]

    def close(self) -> None:
        for _, episode in self._running.values():
            episode.close()
        self._running.clear()
