"""Campaigns: terminals, pipes and typing at their worst, and several processes that want the same."""

import fcntl
import functools
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from driver import SMALL, Campaign
from helpers import (
    MODES,
    ROOT,
    SCRIPT,
    Child,
    Moment,
    assert_same_run,
    batch_complete,
    corpus_of,
    saving,
    wait_until,
)

import train_graceful as t


@pytest.fixture(scope="module")
def longer_run(tmp_path_factory):
    """longer_run(mode): options, and the directory of the run with them that nobody disturbed, made once."""
    folder = tmp_path_factory.mktemp("terminal")
    corpus = corpus_of(folder / "corpus.txt", windows=100, context=16)

    @functools.cache
    def get(mode: str) -> tuple[list, Path]:
        schedule = ["--steps", 60, "--save-every", 20, "--eval-every", 30, "--log-every", 1]
        options = ["--data", corpus, *SMALL, "--context", 16, *schedule, *MODES[mode]]
        child = Child(*options, "--checkpoint-dir", folder / mode)
        child.finish()
        assert child.exitcode == 0
        return options, folder / mode

    return get


def type_at(child: Child, text: bytes) -> None:
    """Types as fast as the terminal takes it, for as long as somebody is there, and reads what it shows meanwhile."""
    terminal = child.terminal.fileno()
    os.set_blocking(terminal, False)
    while text:
        readable, writable, _ = select.select([terminal], [terminal], [], 60)
        try:
            if readable:
                os.read(terminal, 65536)
            if writable:
                text = text[os.write(terminal, text[:1024]) :]
        except BlockingIOError:
            continue
        except OSError:  # the run has ended
            break
    os.set_blocking(terminal, True)


def junk(seed: int, size: int) -> bytes:
    """Bytes of every kind but those that are commands: no q, no s, no key that makes a signal or stops the terminal."""
    banned = {termios.CEOL, 3, 17, 19, 26, 28, *b"qQsSxXtT"}
    allowed = bytes(byte for byte in range(256) if byte not in banned)
    rng = random.Random(seed)
    return bytes(rng.choices(allowed, k=size))


def resize(child: Child) -> None:
    while child.exitcode is None and not child.ended():
        for columns in (1, 0, 10, 40, 200, 500):
            fcntl.ioctl(
                child.terminal.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0)
            )
            time.sleep(
                0.001
            )  # a thousand times a second is enough; without a pause the run hardly gets to its terminal


TYPING = {
    "a megabyte of junk in lines": junk(1, 2**20),
    "a megabyte without an end of line": b"q" * 2**20,
    "invalid UTF-8": b"\xff\xfe\xc3(\n\xe2\x82\n\xf0\x9f\n" * 500,
    "NUL bytes": b"\0\0\n\0q\0\n" * 500,
    "Ctrl-D held down": b"\4" * 5000,
    "Enter held down": b"\n" * 5000,
}


