"""Which of the samples that a step has collected it trains on, where functions of the user decide that."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import msgspec

from miles_spmd.algorithms.rewards import kept_samples
from miles_spmd.config import Config
from miles_spmd.config.rollout import ACCEPTANCE
from miles_spmd.controller.generation.acceptance import Group
from miles_spmd.plugins.data import Acceptor
from miles_spmd.plugins.plug_point import PlugPoint
from miles_spmd.types.sample import Sample
from miles_spmd.types.trajectory import Segment, by_version

ACCEPTORS: PlugPoint[Acceptor] = PlugPoint("rollout.acceptance", {}, Acceptor)


def selected(config: Config, step: int, groups: list[Group]) -> list[Group]:
    """Return the groups of ``step`` that ``rollout.acceptance`` chooses, and let the loss count only those of their
    samples, and tokens, that the configuration asks for."""
    if config.rollout.acceptance not in ACCEPTANCE:
        groups = _chosen(config.rollout.acceptance, groups, config.rollout.rollout_batch_size)
    if config.rollout.mask_offpolicy_in_partial_rollout:
        groups = [[_of_version(sample, step) for sample in group] for group in groups]
    if config.algorithm.sample_filter is not None and groups:
        kept = iter(kept_samples(config.algorithm.sample_filter, list(chain.from_iterable(groups))))
        groups = [[sample if next(kept) else _without_loss(sample) for sample in group] for group in groups]
    return groups


def _chosen(name: str, groups: list[Group], count: int) -> list[Group]:
    """Return the ``count`` groups that a user's function chooses, or all where there are not more."""
    if len(groups) <= count:
        return groups
    returned = ACCEPTORS.resolve(name)(groups, count)
    try:
        numbers = [int(number) for number in returned]
    except (TypeError, ValueError):
        numbers = []
    if len(set(numbers)) != count or len(numbers) != count or not {*numbers} <= {*range(len(groups))}:
        raise ACCEPTORS.returned(name, returned, f"{count} different numbers from 0 to {len(groups) - 1}")
    return [groups[number] for number in numbers]


def _without_loss(sample: Sample) -> Sample:
    return _with_segments(sample, [msgspec.structs.replace(one, trained=False) for one in sample.trajectory.segments])


def _of_version(sample: Sample, step: int) -> Sample:
    """Return ``sample`` without a loss for the tokens that other weights than version ``step`` have sampled."""
    return _with_segments(sample, [part for one in sample.trajectory.segments for part in by_version(one, step)])


def _with_segments(sample: Sample, segments: Sequence[Segment]) -> Sample:
    return msgspec.structs.replace(sample, trajectory=msgspec.structs.replace(sample.trajectory, segments=[*segments]))
