#!/bin/sh
# Usage: scripts/train_tmux.sh [session] [options of train_graceful.py]
#
# Trains in a tmux session (default: train), or attaches where that session is already there. Detach with Ctrl-b d:
# training goes on. When it has ended, its summary stays on the screen above a shell. Without a terminal the session
# is started detached. Relative paths start at the repository's root.
#
# PYTHON=path chooses the interpreter (default: .venv/bin/python, else python3).

set -eu

if [ "${1:-}" = --help ]; then
    sed -n '1d; /^$/q; s/^# \{0,1\}//p' "$0"
    exit
fi
CDPATH='' cd -- "$(dirname -- "$0")/.."

session=train
case "${1:--}" in
    -*) ;;
    *)
        session=$(printf %s "$1" | tr .: __) # as tmux does
        shift
        ;;
esac

command -v tmux >/dev/null || { echo "tmux is missing: apt install tmux (macOS: brew install tmux)" >&2; exit 2; }

if tmux has-session -t "=$session" 2>/dev/null; then
    echo "The tmux session '$session' is already there; nothing new is started."
else
    [ -n "${PYTHON:-}" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python; } || PYTHON=$(command -v python3) ||
        { echo "python3 is missing: apt install python3 (macOS: brew install python)" >&2; exit 2; }
    set -- "$PYTHON" train_graceful.py "$@"
    # A tmux server that is already running passes on its own environment, not ours.
    [ -z "${CUDA_VISIBLE_DEVICES+set}" ] || set -- env CUDA_VISIBLE_DEVICES="$CUDA_VISIBLE_DEVICES" "$@"
    # The trap keeps the shell alive through the Ctrl-C that the run answers with a save.
    # shellcheck disable=SC2016 # expanded by the shell inside tmux
    tmux new-session -d -s "$session" -c "$PWD" sh -c '
        trap : INT QUIT
        code=0
        "$@" || code=$?
        printf "\nThe run has ended with exit code %s. This is a shell; exit closes it.\n" "$code"
        exec "${SHELL:-/bin/sh}"' sh "$@"
    echo "Started in the tmux session '$session'."
fi

echo "Attach: tmux attach -t '$session'    Detach: Ctrl-b d (training goes on)"
[ -t 0 ] && [ -t 1 ] || exit 0
if [ -n "${TMUX:-}" ]; then
    exec tmux switch-client -t "=$session"
fi
exec tmux attach-session -t "=$session"
