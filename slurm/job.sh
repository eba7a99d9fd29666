# The body of every job: source job.sh train|eval CONFIG [key=value ...], in a script that sbatch runs. docs/slurm.md
# describes what it does. In an array, %a in an argument is the task's number.
#
# Variables, from slurm/site.sh or from where sbatch was called:
#   MILES_SPMD_LAUNCH      torchrun (one on each node, the default) or tasks (srun starts every rank itself)
#   MILES_SPMD_CONTAINER   apptainer:IMAGE or pyxis:IMAGE; without it the ranks run in the node's own system
#   MILES_SPMD_MOUNTS      more folders that the container needs, with commas between them
#   MILES_SPMD_PREFLIGHT   off: start without examining the nodes
#   MILES_SPMD_BANDWIDTH   GB/s that the preflight expects of an all-reduce over all GPUs
#   NPROC_PER_NODE         ranks of a node; the default is its number of GPUs
#   PYTHON                 the interpreter; the default is .venv/bin/python or, in a container, python3
set -uo pipefail

note() { echo "job.sh: $(date '+%F %T') $*"; }
fail() {
    echo "job.sh: error: $*" >&2
    exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "this runs in a job: sbatch slurm/grpo_qwen3.sh, or miles-spmd slurm CONFIG"

# --- the site --------------------------------------------------------------------------------------------------------

site=${MILES_SPMD_SITE:-${MILES_SPMD_ROOT:-$SLURM_SUBMIT_DIR}/slurm/site.sh}
problem=$(bash -n "$site" 2>&1) || fail "the site file has an error: ${problem:-$site cannot be read}"
site_failed() { # STATUS FILE LINE COMMAND
    trap - EXIT
    [[ $4 != 'source "$site"' ]] || fail "the site file $site has returned with status $1"
    fail "$2, line $3: \"$4\" ended with status $1"
}
trap 'site_failed $? "${BASH_SOURCE[0]}" $LINENO "$BASH_COMMAND"' ERR
trap 'fail "the site file $site has ended the job with status $?; the job begins after it: leave out its exit"' EXIT
set +u +o pipefail # what a site calls, such as module and conda, is not written for these
source "$site"
trap - ERR EXIT
set +e -uo pipefail # whatever it has set

# --- what the job is -------------------------------------------------------------------------------------------------

root=${MILES_SPMD_ROOT:-$SLURM_SUBMIT_DIR} # here, because a site file may use such names, too
verb=$1 config=$2
overrides=("${@:3}")
overrides=("${overrides[@]//%a/${SLURM_ARRAY_TASK_ID:-%a}}")
restart=${SLURM_RESTART_COUNT:-0}
# The number of an array's last task is that of the whole array: a command to Slurm would mean all of its tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
if [[ $verb != eval ]]; then
    overrides+=(checkpoint.resume=true)
elif [[ $restart -gt 0 ]]; then
    overrides+=(run.overwrite=true) # what this job itself has begun; an evaluation is not continued
fi
[[ -f $config ]] || fail "no file $config in $PWD; paths are relative to where sbatch was called"

launch=${MILES_SPMD_LAUNCH:-torchrun}
[[ $launch == torchrun || $launch == tasks ]] || fail "MILES_SPMD_LAUNCH is torchrun or tasks, not '$launch'"
nodes=$SLURM_JOB_NUM_NODES
ranks=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
[[ $ranks =~ ^(0|[1-9][0-9]{0,5})$ ]] || fail "NPROC_PER_NODE is the number of ranks of a node, not '$ranks'"
[[ $ranks -ge 1 ]] || fail "the job has no GPU (--gpus-per-node); on CPUs set NPROC_PER_NODE to the ranks of a node"
export NPROC_PER_NODE=$ranks NNODES=$nodes PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 # nodes that have no network would wait for it

# The address by which Slurm reaches the first node, on which this script runs, and a port that no other job takes.
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show node "$SLURMD_NODENAME" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')}
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 8 + restart) % 10000))
while (: <>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_ADDR MASTER_PORT

# Unix time at which Slurm ends the job; nothing without a limit. Old versions of Slurm set no variable, and a limit may be
# changed while the job runs.
job_end() {
    local time
    time=$(squeue -h -j "$job" -o %e)
    [[ -n $time ]] && date -d "$time" +%s 2>/dev/null || echo "${SLURM_JOB_END_TIME:-}"
}
ends=$(job_end)
export MILES_SPMD_JOB_END=$ends

# --- where commands run ----------------------------------------------------------------------------------------------

container=${MILES_SPMD_CONTAINER:-}
mounts=$(tr ',' '\n' <<<"$root,$PWD${MILES_SPMD_MOUNTS:+,$MILES_SPMD_MOUNTS}" | sort --unique | paste --serial --delimiters=,)
inside=() options=()
case $container in
'') ;;
apptainer:*)
    command -v apptainer >/dev/null || fail "MILES_SPMD_CONTAINER=$container: apptainer is not in PATH; load its module"
    inside=(apptainer exec --bind "$mounts")
    [[ -z ${SLURM_GPUS_ON_NODE:-} ]] || inside+=(--nv)
    inside+=("${container#*:}")
    ;;