def typed(fork, options, directory, text: bytes) -> Child:
    """Most of it while the run waits in a batch, so that all of it is typed, and the rest while it trains."""
    child = fork(*options, "--checkpoint-dir", directory, plan=[(batch_complete(2), None)])
    child.paused()
    type_at(child, text[: len(text) * 3 // 4])
    child.go()
    type_at(child, text[len(text) * 3 // 4 :])
    return child


def redirected(target) -> list:
    """A plan that gives the run another standard output and standard error before it looks at them."""

    def redirect(frame) -> None:
        fd = target()
        os.dup2(fd, 1)
        os.dup2(fd, 2)

    return [(Moment("trained"), redirect)]


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_pipe() -> int:
    """One that nobody reads, nor will."""
    reader, writer = os.pipe()
    os.set_inheritable(reader, True)
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writer, True)
    return writer


def not_disturbed(fork, options, reference, directory, start) -> None:
    """The run ends with exit code 0 and the weights of the run that nobody disturbed; the terminal is as before."""
    child = start(fork, options, directory)
    settings = termios.tcgetattr(child.terminal.fileno())
    child.finish(settings)
    assert child.exitcode == 0
    assert_same_run(directory, reference)


def stopped_terminal(fork, options, directory) -> Child:
    child = fork(*options, "--checkpoint-dir", directory)
    child.terminal.expect("step [0-9]+/")
    child.terminal.send("\x13")
    wait_until(lambda: (directory / "final.pt").exists())
    child.terminal.send("\x11")
    return child


def resized(fork, options, directory) -> Child:
    child = fork(*options, "--checkpoint-dir", directory)
    child.terminal.expect("step [0-9]+/")
    resize(child)
    return child


def suspended_in_a_save(fork, options, directory) -> Child:
    child = fork(*options, "--checkpoint-dir", directory, plan=[(saving("step_40.pt"), None)])
    child.paused()
    for _ in range(20):
        child.kill(signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        child.kill(signal.SIGCONT)
        os.waitpid(child.pid, os.WCONTINUED)
    child.go()
    return child


def hung_up_in_a_save(fork, options, directory, name: str, first: str, code: int) -> None:
    """The save is finished and whole; the first request decides the exit code, and a hang-up is one."""
    child = fork(
        *options,
        "--checkpoint-dir",
        directory,
        plan=[(saving(name), None)]
        if not first
        else [
            (batch_complete(40), None),
            (
                Moment(
                    "save_checkpoint",
                    where=lambda frame: "emergency" in str(frame.f_locals["path"]),
                ),
                None,
            ),
        ],
    )
    child.paused()
    if first:
        child.terminal.send(first)
        child.terminal.expect("Exit requested!")
        child.go()
        child.paused()
    child.terminal.close()
    child.go()
    child.wait()
    assert child.exitcode == code
    paths = list((directory / "emergency_exit").iterdir())
    assert len(paths) == 1
    assert (
        t.load_checkpoint(paths[0])["exit_reason"]
        == {0: "user_requested_graceful_exit", 129: "signal_SIGHUP", 130: "signal_SIGINT"}[code]
    )
    assert not list(directory.rglob(".*"))


def in_an_environment(options, reference, directory, environment: dict[str, str]) -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, options), "--checkpoint-dir", directory],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={**os.environ, **environment},
        timeout=60,
    )
    assert result.returncode == 0 and result.stderr == b""
    text = result.stdout.decode(environment.get("PYTHONIOENCODING", "utf-8"))
    assert "Training started. Press 'q' + Enter to exit gracefully..." in text
    assert_same_run(directory, reference)


def test_terminal_and_output(fork, longer_run, tmp_path, whole):
    with Campaign(
        "closed and full outputs, hang-ups, junk, Ctrl-D, Ctrl-S, suspending, resizing, odd locales"
    ) as campaign:
        for mode in MODES if whole else ["standard"]:
            options, reference = longer_run(mode)
            starts = {
                what: lambda *args, text=text: typed(*args, text) for what, text in TYPING.items()
            }
            outputs = {
                "closed pipe": closed_pipe,
                "full pipe": full_pipe,
                "full disk": lambda: os.open("/dev/full", os.O_WRONLY),
            }
            starts |= {
                what: lambda fork, options, directory, target=target: fork(
                    *options, "--checkpoint-dir", directory, plan=redirected(target)
                )
                for what, target in outputs.items()
            }
            starts |= {
                "Ctrl-S": stopped_terminal,
                "resized": resized,
                "suspended in a save": suspended_in_a_save,
            }
            for what, start in starts.items():
                campaign.case(
                    f"{mode}: {what}",
                    not_disturbed,
                    fork,
                    options,
                    reference,
                    tmp_path / mode / what.replace(" ", "-"),
                    start,
                )
            for name, first, code in [("step_40.pt", "", 129), ("", "q\n", 0), ("", "\3", 130)]:
                directory = tmp_path / f"{mode}-hung-up-{code}"
                campaign.case(
                    directory.name, hung_up_in_a_save, fork, options, directory, name, first, code
                )
        environments = [
            {"PYTHONIOENCODING": "ascii"},
            {"LANG": "C", "LC_ALL": "C"},
            {"TERM": "dumb"},
        ]
        for number, environment in enumerate(environments if whole else environments[:1]):
            campaign.case(
                environment,
                in_an_environment,
                *longer_run("standard"),
                tmp_path / f"environment-{number}",
                environment,
            )


def all_at_once(fork, options, directory, number: int) -> None:
    """Exactly one of them runs; the others name its pid, if it has come to write it down."""
    plan = [
        (
            Moment(
                "__init__",
                where=lambda frame: type(frame.f_locals["self"]).__name__ == "RunDirectory",
            ),
            None,
        )
    ]
    children = [
        fork(*options, "--steps", 10**6, "--checkpoint-dir", directory, plan=plan)
        for _ in range(number)
    ]
    for child in children:
        child.paused()
    for child in children:
        child.go()
    refused = {}
    winner = None
    for child in children:
        if (
            child.terminal.expect(
                ["Training started", "error: .* in use by another run \\(pid (\\S+) on"]
            )
            == 0
        ):
            assert winner is None
            winner = child
        else:
            refused[child] = child.terminal.match[1]
    assert len(refused) == number - 1 and set(refused.values()) <= {str(winner.pid), "unknown"}
    for child in refused:
        child.finish()
        assert child.exitcode == 2
    winner.terminal.send("q\n")
    winner.finish()
    assert winner.exitcode == 0


def lock_of_a_killed_run(fork, options, directory) -> None:
    child = fork(*options, "--checkpoint-dir", directory)
    child.terminal.expect("Training started")
    child.kill(signal.SIGKILL)
    child.finish()
    assert (directory / "run.lock").read_text().split()[0] == str(child.pid)
    child = fork(*options, "--checkpoint-dir", directory)
    child.finish()
    assert child.exitcode == 0


def stop(directory: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(ROOT / "scripts" / "stop.sh"), str(directory)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHON": sys.executable},
    )


def stranger_with_the_pid(fork, options, directory, held: bool) -> None:
    """The file names the pid of a process that has nothing to do with it, as after a reboot."""
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        child = None
        if held:
            child = fork(*options, "--steps", 10**6, "--checkpoint-dir", directory)
            child.terminal.expect("step [0-9]+/")
        else:
            directory.mkdir()
        (directory / "run.lock").write_text(f"{stranger.pid} {socket.gethostname()}\n")
        result = stop(directory)
        if held:
            assert result.returncode == 2 and "stop it there" in result.stderr
            child.terminal.send("q\n")
            assert "Graceful exit completed" in child.finish() and child.exitcode == 0
        else:
            assert result.returncode == 2 and "No run holds" in result.stderr
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_two_at_once(fork, longer_run, tmp_path, whole):
    with Campaign(
        "ten starts at the same instant on one directory; locks of killed runs; reused pids"
    ) as campaign:
        options, _ = longer_run("standard")
        for number in range(30 if whole else 3):
            campaign.case(
                f"ten at once, {number}", all_at_once, fork, options, tmp_path / f"ten-{number}", 10
            )
        for number in range(30 if whole else 1):
            campaign.case(
                f"killed, {number}",
                lock_of_a_killed_run,
                fork,
                options,
                tmp_path / f"killed-{number}",
            )
        for held in (True, False):
            campaign.case(
                f"stranger, held {held}",
                stranger_with_the_pid,
                fork,
                options,
                tmp_path / f"stranger-{held}",
                held,
            )
