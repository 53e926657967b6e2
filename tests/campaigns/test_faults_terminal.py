"""Campaigns: no terminal, pipe or typing disturbs a run; of several that want the same, one runs.

The run that was disturbed has the bits of the one that was not.
"""

import contextlib
import fcntl
import functools
import os
import random
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import helpers as h
import pytest
from driver import Campaign, undisturbed, waiting

import train_graceful as t


@pytest.fixture(scope="module")
def longer_run(tmp_path_factory):
    schedule = "--steps 60 --save-every 20 --eval-every 30 --log-every 1".split()
    folder = tmp_path_factory.mktemp("terminal")
    return undisturbed(folder, *schedule, windows=100, context=16)


def junk(seed: int, size: int) -> bytes:
    """No command is in it: no q, no s, no key that makes a signal or stops the terminal."""
    banned = {termios.CEOL, 3, 17, 19, 26, 28, *b"qQsSxXtT"}
    return bytes(random.Random(seed).choices([*{*range(256)} - banned], k=size))


TYPING = {
    "a megabyte of junk in lines": junk(1, 2**20),
    "a megabyte without an end of line": b"q" * 2**20,
    "invalid UTF-8": b"\xff\xfe\xc3(\n\xe2\x82\n\xf0\x9f\n" * 500,
    "NUL bytes": b"\0\0\n\0q\0\n" * 500,
    "Ctrl-D held down": b"\4" * 5000,
    "Enter held down": b"\n" * 5000,
}


def type_at(child: h.Child, text: bytes) -> None:
    """As fast as the terminal takes it, while somebody is there; reads what it shows meanwhile."""
    terminal = child.terminal.fileno()
    os.set_blocking(terminal, False)
    while text and not child.ended():
        readable, writable, _ = select.select([terminal], [terminal], [], 60)
        with contextlib.suppress(OSError):  # it takes none now, or the run has ended
            if readable:
                os.read(terminal, 65536)
            if writable:
                text = text[os.write(terminal, text[:1024]) :]
    os.set_blocking(terminal, True)


def typed(text: bytes, fork, *words: object) -> h.Child:
    """Most of it while the run waits in a batch, so that all is typed; the rest while it trains."""
    child = waiting(fork, h.Moment("complete", 2), *words)
    type_at(child, text[:-1000])
    child.go()
    type_at(child, text[-1000:])
    return child


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_pipe() -> int:
    """One that nobody reads, nor will."""
    _, writer = os.pipe()
    os.write(writer, bytes(fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)))
    return writer


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def redirected(target, fork, *words: object) -> h.Child:
    """The run has another standard output and standard error before it looks at them."""

    def redirect(frame) -> None:
        fd = target()
        os.dup2(fd, 1)
        os.dup2(fd, 2)

    return fork(*words, plan=[(h.Moment("start"), redirect)])


def stopped_terminal(fork, *words: object) -> h.Child:
    child = fork(*words)
    child.terminal.expect("step [0-9]+/")
    child.terminal.send("\x13")
    h.wait_until(Path(words[-1], "final.pt").exists)
    child.terminal.send("\x11")
    return child


def resized(fork, *words: object) -> h.Child:
    child = fork(*words)
    child.terminal.expect("step [0-9]+/")
    while not child.ended():
        for columns in (1, 0, 10, 40, 200, 500):
            size = struct.pack("HHHH", 24, columns, 0, 0)
            fcntl.ioctl(child.terminal.fileno(), termios.TIOCSWINSZ, size)
            # A thousand times a second is enough; else the run hardly gets to its terminal.
            time.sleep(0.001)
    return child


