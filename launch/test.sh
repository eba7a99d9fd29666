#!/usr/bin/env bash
# Set up .venv, then run the tests, two files at a time. Arguments go to pytest: launch/test.sh tests/config -k overrides
# docs/testing.md describes what runs, and what -m "slow or many_ranks" adds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

launch/setup.sh
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile "$@"
