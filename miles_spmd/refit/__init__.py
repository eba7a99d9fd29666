"""Weights from any trainer layout to any engine layout. Knows neither backend, only checkpoint rectangles."""

from miles_spmd.refit.refit import Refit, RefitCounts
from miles_spmd.refit.verify import RefitError

__all__ = ["Refit", "RefitCounts", "RefitError"]
