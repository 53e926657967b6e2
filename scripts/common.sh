# shellcheck shell=sh disable=SC2034 # what is set here is for those that source it
# Sourced by the other scripts: what is run, and where.
#
# SCRIPT=path runs a script of your own, which can import train_graceful, instead of train_graceful.py. Relative paths then
# start where you are, else at the repository's root. PYTHON=path chooses the interpreter (default: .venv/bin/python in the
# repository's root, else python3).

if [ "${1:-}" = --help ]; then
    sed -n '1d; /^#SBATCH/d; /^$/q; s/^# \{0,1\}//p' "$0"
    exit
fi
root=$(CDPATH='' cd -- "${submitted_from:-$(dirname -- "$0")/..}" && pwd)
program=${SCRIPT:-train_graceful.py}
if [ -n "${SCRIPT:-}" ]; then
    case ":${PYTHONPATH:-}:" in *":$root:"*) ;; *) export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" ;; esac
else
    cd "$root" || exit
fi

# need TOOL: one line that says what to install where the tool is missing
need() {
    command -v "$1" >/dev/null || { echo "$1 is missing: apt install $1 (macOS: brew install ${2:-$1})" >&2; exit 2; }
}

# find_python sets PYTHON
find_python() {
    [ -z "${PYTHON:-}" ] || return 0
    PYTHON=$root/.venv/bin/python
    [ -x "$PYTHON" ] || { need python3 python; PYTHON=$(command -v python3); }
}

# find_directory OPTION... sets directory to what --checkpoint-dir says among them, as the program reads it
find_directory() {
    directory=checkpoints previous=
    for word; do
        case $word in --checkpoint-dir=*) directory=${word#*=} ;; esac
        [ "$previous" != --checkpoint-dir ] || directory=$word
        previous=$word
    done
}

# quoted WORD: as a person would have to type it
quoted() {
    case $1 in
        *[!A-Za-z0-9_./:=@%+,-]* | '') printf "'%s'" "$(printf %s "$1" | sed "s/'/'\\\\''/g")" ;;
        *) printf %s "$1" ;;
    esac
}
