"""Started by rank 0 as ``python -m miles_spmd.controller PIPE``; see :mod:`miles_spmd.controller.process`."""

import sys

from miles_spmd.controller.process import main
from miles_spmd.protocol.last_words import keep

if __name__ == "__main__":
    keep()
    sys.exit(main(int(sys.argv[1])))