pyxis:*)
    srun --help | grep -q -- --container-image ||
        fail "MILES_SPMD_CONTAINER=$container: this Slurm has no pyxis; srun does not know --container-image"
    options=(--container-image="${container#*:}" --container-mounts="$(sed 's/\([^,]*\)/\1:\1/g' <<<"$mounts")"
        --container-workdir="$PWD" --no-container-entrypoint)
    ;;
*) fail "MILES_SPMD_CONTAINER is apptainer:IMAGE or pyxis:IMAGE, not '$container'" ;;
esac
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -n $container || ! -x $root/.venv/bin/python ]] || PYTHON=$root/.venv/bin/python
fi
export PYTHON

# step NODES TASKS COMMAND: run it in that number of tasks on each of the first nodes. Every task sees all GPUs of the job
# on its node; a rank's end is handled by the other ranks, which Slurm gives two minutes for it.
cores=(--cpu-bind=none) # a launcher and its ranks share all that the job has on their node
step() {
    local where=(--nodes="$1" --ntasks="$(($1 * $2))" --ntasks-per-node="$2" --relative=0)
    where+=(--distribution=block:block "${cores[@]}" --kill-on-bad-exit=0 --wait=120)
    [[ -z ${SLURM_GPUS_ON_NODE:-} ]] || where+=(--gpu-bind=none)
    srun "${where[@]}" "${options[@]}" "${inside[@]}" "${@:3}"
}

# --- before the start ------------------------------------------------------------------------------------------------

trap 'fail "the job ends before the run has started: raise --time, or lower the seconds of --signal"' USR1
note "job $job, restart $restart: $verb $config on $SLURM_JOB_NODELIST, $nodes x $ranks ranks by $launch," \
    "${container:-no container}, $([[ -z $ends ]] && echo no time limit || date -d "@$ends" '+until %F %T')"
export MILES_SPMD_RANKS=$((nodes * ranks)) # of all cells, where the run has several
plan=$(step 1 1 "$PYTHON" -m miles_spmd "$verb" "$config" "${overrides[@]}" --dry-run)
status=$?
echo "$plan"
[[ $status -eq 0 ]] || exit "$status"
run=$(sed -n 's/^Run folder: //p' <<<"$plan")
[[ -n $run ]] || fail "$PYTHON has printed no plan with the run folder"
cells=$(sed -n 's/^Cells: //p' <<<"$plan")
if [[ -n $cells ]]; then
    [[ -z $container ]] || fail "resilience.cells: cells are steps of srun, which a container cannot start"
    [[ $launch == torchrun ]] || fail "resilience.cells: cells have launchers of their own: unset MILES_SPMD_LAUNCH"
    [[ $((cells % nodes)) -eq 0 ]] || fail "resilience.cells: $cells cells cannot be divided evenly over $nodes nodes"
