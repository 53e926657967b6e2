"""What the fault campaigns share: a count of cases and failures, strace, and the options of their runs."""

import shutil
import subprocess
import traceback
from collections.abc import Callable

import pytest
from helpers import TABLE

SMALL = [
    "--context",
    "8",
    "--layers",
    "1",
    "--heads",
    "1",
    "--dim",
    "8",
    "--experts",
    "1",
    "--batch-size",
    "2",
    "--dropout",
    "0.1",
]
SCHEDULE = [
    "--steps",
    "7",
    "--save-every",
    "2",
    "--eval-every",
    "3",
    "--log-every",
    "1",
    "--keep",
    "2",
]


class Campaign:
    """Counts cases and collects failures, so that one bad case does not hide the next; as a context manager it reports."""

    def __init__(self, what: str) -> None:
        self.what, self.cases, self.failures = what, 0, []

    def __enter__(self):
        return self

    def case(self, name: object, body: Callable, *args) -> None:
        self.cases += 1
        try:
            body(*args)
        except Exception:
            self.failures.append(f"{name}: {traceback.format_exc()}")

    def __exit__(self, kind, *rest) -> None:
        if kind is None:
            TABLE.append((self.what, self.cases, len(self.failures)))
            assert self.cases and not self.failures, "\n".join(self.failures[:5])


needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None, reason="strace is missing: apt install strace"
)


def trace(thread: int, log, *options: str) -> subprocess.Popen:
    """strace on one thread; returns when it has taken hold."""
    strace = subprocess.Popen(
        ["strace", "-p", str(thread), "-o", str(log), "-e", "trace=%file,%desc", *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "attached" in strace.stderr.readline()
    return strace
