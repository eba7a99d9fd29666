"""Layouts, memory and batch schedule of a configuration on a number of ranks, before anything starts. Imports no torch."""
