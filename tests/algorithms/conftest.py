from __future__ import annotations

from hypothesis import settings

# examples are cheap, but the machines that run them are shared: time says nothing about a fault
settings.register_profile("algorithms", deadline=None, max_examples=40)
settings.load_profile("algorithms")
