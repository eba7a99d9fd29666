"""A script such as users write, without `if __name__ == "__main__"`."""

import sys

sys.exit(2)
