#!/bin/sh
# Usage: scripts/train_torchrun.sh [processes] [options of train_graceful.py]
#
# Trains one model with several processes on this machine (default: auto, one for each GPU, or else for each core). They
# leave together: q + Enter and Ctrl-C work as with one, and so do the exit codes. A process that dies outright makes torchrun
# start all of them anew, from the last save; that happens at most RESTARTS times. Relative paths start at the repository's root.
#
# RESTARTS=n   (default: 0; give --resume latest with it)
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

find_python

# torchrun itself would return 1 and a page of traceback, below which the program's last lines are lost.
torchrun='
import signal, sys
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
signals = "SIGTERM,SIGINT,SIGUSR1,SIGUSR2,SIGXCPU"
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as it is under nohup
    signals += ",SIGHUP"
sys.argv.insert(1, "--signals-to-handle=" + signals)
try:
    main()
except ChildFailedError as error:
    code = error.get_first_failure()[1].exitcode
    sys.exit(code if code > 0 else 128 - code)
except SignalException as error:
    sys.exit(128 + error.sigval)
'
# glibc's heap would keep most of what a model frees when it is sharded, tensors below 32 MiB that is.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-262144}"
# DDP would warn that all parameters take part in a batch, which is no trouble.
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
[ "$processes" = 1 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # as torchrun would, but without a banner
exec "$PYTHON" -c "$torchrun" --standalone --nproc-per-node="$processes" --max-restarts="${RESTARTS:-0}" \
    --shutdown-timeout="${PATIENCE:-600}" "$program" "$@"
