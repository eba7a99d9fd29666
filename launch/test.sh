#!/usr/bin/env bash
# Set up .venv, then run the tests. Arguments go to pytest: launch/test.sh tests/config -k overrides
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

launch/setup.sh
exec .venv/bin/python -m pytest "$@"
