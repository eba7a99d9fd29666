"""Faults that `miles-spmd chaos` injects into a run: which there are, where each strikes, what it does to processes."""