def suspended_in_a_save(fork, *words: object) -> h.Child:
    child = waiting(fork, h.saving("step_40.pt"), *words)
    for _ in range(20):
        child.kill(signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        child.kill(signal.SIGCONT)
        os.waitpid(child.pid, os.WCONTINUED)
    child.go()
    return child


DISTURBANCES = {
    **{name: functools.partial(typed, text) for name, text in TYPING.items()},
    "closed pipe": functools.partial(redirected, closed_pipe),
    "full pipe": functools.partial(redirected, full_pipe),
    "full disk": functools.partial(redirected, full_disk),
    "Ctrl-S": stopped_terminal,
    "resized": resized,
    "suspended in a save": suspended_in_a_save,
}


def not_disturbed(fork, options, reference, directory, disturbed) -> None:
    """Exit code 0, the weights of the run that nobody disturbed, the terminal as before."""
    child = disturbed(fork, *options, "--checkpoint-dir", directory)
    child.finish(termios.tcgetattr(child.terminal.fileno()))
    assert child.exitcode == 0
    h.assert_same_run(directory, reference)


def hung_up_in_a_save(fork, options, directory, first: str, code: int, reason: str) -> None:
    """The save is finished and whole; the first request decides, and a hang-up is one."""
    save = h.saving("emergency" if first else "step_40.pt")
    plan = [(h.Moment("complete", 40), None), (save, None)]
    child = fork(*options, "--checkpoint-dir", directory, plan=plan)
    child.paused()
    child.terminal.send(first)
    child.terminal.expect("Exit requested!" if first else "")
    child.go()
    child.paused()
    child.terminal.close()
    child.go()
    child.wait()
    assert child.exitcode == code
    (path,) = (directory / "emergency_exit").iterdir()
    assert t.load_checkpoint(path)["exit_reason"] == reason
    assert not list(directory.rglob(".*"))


HANG_UPS = [
    ("", 129, "signal_SIGHUP"),
    ("q\n", 0, "user_requested_graceful_exit"),
    ("\3", 130, "signal_SIGINT"),
]
ENVIRONMENTS = [{"PYTHONIOENCODING": "ascii"}, {"LANG": "C", "LC_ALL": "C"}, {"TERM": "dumb"}]


def in_an_environment(options, reference, directory, environment: dict[str, str]) -> None:
    command = [sys.executable, str(h.SCRIPT), *map(str, options), "--checkpoint-dir", directory]
    how = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 60}
    result = subprocess.run(command, env={**os.environ, **environment}, **how)
    assert result.returncode == 0 and result.stderr == b""
    assert b"Training started. Press 'q' + Enter to exit gracefully..." in result.stdout
    h.assert_same_run(directory, reference)


def test_terminal_and_output(fork, longer_run, tmp_path, whole):
    what = "closed and full outputs, hang-ups, junk, Ctrl-D, Ctrl-S, suspending, resizing"
    with Campaign(f"{what}, odd locales") as campaign:
        for mode in h.MODES if whole else ["standard"]:
            for name, disturbed in DISTURBANCES.items():
                how = *longer_run(mode), tmp_path / f"{mode}-{name}".replace(" ", "-"), disturbed
                campaign.case(name, not_disturbed, fork, *how)
            for first, code, reason in HANG_UPS:
                how = longer_run(mode)[0], tmp_path / f"{mode}-{reason}", first, code, reason
                campaign.case(f"{mode}: {reason}", hung_up_in_a_save, fork, *how)
        for one in ENVIRONMENTS if whole else ENVIRONMENTS[:1]:
            how = *longer_run("standard"), tmp_path / "-".join(one), one
            campaign.case(one, in_an_environment, *how)


def all_at_once(fork, options, directory) -> None:
    """Exactly one of them runs; the others name its pid, if it has come to write it down."""
    words = *options, "--steps", 10**6, "--checkpoint-dir", directory
    children = [waiting(fork, h.Moment("lock"), *words) for _ in range(10)]
    for child in children:
        child.go()
    winners, named = [], set()
    for child in children:
        refusal = "error: .* in use by another run \\(pid (\\S+) on"
        if child.terminal.expect(["Training started", refusal]) == 0:
            winners.append(child)
        else:
            named.add(child.terminal.match[1])
            h.ended(child, 2)
    (winner,) = winners
    assert named <= {str(winner.pid), "unknown"}
    winner.terminal.send("q\n")
    h.ended(winner)


def lock_of_a_killed_run(fork, options, directory) -> None:
    child = fork(*options, "--checkpoint-dir", directory)
    child.terminal.expect("Training started")
    child.kill(signal.SIGKILL)
    child.finish()
    assert (directory / "run.lock").read_text().split()[0] == str(child.pid)
    h.ended(fork(*options, "--checkpoint-dir", directory))


def test_two_at_once(fork, longer_run, tmp_path, whole):
    options, _ = longer_run("standard")
    what = "ten starts at the same instant on one directory; locks of killed runs"
    with Campaign(what) as campaign:
        for number in range(30 if whole else 2):
            for check in all_at_once, lock_of_a_killed_run:
                name = f"{check.__name__}-{number}"
                campaign.case(name, check, fork, options, tmp_path / name)
