#!/bin/sh
# Usage: scripts/train_torchrun.sh [processes] [options of train_graceful.py]
#
# Trains one model with several processes on this machine (default: auto, one for each GPU, or else for each core). They
# leave together: q + Enter and Ctrl-C work as with one, and so do the exit codes. Relative paths start at the repository's
# root.
#
# On several machines the same command is given on each, with the same NNODES and RENDEZVOUS; they need a common file system.
#
# NNODES=n     machines (default: 1)
# RENDEZVOUS=host:port  one of the machines, as all of them call it, and a free port there
# PATIENCE=s   seconds that torchrun leaves them for their last save before it kills them (default: 600)
# SCRIPT=path  a script of your own instead of train_graceful.py; relative paths then start where you are
# PYTHON=path  the interpreter (default: .venv/bin/python, else python3)

set -eu

. "$(dirname -- "$0")/common.sh"

processes=${1-auto}
case "${1--}" in
    -*) processes=auto ;;
    auto | gpu | cpu) shift ;;
    '' | 0* | *[!0-9]*) echo "'$1' is no number of processes: a number from 1 on, or auto" >&2 && exit 2 ;;
    *) shift ;;
esac

# What starts it again, for the line that says how to resume.
TRAIN_COMMAND="$(quoted "$root/scripts/train_torchrun.sh") $processes"
case ${SCRIPT:-} in
    '') ;;
    /*) TRAIN_COMMAND="SCRIPT=$(quoted "$SCRIPT") $TRAIN_COMMAND" ;;
    *) TRAIN_COMMAND="SCRIPT=$(quoted "$PWD/$SCRIPT") $TRAIN_COMMAND" ;;
esac
if [ "${NNODES:-1}" != 1 ]; then
    [ -n "${RENDEZVOUS:-}" ] || { echo "NNODES=$NNODES needs RENDEZVOUS=host:port, the same on all machines" >&2; exit 2; }
    TRAIN_COMMAND="NNODES=$NNODES RENDEZVOUS=$(quoted "$RENDEZVOUS") $TRAIN_COMMAND"
    set -- --nnodes="$NNODES" --rdzv-backend=c10d --rdzv-endpoint="$RENDEZVOUS" "$program" "$@"
elif [ -n "${PET_NNODES:-}" ]; then
    set -- "$program" "$@" # torchrun reads these itself
else
    set -- --standalone "$program" "$@"
fi
export TRAIN_COMMAND

find_python

# A job in the background must not read what is typed at the shell: torchrun gives its processes a session of their own.
if [ -t 0 ] && command -v ps >/dev/null; then
    case $(ps -o stat= -p $$) in *+*) ;; *) exec </dev/null ;; esac
fi
# DDP would warn that all parameters take part in a batch, which is no trouble; torchrun, that it leaves when it is asked to.
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}" LOGLEVEL="${LOGLEVEL:-CRITICAL}"
[ "$processes" = 1 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # as torchrun would, but without a banner
exec "$PYTHON" "$root/scripts/torchrun.py" --nproc-per-node="$processes" --shutdown-timeout="${PATIENCE:-600}" "$@"
