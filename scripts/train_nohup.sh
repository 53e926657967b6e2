#!/bin/sh
# Usage: scripts/train_nohup.sh [options of train_graceful.py]
#
# Trains in the background; closing the terminal or logging out does not stop it. Returns once training has begun, or
# with the run's own output and exit code where it has ended before that. Relative paths start at the repository's root.
#
# LOG=path     where its output is appended (default: train.log in the checkpoint directory)
# SCRIPT=path  a script of your own instead of train_graceful.py; relative paths then start where you are
# PYTHON=path  the interpreter (default: .venv/bin/python, else python3)

set -eu

. "$(dirname -- "$0")/common.sh"

find_python

absolute() { case $1 in /*) printf %s "$1" ;; *) printf %s "$PWD/$1" ;; esac; }

find_directory "$@"
directory=$(absolute "$directory")
log=$(absolute "${LOG:-$directory/train.log}")
mkdir -p "$(dirname "$log")"
: >>"$log"
old_bytes=$(wc -c <"$log")
new_lines() { tail -c "+$((old_bytes + 1))" "$log"; }

nohup "$PYTHON" "$program" "$@" --no-keyboard </dev/null >>"$log" 2>&1 &
pid=$!
while kill -0 "$pid" 2>/dev/null && ! new_lines | grep -q "Training started"; do
    sleep 1
done
if ! kill -0 "$pid" 2>/dev/null; then
    code=0
    wait "$pid" || code=$?
    # Where another run writes to this log too, only the refusal is ours.
    { new_lines | grep '^error: ' || new_lines; echo "This run has ended with exit code $code."; } >&2
    exit "$code"
fi

echo "Training in the background, pid $pid"
echo "  log:    $log"
echo "  follow: tail -f $(quoted "$log")"
case $(head -n 1 "$directory/run.lock" 2>/dev/null) in
    "$pid "*) echo "  stop:   $(quoted "$root/scripts/stop.sh") $(quoted "$directory")" ;;
    *) echo "  stop:   kill $pid" ;; # resumed into the directory that its checkpoint names
esac
