#!/bin/sh
# Usage: scripts/test_versions.sh [options of pytest]
#
# Runs the tests that matter on the oldest and the newest PyTorch and Python, each pair in an environment of its own under
# .venv-versions, and prints the table of tests/README.md. With CUDA, PyTorch takes some 5 GB in each.
# Exit code: 1 if anything failed; an environment that cannot be made fails too and does not stop the others.
#
# VERSIONS="3.10:2.6.0 ..."  pairs of Python and PyTorch (default: the oldest and the newest, four pairs)
# PYTHON_3_10=path           such a Python (default: python3.10 on PATH, else one that uv finds or downloads)
# INDEX=URL                  where PyTorch comes from, as https://download.pytorch.org/whl/cpu (default: as pip is set)

set -u

. "$(dirname -- "$0")/common.sh"
cd "$root" || exit
files="test_resume test_own_model test_leave test_guest test_children test_checkpoint test_kinds test_many_processes"

# make_environment FOLDER PYTHON TORCH, unless it is there
make_environment() {
    [ ! -e "$1/installed" ] || return 0
    variable=PYTHON_$(echo "$2" | tr . _)
    interpreter=$(eval "echo \"\${$variable:-python$2}\"")
    # It has to start: version managers put names on PATH that do not.
    if "$interpreter" -c 'import ensurepip, venv' 2>/dev/null; then
        "$interpreter" -m venv --clear "$1" || return
    elif command -v uv >/dev/null; then
        uv venv --clear --seed --python "$2" "$1" || return
    else
        echo "Python $2 is missing: install it, or uv, or name it: $variable=/path/to/python$2" >&2
        return 1
    fi
    grep -v '^torch' requirements.txt >"$1/requirements.txt"
    "$1/bin/python" -m pip install --disable-pip-version-check ${INDEX:+--index-url "$INDEX"} "torch==$3" &&
        "$1/bin/python" -m pip install --disable-pip-version-check -r "$1/requirements.txt" && touch "$1/installed"
}

# count WORD: of how many pytest's last line says so
count() { tail -n 1 "$folder/log" | sed -n "s/^/ /; s/.*[^0-9]\([0-9][0-9]*\) $1.*/\1/p" | grep . || echo 0; }

table='|---|---|---:|---:|---:|---:|' code=0
for pair in ${VERSIONS:-3.10:2.6.0 3.10:2.13.0 3.13:2.6.0 3.13:2.13.0}; do
    folder=.venv-versions/${pair%:*}-${pair#*:} status=1
    row="| ${pair%:*} | ${pair#*:} | not installed | | | |"
    if make_environment "$folder" "${pair%:*}" "${pair#*:}"; then
        start=$(date +%s)
        # shellcheck disable=SC2046,SC2086 # the names are words
        { "$folder/bin/python" -m pytest $(printf 'tests/%s.py ' $files) "$@" 2>&1; echo $? >"$folder/status"; } |
            tee "$folder/log"
        read -r status <"$folder/status"
        [ "$status" -le 1 ] && took=$((($(date +%s) - start + 30) / 60)) || took="exit code $status"
        row="| $("$folder/bin/python" -c 'import sys, torch; print(sys.version.split()[0], "|", torch.__version__)') |"
        row="$row $(count passed) | $(($(count failed) + $(count error))) | $(count skipped) | $took |"
    fi
    [ "$status" = 0 ] || code=1
    table="$table
$row"
done
printf '\n| Python | PyTorch | passed | failed | skipped | minutes |\n%s\n' "$table"
exit $code
