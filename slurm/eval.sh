#!/usr/bin/env bash
# Scores a checkpoint on evaluation sets; with checkpoint.resume=true the newest one of a run.
#   source slurm/site.sh
#   sbatch slurm/eval.sh hf_checkpoint=models/Qwen3-8B eval_prompt_data.test=data/test.jsonl
# Arguments are overrides of the configuration, and of sbatch before the script's name. docs/slurm.md explains the rest.
#SBATCH --job-name=eval
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

job=${MILES_SPMD_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/job.sh # sbatch runs a copy of this script from elsewhere
[[ -f $job ]] || { echo "no file $job: call sbatch in the checkout, or source slurm/site.sh before it" >&2; exit 2; }
source "$job" eval "${CONFIG:-${MILES_SPMD_ROOT:-.}/configs/grpo_qwen3_8b.toml}" "$@"
