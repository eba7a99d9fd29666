"""`miles-spmd chaos`: a run into which faults are injected, which is continued whenever it has ended, and a table of
what each fault did to it.

The run is one of its own beside the training run of the same recipe. Its controller strikes
(:mod:`miles_spmd.controller.journal.faults`); this process starts it, watches it from outside, and judges it.
"""
