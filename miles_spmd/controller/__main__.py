"""Started by rank 0 as ``python -m miles_spmd.controller PIPE``; see :mod:`miles_spmd.controller.process`."""

import sys

from miles_spmd.controller.process import main

if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
