"""The command `miles-spmd`."""

import signal
import sys

from miles_spmd.protocol.last_words import keep, say


def main() -> None:
    keep()
    try:
        from miles_spmd.cli import main as run  # what a verb imports takes seconds, in which Ctrl-C may come
    except KeyboardInterrupt:
        say("start: stopped by SIGINT")
        sys.exit(128 + signal.SIGINT)
    run()


if __name__ == "__main__":
    main()
