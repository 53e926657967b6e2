"""What scripts/stop.sh runs: asks the run that holds a checkpoint directory to save and leave."""

import contextlib
import fcntl
import glob
import os
import signal
import sys
from typing import NoReturn


def leave(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)


def has_it_open(pid: int, path: str) -> bool:
    """A pid in a file may be a stranger's by now, or count in another container.

    Without /proc it is believed.
    """
    if not os.path.isdir("/proc/self"):
        return True
    files = glob.glob(f"/proc/{pid}/fd/*")
    return any(os.path.exists(one) and os.path.samefile(one, path) for one in files)


def stop(directory: str) -> None:
    """Prints the summary of the run and ends with its exit code, 0 if it saved and left.

    run.lock holds pid and host of the run; when it has ended, its exit code and its summary too.
    """
    try:
        lock = open(os.path.join(directory, "run.lock"), encoding="utf-8")
        with contextlib.suppress(BlockingIOError):
            fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # A lock that nobody holds is none.
            raise FileNotFoundError
        pid, host = (lock.readline().split() + ["0", "an unknown host"])[:2]
        pid = int(pid) if pid.isdigit() else 0
        if host != os.uname().nodename or not has_it_open(pid, lock.name):
            there = f"on {host} or in a container: stop it there."
            leave(f"The run that holds {directory} is not among the processes here, but {there}", 2)
        # It may be leaving of its own accord; one that Ctrl-Z has stopped has to wake up for it.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGCONT)
        if pid == 1:
            # With the container this process ends too.
            leave("Asked pid 1 to save and leave; the container ends with its exit code.", 0)
        print(f"Asked pid {pid} to save and leave; waiting for it.", flush=True)
        # Waits until its process is gone.
        fcntl.lockf(lock, fcntl.LOCK_SH, 1)
    except FileNotFoundError:
        another = "Another directory: make stop DIR=..., scripts/stop.sh ..."
        leave(f"No run holds {directory}. {another}", 2)
    except OSError as error:
        leave(f"Cannot stop the run that holds {directory}: {error.strerror}.", 2)
    lock.seek(0)
    _, code, summary = (lock.read() + "\n\n").split("\n", 2)
    if not code:
        saved = "the checkpoints that it saved before are whole."
        leave(f"The run (pid {pid}) died without a word; {saved}", 1)
    print(summary.rstrip("\n"))
    sys.exit(0 if int(code) in (0, 128 + signal.SIGTERM) else int(code))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout.reconfigure(errors="replace")
    stop(sys.argv[1])
