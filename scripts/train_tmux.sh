#!/bin/sh
# Usage: scripts/train_tmux.sh [session] [options of train_graceful.py]
#
# Trains in a tmux session (default: train), or attaches where one trains in it already. Detach with Ctrl-b d: training
# goes on. When it has ended, its summary stays on the screen above a shell; the next one has a new window there. Without
# a terminal the session is started detached. Relative paths start at the repository's root.
#
# SCRIPT=path runs a script of your own instead of train_graceful.py; relative paths then start where you are.
# PYTHON=path chooses the interpreter (default: .venv/bin/python, else python3).

set -eu

. "$(dirname -- "$0")/common.sh"

case "${1:--}" in
    -*) session=train ;;
    *) session=$(printf %s "$1" | tr .: __) && shift ;; # as tmux does
esac

need tmux

if [ -n "$(tmux show-options -qv -t "=$session:" @training 2>/dev/null)" ]; then
    echo "A run trains in the tmux session '$session' already; nothing new is started."
    # Attached, nobody would read that.
    [ $# -eq 0 ] || { echo "Attach to it: make attach SESSION=$session. One more beside it: make tmux SESSION=name" >&2; exit 2; }
else
    find_python
    # A tmux server that is already running passes on its own environment, not ours.
    set -- ${CUDA_VISIBLE_DEVICES+CUDA_VISIBLE_DEVICES="$CUDA_VISIBLE_DEVICES"} "$PYTHON" "$program" "$@"
    set -- env ${PYTHONPATH+PYTHONPATH="$PYTHONPATH"} "$@"
    # In one string, for to tmux a word that ends with ; ends its command.
    words=
    for word; do words="$words $(quoted "$word")"; done
    # The trap keeps the shell alive through the Ctrl-C that the run answers with a save.
    set -- -c "$PWD" sh -c "
        trap : INT QUIT
        code=0
        $words || code=\$?
        tmux set-option -u @training
        printf '\nThe run has ended with exit code %s. This is a shell; exit closes it.\n' \$code
        exec \"\${SHELL:-/bin/sh}\""
    if tmux has-session -t "=$session" 2>/dev/null; then
        tmux set-option -t "=$session:" @training yes ";" new-window -t "=$session:" "$@"
        echo "Started in a new window of the tmux session '$session', whose last run has ended."
    else
        tmux new-session -d -s "$session" "$@" ";" set-option -t "=$session:" @training yes
        echo "Started in the tmux session '$session'."
    fi
fi

echo "Attach: tmux attach -t '$session'    Detach: Ctrl-b d (training goes on)"
[ -t 0 ] && [ -t 1 ] || exit 0
if [ -n "${TMUX:-}" ]; then
    tmux switch-client -t "=$session" 2>/dev/null || : # nobody is attached where this was typed
    exit
fi
exec tmux attach-session -t "=$session"
