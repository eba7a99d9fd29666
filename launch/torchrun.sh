#!/usr/bin/env bash
# Train on GPUs: launch/torchrun.sh [train|eval] CONFIG [key=value ...]   one process per GPU, on one node or several
#
# On several nodes run it on each, with the usual variables:
#   MASTER_ADDR=first-node NNODES=4 NODE_RANK=0..3 launch/torchrun.sh configs/grpo_qwen3_8b.toml
# A job of Slurm does so, see slurm/job.sh; there NODE_RANK is that of the task.
# MASTER_PORT (29500), NPROC_PER_NODE (the GPUs of this node) and PYTHON may be set too.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

fail() {
    echo "torchrun.sh: error: $*" >&2
    exit 2
}

verb=train
if [[ ${1:-} == train || ${1:-} == eval ]]; then
    verb=$1
    shift
fi
[[ $# -ge 1 && -f $1 ]] || fail "usage: launch/torchrun.sh CONFIG [key=value ...]; no file ${1:-given}"
python=${PYTHON:-$([[ -x $root/.venv/bin/python ]] && echo "$root/.venv/bin/python" || echo python3)}
nodes=${NNODES:-1}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
gpus=${NPROC_PER_NODE:-$("$python" -c 'from miles_spmd.telemetry.environment import gpus; print(len(gpus()))')}
visible=${CUDA_VISIBLE_DEVICES+ (CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES)}
[[ $gpus -ge 1 ]] || fail "no GPU here$visible; on a CPU use \`miles-spmd train $1\`, or set NPROC_PER_NODE"
if [[ $nodes -gt 1 && (-z ${MASTER_ADDR:-} || -z $NODE_RANK) ]]; then
    fail "with NNODES=$nodes, MASTER_ADDR (the first node's address) and NODE_RANK (0..$((nodes - 1))) must be set"
fi

# An engine releases its memory through torch_memory_saver, which intercepts the CUDA runtime's allocation functions.
# The dynamic linker can only load it when a program starts; a rank that was started without it has to start again. All
# other variables for CUDA and NCCL are set by every rank itself, see miles_spmd/platform/cuda.py.
hook=$("$python" -c 'from miles_spmd.platform.cuda import memory_saver_libraries as m; print(*m(), sep=":")')
if [[ -n $hook && ${LD_PRELOAD:-} != *torch_memory_saver* ]]; then
    export LD_PRELOAD=$hook${LD_PRELOAD:+:$LD_PRELOAD}
fi

# The ranks of a node share its cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [[ $nodes -eq 1 ]]; then # the command starts its ranks itself: torchrun's own store would be open to the network
    exec "$python" -m miles_spmd "$verb" "$@" --nproc-per-node="$gpus"
fi
rendezvous=(--nnodes="$nodes" --node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}")
# Bind each rank to the NUMA node of its GPU, and with that the host memory that it allocates.
if [[ -d /sys/devices/system/node/node1 ]] && command -v numactl >/dev/null; then
    rendezvous+=(--numa-binding=node)
fi
exec "$python" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node="$gpus" -m miles_spmd "$verb" "$@"
