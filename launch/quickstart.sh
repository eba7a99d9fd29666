#!/usr/bin/env bash
# From a fresh checkout to a model trained by reinforcement learning, on a CPU. Writes into runs/quickstart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

launch/setup.sh
exec .venv/bin/python -m miles_spmd.quickstart --install-seconds "$SECONDS" "$@"
