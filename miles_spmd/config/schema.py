"""The tables of settings, under the name by which other rooms import them."""

from miles_spmd.config import *  # noqa: F403
