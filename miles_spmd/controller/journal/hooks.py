"""The user's hook, which is called before and after each phase."""

from __future__ import annotations

import sys

from miles_spmd.controller.journal import events
from miles_spmd.plugins.plug_point import PlugPoint
from miles_spmd.plugins.run import Moment, PhaseHook

PHASE_HOOKS: PlugPoint[PhaseHook] = PlugPoint("run.phase_hook", {}, PhaseHook)


class Hook:
    """Observes a run for the function ``run.phase_hook``."""

    def __init__(self, name: str) -> None:
        self._call = PHASE_HOOKS.resolve(name)
        self._steps: list[int] = []  # of the phases that have begun
        self._groups: events.Groups = ()

    def observe(self, event: events.Event) -> None:
        match event:
            case events.PhaseStarted(phase, step):
                self._steps.append(step)
                self._call(Moment(phase, step, groups=self._groups))
            case events.PhaseFinished(phase, seconds):
                step = self._steps.pop()
                if sys.exception() is None:  # else the phase has failed, and that is what the run has to end with
                    self._call(Moment(phase, step, True, seconds, self._groups))
            case events.RolloutFinished(_, groups):
                self._groups = groups
