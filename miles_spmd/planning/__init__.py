"""What a configuration means on a number of ranks, before anything starts: layouts, memory, batch schedule. Imports no
torch."""
