"""The models beside the policy: critic, reward model, teacher, reference, old actor; and losses of pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from miles_spmd.config import Config
from miles_spmd.protocol.results import LogProbsResult
from miles_spmd.training.network import Network
from miles_spmd.training.roles import Roles
from miles_spmd.types.role import Role
from miles_spmd.types.train_sequence import MicroBatch, TrainSequence
from tests.models import tiny
from tests.ranks import Ranks
from tests.training.cases import (
    CP2,
    PLAIN_SGD,
    PP2,
    SP,
    TP2,
    VPP2,
    ZERO,
    Held,
    config,
    held,
    oracle_scores,
    sequences,
    whole_weights,
)

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "DP2": (2, {}),
    "TP2": (2, TP2),
    "TP2+SP": (2, TP2 | SP),
    "PP2": (2, PP2),
    "VPP2": (2, PP2 | VPP2),
    "CP2": (2, CP2),
}
KL = {"kl_loss_coef": 0.1}
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    tiny.build_classifier("qwen3").save_pretrained(folder)
    return folder


def in_pairs(batch: Sequence[TrainSequence]) -> list[TrainSequence]:
    """Preferred and rejected in turn, every pair's tokens weighted to a sum of 1 / pairs."""
    out = []
    for i, sequence in enumerate(batch):
        mask = (sequence.loss_weights != 0).astype(np.float32)
        mask[0] = 0
        pair = (batch[i - i % 2], batch[i - i % 2 + 1])
        trained = sum(float((s.loss_weights[1:] != 0).sum()) for s in pair)
        weights = mask / np.float32(trained * len(batch) / 2)
        sign = np.full(len(mask), 1 - 2 * (i % 2), np.float32)
        out.append(msgspec.structs.replace(sequence, loss_weights=weights, pair_signs=sign))
    return out


def with_targets(batch: Sequence[TrainSequence]) -> list[TrainSequence]:
    def one(sequence: TrainSequence) -> TrainSequence:
        old, returns = RNG.normal(size=(2, len(sequence.tokens))).astype(np.float32)
        return msgspec.structs.replace(sequence, returns=returns, old_values=0.3 * old)

    return [one(sequence) for sequence in batch]


BATCH = sequences((5, 17, 40, 9, 30, 31, 4, 12))
VALUED = with_targets(BATCH)
PAIRS = in_pairs(BATCH)


# --- on a rank -------------------------------------------------------------------------------------------------------


def dealt(batch: Sequence[TrainSequence], network: Network) -> list[MicroBatch]:
    """This replica's share in two micro-batches, two sequences that follow each other in one."""
    couples = [list(batch[i : i + 2]) for i in range(0, len(batch), 2)]
    own = couples[network.where.dp_rank :: network.where.dp_size]
    return [list(chain(*own[i::2])) for i in range(2)]


def one_update(run: Config, batch: list[TrainSequence], role: Role) -> tuple[Any, float, Held, Held, dict[str, float]]:
    """Return the scores of this replica's share of ``batch``, by tokens; the gradient norm; weights before and after;
    the loss's sums."""
    roles = Roles(run)
    trainer = roles.trainer(role)
    micro_batches = dealt(batch, trainer)
    is_value = role is Role.CRITIC or run.run.mode == "rm"
    scores = trainer.values(micro_batches).values if is_value else trainer.log_probs(micro_batches).log_probs
    before, actor = held(trainer), held(roles.actor)
    result = trainer.train_step(micro_batches)
    if role is Role.CRITIC:
        assert all(np.array_equal(value, actor.weights[name]) for name, value in held(roles.actor).weights.items())
    keyed = [(s.tokens.tobytes(), v) for s, v in zip(chain(*micro_batches), scores or [])]
    return keyed, result.grad_norm, before, held(trainer), result.sums[0] if trainer.where.reports else {}


# --- the oracle ------------------------------------------------------------------------------------------------------


def oracle_values(model: Any, tokens: np.ndarray) -> Tensor:
    """Return the head's output at the position before each token; 0 for the first."""
    hidden = model.model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).last_hidden_state[0]
    return torch.cat((torch.zeros(1), model.score(hidden[:-1])[:, 0]))


