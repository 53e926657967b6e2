"""What the benchmarks measure with: rounds, terminals, processes of their own, memory.

bench_tools.py MODULE FUNCTION ARGUMENTS RESULT    runs a function for child()
"""

import contextlib
import importlib
import inspect
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

from ptyprocess import PtyProcess

# Options of a model that is so small that it says nothing.
TINY = ["--context=16", "--layers=2", "--heads=2", "--dim=16", "--experts=2", "--batch-size=4"]
NEVER = 10**9
# With a program that says nothing.
PATIENCE_SECONDS = 300


def interleaved(rounds: int, *measures: Callable[[], float]) -> list[list[float]]:
    """Each measure once a round, in an order that rotates; one list of results for each."""
    results: list[list[float]] = [[] for _ in measures]
    for number in range(rounds):
        for i in range(len(measures)):
            which = (number + i) % len(measures)
            results[which].append(measures[which]())
    return results


def seconds_to(function: Callable, *arguments: object) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def words(command: Sequence[object]) -> list[str]:
    return [str(word) for word in command]


class Terminal:
    """A command on a pseudo-terminal of its own, read as it writes."""

    def __init__(self, command: Sequence[object]) -> None:
        self.process = PtyProcess.spawn(words(command), dimensions=(24, 120))
        self.text = b""

    def wait_for(self, text: str) -> float:
        """When text arrived; what follows it is looked at next. Raises EOFError if it never does."""
        while text.encode() not in self.text:
            try:
                if not select.select([self.process.fd], [], [], PATIENCE_SECONDS)[0]:
                    raise EOFError(f"{self.text.decode()}\nno {text!r} in {PATIENCE_SECONDS} s")
                self.text += os.read(self.process.fd, 65536)
            except OSError:
                raise EOFError(self.text.decode(errors="replace")) from None
        now = time.perf_counter()
        self.text = self.text.partition(text.encode())[2]
        return now

    def wait_gone(self) -> float:
        """When the process had left the process table."""
        with contextlib.suppress(OSError):
            while data := os.read(self.process.fd, 65536):
                self.text += data
        os.waitpid(self.process.pid, 0)
        now = time.perf_counter()
        self.process.terminated, self.process.status = True, 0
        self.process.fileobj.close()
        return now


def child_command(function: Callable, result: str, **arguments: object) -> list[str]:
    settings = json.dumps(arguments, default=str)
    module = Path(inspect.getfile(function)).stem
    return [__file__, module, function.__name__, settings, result]


def child(function: Callable, processes: int = 0, **arguments: object) -> typing.Any:
    """What a function returns in a process of its own, or on rank 0 of some under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with tempfile.NamedTemporaryFile("r") as result:
        command = child_command(function, result.name, **arguments)
        terminal = Terminal([sys.executable, *(launcher if processes else []), *command])
        terminal.wait_gone()
        text = result.read()
    if not text:
        output = terminal.text.decode(errors="replace")
        raise RuntimeError(f"{function.__name__} failed:\n{output}")
    return json.loads(text)


def run_child(module: str, function: str, arguments: str, result: str) -> None:
    measured = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    if os.environ.get("RANK", "0") == "0":
        Path(result).write_text(json.dumps(measured))


def until_line(command: Sequence[str], start: str, lines: int = 1) -> tuple[float, float]:
    """Seconds to the first line that begins so, and the peak memory, in MiB, at the last of them."""
    started, seconds = time.perf_counter(), 0.0
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    output = typing.cast(typing.IO[str], process.stdout)
    for line in output:
        if line.startswith(start):
            seconds = seconds or time.perf_counter() - started
            lines -= 1
            if not lines:
                break
    else:
        raise RuntimeError(f"{command} ended without {start!r}")
    # Its workers too.
    os.killpg(process.pid, signal.SIGKILL)
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    output.close()
    return seconds, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def memory(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{key}:")[2].split()[0])


if __name__ == "__main__":
    run_child(*sys.argv[1:])
