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
    -*) find_directory "$@" ;;
    *) directory=${1:-checkpoints} ;;
esac

exec "$PYTHON" -I - "$directory" <<'END'
import contextlib, fcntl, glob, os, signal, sys

def leave(message, code):
    print(message, file=sys.stderr)
    sys.exit(code)

def has_it_open(pid, path):
    """A pid in a file may be a stranger's by now, or count in another container. Without /proc it is believed."""
    files = glob.glob(f"/proc/{pid}/fd/*")
    return any(os.path.exists(one) and os.path.samefile(one, path) for one in files) or not os.path.isdir("/proc/self")

signal.signal(signal.SIGINT, signal.SIG_DFL)
if (os.environ.get("LC_ALL") or os.environ.get("LANG")) in ("C", "POSIX"):  # no symbols, as the run itself does
    sys.stdout.reconfigure(encoding="ascii")
sys.stdout.reconfigure(errors="replace")
try:
    lock = open(os.path.join(sys.argv[1], "run.lock"), encoding="utf-8")
    with contextlib.suppress(BlockingIOError):
        fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        raise FileNotFoundError  # a lock that nobody holds is none
    pid, host = (lock.readline().split() + ["0", "an unknown host"])[:2]
    pid = int(pid) if pid.isdigit() else 0
    if host != os.uname().nodename or not has_it_open(pid, lock.name):
        leave(f"The run that holds {sys.argv[1]} is not among the processes here, but on {host} or in a container:"
              " stop it there.", 2)
    with contextlib.suppress(ProcessLookupError):  # it may be leaving of its own accord
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGCONT)  # one that was stopped with Ctrl-Z has to wake up for it
    if pid == 1:  # and this process does too
        leave("Asked pid 1 to save and leave; the container ends with it, and with its exit code.", 0)
    print(f"Asked pid {pid} to save and leave; waiting for it.", flush=True)
    fcntl.lockf(lock, fcntl.LOCK_SH, 1)  # waits until its process is gone
except FileNotFoundError:
    leave(f"No run holds {sys.argv[1]}. Another directory: make stop DIR=..., scripts/stop.sh ...", 2)
except OSError as error:
    leave(f"Cannot stop the run that holds {sys.argv[1]}: {error.strerror}.", 2)
lock.seek(0)
_, code, summary = (lock.read() + "\n\n").split("\n", 2)
if not code:
    leave(f"The run (pid {pid}) died without a word; the checkpoints that it saved before are whole.", 1)
print(summary.rstrip("\n"))
sys.exit(0 if int(code) in (0, 128 + signal.SIGTERM) else int(code))
END
