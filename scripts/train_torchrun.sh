#!/bin/sh
# Usage: scripts/train_torchrun.sh [processes] [options of train_graceful.py]
#
# Trains one model with several processes on this machine (default: auto, one for each GPU, or else for each core). They
# leave together: q + Enter and Ctrl-C work as with one, and so do the exit codes. A process that dies outright makes torchrun
# start all of them anew, from the last save; that happens at most RESTARTS times. Relative paths start at the repository's root.
#
# On several machines the same command is given on each, with the same NNODES and RENDEZVOUS; they need a common file system.
#
# NNODES=n     machines (default: 1)
# RENDEZVOUS=host:port  one of the machines, as all of them call it, and a free port there
# RESTARTS=n   (default: 0; give --resume latest with it)
# SILENCE=s    seconds after which a machine that answers nothing counts as gone (4 or more, default: 60)
# PATIENCE=s   seconds that torchrun leaves them for their last save before it kills them (default: 600)
# SCRIPT=path  a script of your own instead of train_graceful.py; relative paths then start where you are
# PYTHON=path  the interpreter (default: .venv/bin/python, else python3)

set -eu

. "$(dirname -- "$0")/common.sh"

processes=auto
case "${1--}" in
    -*) ;;
    *)
        processes=$1
        shift
        ;;
esac
case $processes in
    auto | gpu | cpu) ;;
    '' | *[!0-9]* | 0*)
        echo "'$processes' is no number of processes: a number from 1 on, or auto" >&2
        exit 2
        ;;
esac

if [ -n "${NNODES:-}" ] && [ "$NNODES" != 1 ]; then
    [ -n "${RENDEZVOUS:-}" ] || { echo "NNODES=$NNODES needs RENDEZVOUS=host:port, the same on all machines" >&2; exit 2; }
    set -- --nnodes="$NNODES" --rdzv-backend=c10d --rdzv-endpoint="$RENDEZVOUS" "$program" "$@"
elif [ -n "${PET_NNODES:-}" ]; then
    set -- "$program" "$@" # torchrun reads these itself
else
    set -- --standalone "$program" "$@"
fi

case ${SILENCE:-60} in
    [1-3] | *[!0-9]* | 0*) echo "SILENCE=$SILENCE is no number of seconds from 4 on" >&2; exit 2 ;;
esac

find_python

# glibc's heap would keep most of what a model frees when it is sharded, tensors below 32 MiB that is.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-262144}"
# DDP would warn that all parameters take part in a batch, which is no trouble.
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
# Nor would torchrun, machine by machine, that it leaves when it is asked to.
export LOGLEVEL="${LOGLEVEL:-ERROR}"
[ "$processes" = 1 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # as torchrun would, but without a banner
exec "$PYTHON" "$root/scripts/torchrun.py" --nproc-per-node="$processes" --max-restarts="${RESTARTS:-0}" \
    --shutdown-timeout="${PATIENCE:-600}" "$@"
