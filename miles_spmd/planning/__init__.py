"""What a configuration means on a number of ranks, before anything is started. Imports no torch."""
