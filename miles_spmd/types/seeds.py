"""Seeds are pure functions of identity: never of time, arrival order or layout."""

from __future__ import annotations

import hashlib

import msgspec


def derive_seed(*identity: int | str) -> int:
    """A 63-bit seed from what names the thing to be seeded; equal identities, and only they, give equal seeds."""
    # JSON keeps ("a", "b") and ("ab",) apart, and 1 from "1".
    digest = hashlib.blake2b(msgspec.json.encode(identity), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sample_seed(run_seed: int, step: int, prompt_uid: str, sample: int, turn: int = 0) -> int:
    """The seed of one request to the engine: sample number ``sample`` of a prompt, in its ``turn``-th turn."""
    return derive_seed("sample", run_seed, step, prompt_uid, sample, turn)
