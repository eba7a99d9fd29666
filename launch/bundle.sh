#!/usr/bin/env bash
# The pinned GPU runtime for machines without network: launch/bundle.sh OUT [--part-mib N] [--te WHEEL]
#
# Needs pip, unzip, strip and xz here, 3 GB of disk for a while and no GPU. --te adds Transformer Engine: WHEEL is its
# transformer_engine_torch, which the package index has as source only; docs/gpu.md describes how to build it. Copy
# OUT/bundle/ (about 220 MB, 500 with Transformer Engine; with --part-mib in parts of at most N MiB) to the other machine.
#   source OUT/bundle/activate.sh [FOLDER]
# unpacks it once, to FOLDER or /tmp/miles-spmd-runtime, and makes it importable. docs/gpu.md lists what that machine
# must have.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    echo "bundle.sh: error: $*" >&2
    exit 2
}

[[ $# -ge 1 && $1 != -* ]] || fail "usage: launch/bundle.sh OUT [--part-mib N] [--te WHEEL]"
out=$1/bundle
shift
part_mib= te=
while [[ $# -gt 0 ]]; do
    case $1 in
    --part-mib) [[ ${2:-} =~ ^[0-9]+$ ]] && part_mib=$2 || fail "--part-mib needs a number, not '${2:-}'" ;;
    --te) [[ -f ${2:-} && $2 =~ /?transformer_engine_torch-([0-9.]+)-[^/]*\.whl$ ]] && te=$2 te_version=${BASH_REMATCH[1]} ||
        fail "--te needs the wheel of transformer_engine_torch, not '${2:-}'" ;;
    *) fail "unknown option $1" ;;
    esac
    shift 2
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# pip matches the minor version of a manylinux tag exactly
platforms=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
for minor in 5 12 17 24 26 27 28 31 34 35; do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
download() {
    "${PYTHON:-python3}" -m pip --quiet --disable-pip-version-check download --no-deps --only-binary=:all: \
        --python-version 3.12 --implementation cp "${platforms[@]}" --dest "$work/wheels" "$@"
}
echo "bundle.sh: downloading"
download --requirement "$here/requirements-cuda.txt"
if [[ -n $te ]]; then
    download "transformer-engine==$te_version" "transformer-engine-cu13==$te_version"
    cp "$te" "$work/wheels"
fi
mkdir "$work/site"
for wheel in "$work"/wheels/*.whl; do unzip -qo "$wheel" -d "$work/site"; done

cd "$work/site"
# remove kernels of other GPUs, static libraries, and what this project never loads
rm -rf sgl_kernel/sm100 sgl_kernel/infllm_ops* sgl_kernel/flashmla_ops* sglang/multimodal_gen/csrc xgrammar/lib/*.a \
    transformer_engine/jax
find . -name __pycache__ -prune -exec rm -rf {} +
find xgrammar zstandard -name '*.so' -exec strip --strip-unneeded {} +
# SGLang imports IPython only to show HTML in notebooks
mkdir -p IPython
echo 'version_info = (9, 0, 0)' >IPython/__init__.py
printf 'class HTML:\n    def __init__(self, *args, **kwargs):\n        pass\n\n\ndef display(*args, **kwargs):\n    pass\n' \
    >IPython/display.py

echo "bundle.sh: packing"
cd - >/dev/null
rm -rf "$out"
mkdir -p "$out"
pack() { tar --create --directory="$work/site" . | xz -3 --threads=0; }
if [[ -n $part_mib ]]; then
    pack | split --bytes="${part_mib}M" - "$out/runtime.tar.xz."
else
    pack >"$out/runtime.tar.xz."
fi
cat >"$out/activate.sh" <<'ACTIVATE'
# source activate.sh [FOLDER]
_bundle=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
_site=${1:-/tmp/miles-spmd-runtime}
if [[ ! -f $_site/.complete ]]; then
    mkdir -p "$_site" && cat "$_bundle"/runtime.tar.xz.* | xz --decompress --threads=0 | tar --extract --directory="$_site" &&
        touch "$_site/.complete" || echo "activate.sh: the runtime could not be unpacked to $_site" >&2
fi
export PYTHONPATH=$_site${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
ACTIVATE
du -h "$out"/*
