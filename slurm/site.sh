# What this cluster needs, in one place: `source slurm/site.sh` before sbatch; every job reads it again on its first node.
# Remove the # of the lines that you need. MILES_SPMD_SITE names another file in its place.

export MILES_SPMD_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) # this checkout, on a folder that all nodes share

# Options of every sbatch; its manual lists more. They replace those of the scripts, and the command line replaces them.
# export SBATCH_ACCOUNT=project
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal
# export SBATCH_TIMELIMIT=12:00:00
# export SBATCH_GPUS_PER_NODE=4

# Software of the nodes.
# module load cuda/13.0
# export PYTHON=/shared/envs/miles-spmd/bin/python

# slurm/job.sh explains these.
# export MILES_SPMD_CONTAINER=apptainer:/shared/images/miles-spmd.sif
# export MILES_SPMD_MOUNTS=/shared,/scratch
# export MILES_SPMD_LAUNCH=tasks
# export MILES_SPMD_BANDWIDTH=300

# The network cards between the nodes, where the default is wrong.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
