"""Random rollouts: groups of any size, siblings, players, shuffled, empty and fully masked samples, far-off ratios."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from miles_spmd.types.rollout_batch import RolloutBatch


@st.composite
def rollouts(draw: st.DrawFn) -> RolloutBatch:
    siblings = draw(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), max_size=4))  # per group and rollout
    group_ids = [g for g, group in enumerate(siblings) for n in group for _ in range(n)]
    rollout_ids = np.repeat(np.arange(sum(map(len, siblings))), [n for group in siblings for n in group])
    n = len(group_ids)
    lengths = draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    binary = draw(st.booleans())  # then many groups have no variance
    rewards = rng.integers(0, 2, len(siblings) * 4 * 3) * 1.0 if binary else rng.normal(size=len(siblings) * 4 * 3) * 3
    masks = [(rng.random(length) < draw(st.sampled_from([0.0, 0.7, 1.0]))).astype(np.float32) for length in lengths]
    order = rng.permutation(n)

    def per_token(spread: float) -> list[np.ndarray]:
        arrays = [-rng.random(length) - spread * rng.normal(size=length) for length in lengths]
        for array, mask in zip(arrays, masks):  # what stands under the mask must not matter, whatever it is
            array[mask == 0] = np.nan
            array[rng.random(len(array)) < 0.1] -= rng.choice([0.0, 25.0])
        return [arrays[i].astype(np.float32) for i in order]

    games = rng.choice(["kuhn", "nim"], len(siblings) * 4 * 3)
    roles = rng.choice(["first", "second"], len(siblings) * 4 * 3)
    turn_rewards = None  # of turns that end at any token, trained or not
    if draw(st.booleans()):
        turn_rewards = [rng.normal(size=lengths[i]) * (rng.random(lengths[i]) < 0.4) for i in order]
    return RolloutBatch(
        turn_rewards=turn_rewards,
        rewards=rewards[rollout_ids[order]] if n else np.zeros(0),
        group_ids=np.asarray(group_ids, np.int64)[order],
        rollout_ids=rollout_ids[order],
        masks=[masks[i] for i in order],
        old_log_probs=per_token(0.1),
        rollout_log_probs=per_token(0.1),
        ref_log_probs=per_token(0.1),
        teacher_log_probs=per_token(1.0),
        values=per_token(1.0),
        players=[(str(games[i]), str(roles[i])) for i in rollout_ids[order]],
        baselines=draw(st.sampled_from([{}, {"kuhn": {"first": 0.5, "second": -0.25}}])),
    )


def one_per_group(rewards: list[list[float]], lengths: int = 1, **more: list[np.ndarray]) -> RolloutBatch:
    """Groups of rewards, every sample a rollout of ``lengths`` trained tokens."""
    flat = np.asarray([r for group in rewards for r in group])
    ids = np.repeat(np.arange(len(rewards)), [len(group) for group in rewards])
    return RolloutBatch(flat, ids, [np.ones(lengths, np.float32)] * len(flat), **more)  # type: ignore[arg-type]
