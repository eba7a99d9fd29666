#!/usr/bin/env bash
# GRPO on a mixture-of-experts Qwen3, on one node or several.
#   source slurm/site.sh
#   sbatch --nodes=4 slurm/grpo_qwen3_moe.sh hf_checkpoint=models/Qwen3-30B-A3B prompt_data=data/train.jsonl
# Arguments are overrides of the configuration, and of sbatch before the script's name. docs/slurm.md explains the rest.
#SBATCH --job-name=grpo-qwen3-moe
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

job=${MILES_SPMD_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/job.sh # sbatch runs a copy of this script from elsewhere
[[ -f $job ]] || { echo "no file $job: call sbatch in the checkout, or source slurm/site.sh before it" >&2; exit 2; }
source "$job" train "${CONFIG:-${MILES_SPMD_ROOT:-.}/configs/grpo_qwen3_30b_a3b.toml}" "$@"