def check(
    steps: list[Any],
    model: Any,
    batch: list[TrainSequence],
    scores: Callable[[np.ndarray], Tensor],
    loss: Tensor,
    value_head: bool,
) -> None:
    """Compare every rank's scores, the loss and the update with transformers and autograd."""
    loss.backward()
    gradient = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    expected = {s.tokens.tobytes(): (s.loss_weights != 0, scores(s.tokens).detach().numpy()) for s in batch}
    found = [pair for keyed, *_ in steps for pair in keyed]
    assert {key for key, _ in found} == expected.keys()
    for key, values in found:
        trained, theirs = expected[key]
        np.testing.assert_allclose(values[1:], np.where(trained, theirs, 0)[1:], rtol=0, atol=3e-6)
    assert sum(sums.get("loss", 0.0) for *_, sums in steps) == pytest.approx(loss.item(), rel=1e-6, abs=2e-6)
    before, after = (whole_weights("qwen3", [step[i] for step in steps], value_head) for i in (2, 3))
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradient.values()))
    assert [step[1] for step in steps] == pytest.approx([norm] * len(steps), rel=1e-5)
    for tensor, value in gradient.items():
        rounding = 2e-6 * max(1.0, np.abs(value).max())  # of the update, and of fp32 sums in another reduction order
        np.testing.assert_allclose(before[tensor] - after[tensor], value, rtol=1e-4, atol=rounding, err_msg=tensor)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_critic(ranks: Ranks, classifier: Path, layout: str) -> None:
    world_size, table = LAYOUTS[layout]
    ppo = {"advantage_estimator": "ppo", "value_clip": 0.3}
    run = config("qwen3", table | PLAIN_SGD, algorithm=ppo, model={"critic_load": str(classifier)})
    steps = ranks.run(world_size, one_update, run, VALUED, Role.CRITIC)
    model = tiny.build_classifier("qwen3")
    losses = []
    for s in VALUED:
        weights, returns, old = map(torch.from_numpy, (s.loss_weights, s.returns, s.old_values))
        values = oracle_values(model, s.tokens)
        clipped = torch.minimum(torch.maximum(values, old - 0.3), old + 0.3)
        losses.append((weights * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2))[1:].sum())
    check(steps, model, VALUED, lambda tokens: oracle_values(model, tokens), torch.stack(losses).sum(), True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reward_model(ranks: Ranks, classifier: Path, layout: str) -> None:
    world_size, table = LAYOUTS[layout]
    run = config("qwen3", table | PLAIN_SGD, run={"mode": "rm"}, model={"hf_checkpoint": str(classifier)})
    steps = ranks.run(world_size, one_update, run, PAIRS, Role.ACTOR)
    model = tiny.build_classifier("qwen3")
    scores = [oracle_values(model, s.tokens)[torch.from_numpy(s.loss_weights != 0)].sum() for s in PAIRS]
    loss = -torch.stack([torch.sigmoid(c - r).log() for c, r in zip(scores[::2], scores[1::2])]).mean()
    check(steps, model, PAIRS, lambda tokens: oracle_values(model, tokens), loss, True)


@pytest.mark.parametrize("kind", ["dpo", "ipo", "simpo"])
@pytest.mark.parametrize("layout", ["one", "TP2+SP", "PP2", "CP2"])
def test_preferences(ranks: Ranks, layout: str, kind: str) -> None:
    world_size, table = LAYOUTS[layout]
    algorithm = {"preference_loss": kind, "dpo_beta": 0.2, "simpo_gamma": 0.3}
    run = config("qwen3", table | PLAIN_SGD, run={"mode": "dpo"}, algorithm=algorithm)
    steps = ranks.run(world_size, one_update, run, PAIRS, Role.ACTOR)
    model, margins = tiny.build("qwen3"), []
    for chosen, rejected in zip(PAIRS[::2], PAIRS[1::2]):
        scores = []
        for s in (chosen, rejected):
            mask = torch.from_numpy(s.loss_weights != 0)
            log_probs = oracle_scores(model, s.tokens)[0][mask]
            ref = torch.from_numpy(s.ref_log_probs)[mask]
            scores.append(log_probs.mean() if kind == "simpo" else (log_probs - ref).sum())
        margins.append(scores[0] - scores[1])
    h = torch.stack(margins)
    loss = {
        "dpo": -torch.nn.functional.logsigmoid(0.2 * h),
        "ipo": (h - 2.5) ** 2,
        "simpo": -torch.nn.functional.logsigmoid(0.2 * h - 0.3),
    }[kind].mean()
    check(steps, model, PAIRS, lambda tokens: oracle_scores(model, tokens)[0], loss, False)


def incomplete_pair(run: Config) -> str:
    with pytest.raises(ValueError, match="pairs") as raised:
        Roles(run).actor.train_step([PAIRS[:3]])
    return str(raised.value)


def test_a_pair_must_be_in_one_micro_batch(ranks: Ranks) -> None:
    (message,) = ranks.run(1, incomplete_pair, config("qwen3", run={"mode": "dpo"}))
    assert "3 sequences; each pair's two must be in one" in message


# --- teacher ---------------------------------------------------------------------------------------------------------


def teacher_candidates(run: Config) -> tuple[bytes, LogProbsResult, LogProbsResult]:
    roles = Roles(run)
    micro_batches = dealt(BATCH, roles.actor)
    with roles.network(Role.TEACHER) as teacher:
        likely = teacher.log_probs(micro_batches, top_k=5)
    candidates = [likely.candidates]
    dist.broadcast_object_list(candidates)  # as the controller sends them to every rank
    order = list(chain(*micro_batches))
    with_candidates = [msgspec.structs.replace(s, candidates=c) for s, c in zip(order, candidates[0] or [])]
    halves = [with_candidates[: len(micro_batches[0])], with_candidates[len(micro_batches[0]) :]]
    with roles.network(Role.ACTOR) as actor:
        given = actor.log_probs(halves)
    return b"".join(s.tokens.tobytes() for s in order), likely, given


@pytest.mark.parametrize("layout", ["one", "TP2+SP", "CP2"])
def test_teacher_of_another_family(ranks: Ranks, layout: str) -> None:
    world_size, table = LAYOUTS[layout]
    algorithm = {"opd_kl_coef": 1.0, "opd_log_prob_top_k": 5}
    run = config("qwen3", table, algorithm=algorithm, model={"teacher_load": str(tiny.checkpoint("qwen2"))})
    tokens, likely, given = ranks.run(world_size, teacher_candidates, run)[0]
    student, teacher = tiny.build("qwen3"), tiny.build("qwen2")
    by_tokens = {s.tokens.tobytes(): s for s in BATCH}
    start = 0
    assert likely.log_probs
    for i, log_probs in enumerate(likely.log_probs):
        key = tokens[start : start + 4 * len(log_probs)]
        start += len(key)
        sequence = by_tokens[key]
        scored = np.flatnonzero(sequence.loss_weights[1:] != 0) + 1
        ids = torch.from_numpy(sequence.tokens.astype(np.int64))[None]
        with torch.no_grad():
            t_TV, s_TV = (model(input_ids=ids).logits[0].log_softmax(-1)[scored - 1] for model in (teacher, student))
        chosen = torch.from_numpy(sequence.tokens.astype(np.int64))[scored, None]
        np.testing.assert_allclose(log_probs[scored], t_TV.gather(1, chosen)[:, 0], rtol=0, atol=3e-6)
        best = t_TV.topk(5)
        assert likely.candidates is not None
        assert likely.candidate_log_probs is not None
        assert given.given_log_probs is not None
        np.testing.assert_array_equal(likely.candidates[i][scored], best.indices)
        np.testing.assert_allclose(likely.candidate_log_probs[i][scored], best.values, rtol=0, atol=3e-6)
        np.testing.assert_allclose(given.given_log_probs[i][scored], s_TV.gather(1, best.indices), rtol=0, atol=3e-6)
    assert start == len(tokens)


# --- snapshots of the actor ------------------------------------------------------------------------------------------


def log_probs_of(roles: Roles, role: Role) -> np.ndarray:
    with roles.network(role) as network:
        return np.concatenate(network.log_probs(dealt(BATCH, network)).log_probs or [np.zeros(1)])


def snapshots_while_training(run: Config) -> dict[str, np.ndarray]:
    roles = Roles(run)
    storage = {name: weight.data_ptr() for name, weight in roles.actor.weights().items()}
    log_probs = {"first": log_probs_of(roles, Role.ACTOR), "ref": log_probs_of(roles, Role.REF)}
    for _ in range(3):
        roles.actor.train_step(dealt(BATCH, roles.actor))
    log_probs |= {"trained": log_probs_of(roles, Role.ACTOR), "ref after": log_probs_of(roles, Role.REF)}
    log_probs["old actor"] = log_probs_of(roles, Role.OLD_ACTOR)
    roles.snapshot(Role.REF)
    log_probs |= {"ref refreshed": log_probs_of(roles, Role.REF), "again": log_probs_of(roles, Role.ACTOR)}
    assert storage == {name: weight.data_ptr() for name, weight in roles.actor.weights().items()}
    return log_probs


@pytest.mark.parametrize("table", [{}, TP2 | SP, ZERO], ids=["DP2", "TP2+SP", "DP2+distributed"])
def test_snapshots_stay_while_the_actor_learns(ranks: Ranks, table: dict[str, Any]) -> None:
    lagging = {"refit": {"update_weights_interval": 2}}
    run = config("qwen3", table | {"lr": 1e-2}, algorithm=KL | {"keep_old_actor": True}, **lagging)
    log_probs = ranks.run(2, snapshots_while_training, run)[0]
    for name in ("ref", "ref after", "old actor"):
        np.testing.assert_array_equal(log_probs[name], log_probs["first"])
    for name in ("ref refreshed", "again"):
        np.testing.assert_array_equal(log_probs[name], log_probs["trained"])
    assert np.abs(log_probs["trained"] - log_probs["first"]).max() > 0.1


def first_log_probs(run: Config, role: Role) -> np.ndarray:
    return log_probs_of(Roles(run), role)


def test_reference_from_another_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    other = tiny.build("qwen3")
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    other.save_pretrained(tmp_path)
    run = config("qwen3", algorithm=KL, model={"ref_load": str(tmp_path)})
    (actor,), (ref,) = (ranks.run(1, first_log_probs, run, role) for role in (Role.ACTOR, Role.REF))
    (expected,) = ranks.run(1, first_log_probs, config("qwen3", model={"hf_checkpoint": str(tmp_path)}), Role.ACTOR)
    np.testing.assert_array_equal(ref, expected)
    assert np.abs(actor - ref).max() > 0.1


def missing_role(run: Config, role: Role) -> str:
    with pytest.raises(ValueError, match="this run") as raised:
        log_probs_of(Roles(run), role)
    return str(raised.value)


@pytest.mark.parametrize("role", [Role.REF, Role.CRITIC, Role.TEACHER, Role.OLD_ACTOR])
def test_a_role_that_the_run_does_not_have(ranks: Ranks, role: Role) -> None:
    (message,) = ranks.run(1, missing_role, config("qwen3"), role)
    assert f"no {role}" in message


# --- checkpoints -----------------------------------------------------------------------------------------------------


def interrupted(run: Config, folder: str, stop: bool) -> list[dict[str, np.ndarray]]:
    """Make two steps of actor and critic and a new reference, with ``stop`` save and load it all by new objects, and
    make two more steps."""

    def steps(roles: Roles) -> None:
        for _ in range(2):
            roles.trainer(Role.CRITIC).train_step(dealt(VALUED, roles.actor))
            roles.actor.train_step(dealt(BATCH, roles.actor))

    roles = Roles(run)
    steps(roles)
    roles.snapshot(Role.REF)
    if stop:
        roles.save(folder)
        of_ranks = [roles.save_progress(wait=True).digests] * dist.get_world_size()
        dist.all_gather_object(of_ranks, of_ranks[0])  # as the controller sends them to every rank
        digests = {name: [of_rank[name] for of_rank in of_ranks] for name in of_ranks[0]}
        assert set(digests) == {"actor", "critic", "ref"}
        del roles
        roles = Roles(run)
        assert roles.load(folder, digests).problem == ""
    steps(roles)
    with roles.network(Role.REF) as ref:
        reference = {name: weight.numpy().copy() for name, weight in ref.weights().items()}
    return [held(roles.actor).weights, held(roles.trainer(Role.CRITIC)).weights, reference]


@pytest.mark.parametrize("table", [TP2 | SP, ZERO], ids=["TP2+SP", "DP2+distributed"])
def test_everything_resumes(ranks: Ranks, tmp_path: Path, table: dict[str, Any]) -> None:
    algorithm = KL | {"advantage_estimator": "ppo", "ref_update_interval": 2}
    run = config("qwen3", table | {"lr": 1e-2}, algorithm=algorithm, train={"critic_lr": 3e-2})
    straight, resumed = (ranks.run(2, interrupted, run, str(tmp_path), stop) for stop in (False, True))
    for ours, theirs in zip(straight, resumed):
        for expected, actual in zip(ours, theirs, strict=True):
            assert expected.keys() == actual.keys()
            for name, value in expected.items():
                np.testing.assert_array_equal(actual[name], value, err_msg=name)


# --- export ----------------------------------------------------------------------------------------------------------


def exported_reward_model(run: Config, folder: str) -> list[np.ndarray]:
    roles = Roles(run)
    roles.actor.train_step(dealt(PAIRS, roles.actor))
    roles.actor.export(folder, run.model.hf_checkpoint)
    return roles.actor.values([PAIRS]).values or []


@pytest.mark.parametrize("layout", ["TP2+SP", "PP2"])
def test_a_reward_model_is_transformers_classifier(ranks: Ranks, tmp_path: Path, layout: str) -> None:
    """Trained from a policy's checkpoint: the head starts with zeros, and is exported after a step."""
    world_size, table = LAYOUTS[layout]
    run = config("qwen3", table | PLAIN_SGD | {"lr": 0.1}, run={"mode": "rm"})
    per_rank = ranks.run(world_size, exported_reward_model, run, str(tmp_path / "export"))
    scores = next(values for values in per_rank if values)
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.num_labels == 1
    assert model.score.weight.abs().max() > 0.01
    for sequence, values in zip(PAIRS, scores, strict=True):
        trained = sequence.loss_weights != 0
        with torch.no_grad():
            theirs = oracle_values(model, sequence.tokens).numpy()
        np.testing.assert_allclose(values[trained], theirs[trained], rtol=1e-6, atol=3e-6)
