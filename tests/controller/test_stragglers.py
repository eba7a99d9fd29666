"""Who is called slow, and who is not."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from miles_spmd.controller.journal.stragglers import PERSISTS, StragglerWatch
from miles_spmd.protocol.messages import EngineRank, OwnWork, RankInfo, TrainerRank
from miles_spmd.telemetry.stragglers import read_stragglers
from miles_spmd.types.engine_group import JUDGE, POLICY
from miles_spmd.types.phase import Phase


class Watched:
    """Ranks whose work in a phase is given step by step. ``replica``: ranks that wait for each other."""

    def __init__(self, folder: Path, ranks: int, replica: int = 1) -> None:
        self.warnings: list[str] = []
        self.folder = folder
        self.watch = StragglerWatch(folder, self.warnings.append)
        self.infos = [
            RankInfo(
                rank=rank,
                world_size=ranks,
                host=f"node-{rank // 4}",
                pid=1,
                trainer=TrainerRank(rank // replica, ranks // replica, True),
                engine=EngineRank(rank // replica, rank % replica == 0),
                device=f"GPU {rank % 4}",
            )
            for rank in range(ranks)
        ]
        self.step = 0

    def add(self, seconds: list[float], amounts: list[float] | None = None, phase: Phase = Phase.TRAIN) -> float:
        """The metric of one step."""
        self.step += 1
        work = {(phase, rank): OwnWork(s, (amounts or [100.0] * len(seconds))[rank]) for rank, s in enumerate(seconds)}
        return self.watch.add(self.step, work, self.infos)[f"perf/{phase}_slowest"]


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_rank_that_stays_slow_is_named_once(tmp_path: Path, ranks: int) -> None:
    watched = Watched(tmp_path, ranks)
    for step in range(2 * PERSISTS):
        assert watched.add([1.0] * (ranks - 1) + [1.5]) == pytest.approx(1.5)
        assert len(watched.warnings) == (step + 1 >= PERSISTS)
    last = ranks - 1
    assert watched.warnings[0].startswith(
        f"rank {last} (node-{last // 4}, GPU {last % 4}): 1.50 x as slow as its peers in train"
    )
    assert "1.50 s of its own work instead of 1.00 s, compared per token" in watched.warnings[0]
    stragglers = read_stragglers(tmp_path)
    assert stragglers is not None
    assert (stragglers.first, stragglers.last, len(stragglers.rows)) == (1, 2 * PERSISTS, ranks)
    assert [row.ranks for row in stragglers.rows if row.slow] == [[last]]
    assert stragglers.rows[0].ranks == [last]
    assert (stragglers.rows[0].median, stragglers.rows[0].longest) == (1.5, 1.5)


def test_a_judge_is_no_peer_of_the_policy(tmp_path: Path) -> None:
    watched = Watched(tmp_path, 4)
    watched.infos = [msgspec.structs.replace(info, group=JUDGE if info.rank > 1 else POLICY) for info in watched.infos]
    for _ in range(2 * PERSISTS):
        assert watched.add([1.0, 1.0, 9.0, 9.0], phase=Phase.ROLLOUT) == 1.0
    assert not watched.warnings
    for _ in range(PERSISTS):
        assert watched.add([1.0, 1.0, 9.0, 18.0], phase=Phase.ROLLOUT) == 2.0
    assert watched.warnings[0].startswith("rank 3 (node-0, GPU 3): 2.00 x as slow as its peers in rollout")


def test_a_rank_that_is_slow_now_and_then_is_not(tmp_path: Path) -> None:
    watched = Watched(tmp_path, 4)
    for step in range(4 * PERSISTS):
        watched.add([1.0, 1.0, 1.0, 1.0 if step % PERSISTS == 0 else 3.0])
    assert not watched.warnings


def test_more_work_is_not_slowness(tmp_path: Path) -> None:
    watched = Watched(tmp_path, 2)
    for _ in range(2 * PERSISTS):
        assert watched.add([1.0, 2.0], [100.0, 200.0]) == 1.0
    assert not watched.warnings


def test_a_difference_that_costs_nothing_is_no_warning(tmp_path: Path) -> None:
    watched = Watched(tmp_path, 2)
    for _ in range(2 * PERSISTS):
        assert watched.add([0.01, 0.05]) == pytest.approx(5.0)
    assert not watched.warnings


@pytest.mark.parametrize("phase", [Phase.TRAIN, Phase.ROLLOUT])
def test_ranks_that_wait_for_a_slow_one_are_not_called_slow_alone(tmp_path: Path, phase: Phase) -> None:
    """Two replicas of two ranks: within one, both take as long as the slower of them."""
    watched = Watched(tmp_path, 4, replica=2)
    for _ in range(PERSISTS):
        watched.add([1.0, 1.0, 2.0, 2.0], phase=phase)
    (warning,) = watched.warnings
    assert warning.startswith(
        "rank 2 (node-0, GPU 2), rank 3 (node-0, GPU 3) together, which wait for each other: 2.00 x"
    )


def test_one_unit_has_no_peers(tmp_path: Path) -> None:
    watched = Watched(tmp_path, 2, replica=2)
    with pytest.raises(KeyError):
        watched.add([1.0, 1.0])
    assert read_stragglers(tmp_path) is None