fi
export MILES_SPMD_EXAMINED=1 # by the step above
if [[ ${MILES_SPMD_PREFLIGHT:-on} != off ]]; then
    step "$nodes" 1 "$PYTHON" -m miles_spmd doctor --cluster "$run" || exit
fi

# --- the run ---------------------------------------------------------------------------------------------------------

asked='' deadline=''
# The run saves and ends with status 75. One that does not has its ranks stopped a minute before Slurm kills the job, so
# that this shell lives to requeue it.
ask_to_stop() {
    ends=$(job_end)
    local left=${ends:+$((ends - $(date +%s)))}
    note "$1: the run is asked to stop${left:+, $left s before the end}"
    [[ -z $asked ]] || return
    asked=$1
    echo "$left" >"$run/stop" || scancel --signal=USR1 "$job"
    if [[ $1 == USR1 && -n $left ]]; then
        deadline=$((ends - (left > 120 ? 60 : left / 2)))
    fi
}
trap 'ask_to_stop USR1' USR1
trap 'ask_to_stop TERM' TERM # of a preemption, or of scancel

rm -f "$run/stop" "$run/save" # of an attempt that ended before it obeyed
if [[ -n $cells ]]; then
    # The supervisor runs beside this script, and each cell is a step of its own.
    MILES_SPMD_CELL_STEPS=1 "$PYTHON" -m miles_spmd "$verb" "$config" "${overrides[@]}" &
elif [[ $launch == tasks ]]; then
    unset MASTER_PORT # ranks of srun meet in the run folder
    cores=(--cpu-bind=cores --cpus-per-task=$((SLURM_CPUS_ON_NODE >= ranks ? SLURM_CPUS_ON_NODE / ranks : 1)))
    step "$nodes" "$ranks" "$PYTHON" -m miles_spmd "$verb" "$config" "${overrides[@]}" &
else
    step "$nodes" 1 "$root/launch/torchrun.sh" "$verb" "$config" "${overrides[@]}" &
fi
running=$!
while kill -0 "$running" 2>/dev/null; do
    if [[ -z $deadline ]]; then
        wait "$running" # a signal ends `wait`, and not what it waits for
    elif [[ $(date +%s) -lt $deadline ]]; then
        sleep 1
    else
        deadline=''
        scancel --signal=TERM "$job"
    fi
done
wait "$running"
status=$?

# --- the end ---------------------------------------------------------------------------------------------------------

# Whether the run can be continued. A launcher may turn the status 75 into another one; then the run folder has the
# reason. A run that was asked to stop and left no reason was ended by the signal.
can_continue() {
    [[ $status -ne 0 ]] || return 1
    [[ $status -ne 75 ]] || return 0
    local reason
    reason=$(tail -n 1 "$run/attempts.jsonl" 2>/dev/null | sed -n 's/.*"reason": *"\([^"]*\)".*/\1/p')
    [[ $reason == *stopped* || $reason == *preempted* || (-z $reason && -n $asked) ]]
}

# Whether there is a checkpoint that was not there when the job was requeued the last three times.
has_progressed() {
    local newest marks=$run/logs/requeues.txt
    newest=$(find "$run/checkpoints" -maxdepth 1 -name 'step_*' ! -name '*.incomplete' 2>/dev/null | sort | tail -n 1)
    newest=${newest:+$(basename "$newest")}
    echo "${newest:-none} job $SLURM_JOB_ID restart $restart" >>"$marks"
    [[ $(tail -n 3 "$marks" | grep -c "^${newest:-none} job $SLURM_JOB_ID ") -lt 3 ]]
}

if ! can_continue; then
    note "the run ended with status $status"
    exit "$status"
fi
state=$(squeue -h -j "$job" -o %T)
if [[ $state != RUNNING ]]; then # cancelled by its user, or requeued by Slurm, which does the rest
    note "the run was stopped by Slurm, the job is $state"
elif ! has_progressed; then
    note "not requeued: three attempts ended without a new checkpoint; raise --time, or lower checkpoint.save_interval"
else
    note "the run can be continued: requeueing the job"
    trap - TERM # by which Slurm ends this shell
    scontrol requeue "$job" && sleep 60
fi
exit "$status"
