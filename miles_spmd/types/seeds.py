"""Seeds, as pure functions of identity: they depend on no time, arrival order or layout."""

import hashlib

import msgspec


def derive_seed(*identity: int | str) -> int:
    """Return a 63-bit seed for what ``identity`` names. Different identities have different seeds."""
    # JSON keeps ("a", "b") and ("ab",) apart, and 1 from "1".
    digest = hashlib.blake2b(msgspec.json.encode(identity), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sample_seed(
    run_seed: int, step: int, prompt_uid: str, sample: int, turn: int = 0, trajectory: int = 0, path: str = ""
) -> int:
    """Return the seed of one request to the engine: sample ``sample`` of a prompt in a step, in turn ``turn`` of one of
    its trajectories, or on a ``path`` that names the turn by what came before it."""
    if path:
        return derive_seed("sample", run_seed, step, prompt_uid, sample, path)
    sibling = (trajectory,) if trajectory else ()
    return derive_seed("sample", run_seed, step, prompt_uid, sample, turn, *sibling)
