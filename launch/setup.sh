#!/usr/bin/env bash
# Create .venv with the pinned CPU stack, unless it exists and is up to date. quickstart.sh and test.sh begin with this.
# PYTHON=/path/to/python selects the interpreter; the package index is that of pip's configuration.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lock=launch/requirements-cpu.txt
stamp=.venv/.miles-spmd

fail() {
    echo "setup: error: $*" >&2
    exit 1
}

is_supported() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null
}

find_python() {
    local candidate pyenv=${PYENV_ROOT:-$(pyenv root 2>/dev/null || echo "$HOME/.pyenv")}
    # also where pyenv and uv keep theirs, which need not be on PATH
    for candidate in ${PYTHON:+"$PYTHON"} python3.12 python3 "$pyenv"/versions/3.12*/bin/python \
        "$(uv python find --no-python-downloads --no-project 3.12 2>/dev/null)"; do
        if is_supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.12 is required and was not found; install it (uv python install 3.12, pyenv install 3.12 or" \
        "conda create -n python312 python=3.12), or set PYTHON to its path"
}

install() {
    .venv/bin/python -m pip --quiet --disable-pip-version-check install --no-input --no-compile "$@"
}

folders=$(find miles_spmd -type d ! -name __pycache__ | sort) # an editable install knows which modules are packages
state=$(cat "$lock" pyproject.toml CMakeLists.txt kernels/* <(pwd) <(echo "$folders") | sha256sum)
if [[ -f $stamp && $(<"$stamp") == "$state" && -x .venv/bin/python ]]; then
    exit 0
fi

[[ $(uname -sm) == "Linux x86_64" ]] || fail "the pinned packages are for Linux on x86-64, not $(uname -sm)"
if [[ ! -x .venv/bin/python ]]; then
    python=$(find_python)
    "$python" -m venv .venv || fail "$python cannot create a virtual environment; install its venv module (python3-venv)"
elif ! is_supported .venv/bin/python; then
    fail ".venv has $(.venv/bin/python --version 2>&1), and 3.12 is required; remove it (rm -r .venv) and run this again"
fi
echo "setup: installing the packages of $lock into .venv, a few minutes the first time"
install --no-deps --requirement "$lock" || fail "the packages could not be installed; pip's message above says which"
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    echo "setup: this package index has torch for CUDA only; installing the libraries that it loads (gigabytes)"
    install --constraint "$lock" "$(grep '^torch==' "$lock")" || fail "torch could not be installed"
fi
# Compile bytecode on all cores: pip uses one, and without it every process of the first run would compile for itself.
.venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true
kernels=miles_spmd/invariant/cpu_kernels.so
rm -f "$kernels" # may be of other sources
install --no-deps --no-build-isolation --editable . || fail "the project itself could not be installed"
[[ -f $kernels ]] || echo "setup: warning: no C++ compiler found; torch operations replace the CPU kernels and are slower (docs/kernels.md)"
echo "$state" >"$stamp"
