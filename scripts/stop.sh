#!/bin/sh
# Usage: scripts/stop.sh [checkpoint-dir | --checkpoint-dir checkpoint-dir]
#
# Asks the run that holds the checkpoint directory (default: checkpoints in the repository's root, where relative
# paths start) to save and leave, waits until its process is gone and prints its summary.
#
# In a container where the run is pid 1 nothing outlives it: there this does not wait.
# Exit code: 0 it saved and left; 1 it died without a word; 2 there is no run to stop here; else the run's own.
# With SCRIPT set to a script of your own, relative paths start where you are.
# PYTHON=path chooses the interpreter (default: .venv/bin/python, else python3).

set -eu

. "$(dirname -- "$0")/common.sh"

find_python

case ${1:-} in
    --*) find_directory "$@" ;;
    -*) echo "$1 is no option: scripts/stop.sh --help" >&2; exit 2 ;;
    *) directory=${1:-checkpoints} ;;
esac

exec "$PYTHON" -I "$root/scripts/stop.py" "$directory"
