#!/bin/sh
#SBATCH --job-name=train_graceful
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
# Usage: sbatch [options of sbatch] scripts/train_slurm.sh [options of train_graceful.py]
#
# Trains under Slurm on any number of nodes (--nodes=2), with a process for each GPU of a node (or NPROC). Submit it from the
# repository's root; several nodes need that on a common file system. In a job array %a in an option is the task's number
# (--array=1-4 ... --seed %a), and each task saves in a directory of its own below --checkpoint-dir.
# Two minutes before its time is up, or when it is preempted, the run saves and the job goes back into the queue; when it
# comes back it goes on from there, as often as it takes. All steps done or scancel ends it for good. A longer save needs an
# earlier warning: sbatch --signal=USR1@600. It saves in --checkpoint-dir (default: checkpoints), also when it resumes.
#
# SCRIPT=path  a script of your own instead of train_graceful.py, from the repository's root
# NPROC=n      processes on each node (default: its GPUs in the job, else 1)
# PYTHON=path  the interpreter (default: .venv/bin/python, else python3)

set -eu

submitted_from=${SLURM_SUBMIT_DIR:-$(dirname -- "$0")/..}
. "$submitted_from/scripts/common.sh"
[ -n "${SLURM_JOB_ID:-}" ] || { echo "This is a job for Slurm: sbatch scripts/train_slurm.sh" >&2; exit 2; }
cd "$SLURM_SUBMIT_DIR"

task=${SLURM_ARRAY_TASK_ID:-}
# SLURM_JOB_ID of an array's last task is the whole array's.
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${task:+_$task}
for word; do
    shift
    [ -z "$task" ] || word=$(printf '%s\n' "$word" | sed "s/%a/$task/g")
    set -- "$@" "$word"
done
find_directory "$@"
directory=$directory${task:+/$task}
set -- "$@" --checkpoint-dir "$directory"
mkdir -p "$directory"
started=$directory/.slurm_job_$SLURM_JOB_ID
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || : >"$started"
# Only what this job itself has saved.
[ -z "$(find "$directory" -name '*.pt' -newer "$started")" ] || set -- "$@" --resume latest

before=$(cat "$directory/run.lock" 2>/dev/null || :)
code=0
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NNODES="$SLURM_JOB_NUM_NODES" RENDEZVOUS="$first:$((20000 + SLURM_JOB_ID % 10000))" PATIENCE=3600
srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 \
    scripts/train_torchrun.sh "${NPROC:-${SLURM_GPUS_ON_NODE:-1}}" --no-keyboard "$@" || code=$?

# How it ended stands there, unless it never began. 138 and 143 are Slurm's wish; after scancel the job is not running any more.
[ "$(cat "$directory/run.lock" 2>/dev/null || :)" != "$before" ] || exit "$code"
ended=$(sed -n 2p "$directory/run.lock")
if { [ "$ended" = 138 ] || [ "$ended" = 143 ]; } && scontrol show job "$job" | grep -q JobState=RUNNING; then
    echo "Back into the queue: the run goes on when the job starts again."
    scontrol requeue "$job"
fi
exit "$code"
