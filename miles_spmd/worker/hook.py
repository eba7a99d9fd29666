"""The user's hook in a rank that trains, which is called before and after each of its phases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from miles_spmd.plugins.plug_point import PlugPoint
from miles_spmd.plugins.training import TrainerHook
from miles_spmd.types.role import Role

if TYPE_CHECKING:
    from miles_spmd.training.network import Network

TRAINER_HOOKS: PlugPoint[TrainerHook] = PlugPoint("train.trainer_hook", {}, TrainerHook)


class Hook:
    """What ``train.trainer_hook`` names, or nothing."""

    def __init__(self, name: str | None) -> None:
        self._call = None if name is None else TRAINER_HOOKS.resolve(name)

    @contextmanager
    def around(self, phase: str, role: Role, network: Network) -> Iterator[None]:
        """Call the hook before and after the block, in which ``network`` is at work."""
        self.call(phase, role, network, ends=False)
        yield
        self.call(phase, role, network, ends=True)

    def call(self, phase: str, role: Role, network: Network, *, ends: bool) -> None:
        if self._call is not None:
            self._call(phase, ends=ends, role=str(role), weights=network.weights())
