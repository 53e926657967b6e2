"""What the benchmarks measure with: rounds, terminals, processes of their own.

bench_tools.py MODULE FUNCTION ARGUMENTS    runs a function for child()
"""

import importlib
import inspect
import json
import random
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import pexpect

# Options of a model that is so small that it says nothing.
TINY = ["--context=16", "--layers=2", "--heads=2", "--dim=16", "--experts=2", "--batch-size=4"]
NEVER = 10**9
NO_SAVES = ["--save-every", NEVER, "--eval-every", NEVER]
# With a program that says nothing.
PATIENCE_SECONDS = 300


def interleaved(rounds: int, *measures: Callable[[], float]) -> list[list[float]]:
    """Each measure once a round, in random order; one list of results for each."""
    results: list[list[float]] = [[] for _ in measures]
    for _ in range(rounds):
        for which in random.sample(range(len(measures)), len(measures)):
            results[which].append(measures[which]())
    return results


def words(command: Sequence[object]) -> list[str]:
    return [str(word) for word in command]


def terminal(command: Sequence[object]) -> pexpect.spawn:
    """A command on a pseudo-terminal of its own, read as soon as it writes."""
    program, *arguments = words(command)
    process = pexpect.spawn(program, arguments, timeout=PATIENCE_SECONDS, dimensions=(24, 120))
    process.delayafterread = None
    return process


def when(process: pexpect.spawn, text: object) -> float:
    """When text, or EOF, arrived; what follows it is looked at next. Raises a pexpect error."""
    process.expect_exact(text)
    return time.perf_counter()


def when_gone(process: pexpect.spawn) -> float:
    """When a process had left the process table: a shell would prompt."""
    process.expect(pexpect.EOF)
    process.wait()
    return time.perf_counter()


def child_command(function: Callable, **arguments: object) -> list[str]:
    settings = json.dumps(arguments, default=str)
    module = Path(inspect.getfile(function)).stem
    return [__file__, module, function.__name__, settings]


def child(function: Callable, python: str = sys.executable, **arguments: object) -> typing.Any:
    """What a function returns in a process of its own. Raises RuntimeError."""
    command, null = [python, *child_command(function, **arguments)], subprocess.DEVNULL
    answer = subprocess.run(command, check=False, stdin=null, capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(f"{function.__name__} failed:\n{answer.stdout}{answer.stderr}")
    return json.loads(answer.stdout.splitlines()[-1])


if __name__ == "__main__":
    module, name, arguments = sys.argv[1:]
    function = getattr(importlib.import_module(module), name)
    print(json.dumps(function(**json.loads(arguments))))
