#!/bin/sh
# Usage: scripts/record.sh [step]
#
# Records the session that README shows: `make train` in a tmux session of its own, until a step (default 250), then q and
# Enter. Prints what is on the screen; checkpoints go into a temporary directory, which it removes.

set -eu

. "$(dirname -- "$0")/common.sh"
need tmux

last=${1:-250}
directory=$(mktemp -d)
session() { tmux -L "record_$$" "$@"; }
trap 'session kill-server 2>/dev/null || :; rm -rf "$directory"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# on_screen PATTERN...: waits until the screen shows a step that is due, or a text; fails after five minutes
on_screen() {
    tries=0
    until session capture-pane -p -J -S - | awk -v last="$last" -v text="$1" '
        text == "step" && match($0, /step [0-9]+/) && substr($0, RSTART + 5, RLENGTH - 5) + 0 >= last { found = 1 }
        text != "step" && index($0, text) { found = 1 }
        END { exit !found }'; do
        tries=$((tries + 1))
        [ "$tries" -lt 1500 ] || { echo "The session does not show: $1" >&2; session capture-pane -p >&2; exit 1; }
        sleep 0.2
    done
}

session -f /dev/null new-session -d -x 126 -y 40 "unset MAKEFLAGS MAKELEVEL; PS1='$ ' exec sh"
on_screen '$'
session send-keys "make train ARGS='--checkpoint-dir $directory'" Enter
on_screen step
session send-keys q Enter
on_screen "Resume with"
session capture-pane -p -J -S - | sed "s| ARGS='.*||; s| --checkpoint-dir $directory||; s|$directory|/home/you/train/checkpoints|g
    s|$(pwd)/||g; s/ *$//; /^[$]*$/d"
