#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "numpy"]
# ///
"""Train a PyTorch model and leave at any moment without losing anything.

    python train_graceful.py                     train the built-in model on Python's own source
    python train_graceful.py --mode geometric    rotated experts and three optimizers
    python train_graceful.py --resume latest     go on: the same run, bit for bit

To train a model of your own, import this file: write train(run) and call main(train), as the
built-in program does at the end. To use it in another trainer, import ExitMonitor,
save_checkpoint and load_checkpoint alone.

While it trains: q + Enter saves and leaves, s + Enter saves, ? + Enter shows the last checkpoint.
Ctrl-C, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU save and leave too; a second Ctrl-C leaves
without saving. The batch at hand is finished first, the accelerator's memory is freed, the
terminal is given back, and no process stays behind.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    # Importing torch takes seconds: nothing to save yet, and no reason for a traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import atexit
import bisect
import collections
import contextlib
import copy
import csv
import dataclasses
import datetime
import difflib
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import mmap
import multiprocessing.util
import operator
import os
import pickletools
import random
import re
import select
import shlex
import shutil
import socket
import stat
import struct
import subprocess
import sys
import sysconfig
import tempfile
import termios
import threading
import time
import traceback
import typing
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_pre_hook

__all__ = [
    "ByteDataset",
    "ByteLM",
    "CheckpointError",
    "ExitMonitor",
    "Experts",
    "GeometricTrainingController",
    "Run",
    "StandardTrainingController",
    "TrainingController",
    "UserError",
    "controller_training_loop",
    "latest_checkpoint",
    "load_checkpoint",
    "main",
    "option",
    "save_checkpoint",
    "standard_training_loop",
]


class UserError(Exception):
    """A mistake that the user can mend: main() prints it as one line and exits with code 2."""


class CheckpointError(UserError):
    """The file is not a checkpoint, is damaged, or does not fit this run."""


# ---- Options ----------------------------------------------------------------------------------


class Option(typing.NamedTuple):
    """An option of the command line. Its type is that of the default, or kind where that is None.

    A fixed one cannot change when a run is resumed. Numbers are at least `least` and less than
    `below`; texts of kind Path become absolute, and a tuple takes several values.
    """

    default: typing.Any
    help: str = ""
    choices: tuple[str, ...] | None = None
    fixed: bool = True
    least: float = -math.inf
    below: float = 1e15
    kind: type | None = None

    def type(self) -> type:
        item = self.default[0] if isinstance(self.default, tuple) and self.default else self.default
        return self.kind or (type(item) if item not in (None, ()) else str)

    def parsed(self, text: str) -> typing.Any:
        """The value that text stands for. Raises ArgumentTypeError, with the reason."""
        kind = self.type()
        try:
            # 1e3 is a whole number too.
            whole = kind is int and not re.fullmatch(r"[+-]?\d+", text) and float(text).is_integer()
            value = text if kind is Path else kind(float(text) if whole else text)
        except (ValueError, OverflowError):
            word = {int: "a whole number", float: "a number"}.get(kind, f"a {kind.__name__}")
            raise argparse.ArgumentTypeError(f"{text!r} is not {word}") from None
        try:
            return self.checked_item(os.path.abspath(value) if text and kind is Path else value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    def checked(self, value: typing.Any) -> typing.Any:
        """A value from a checkpoint. Raises ValueError where the command line cannot make it."""
        if value is None and self.default is None:
            return value
        if isinstance(self.default, tuple):
            if type(value) is not tuple:
                raise ValueError(f"{value!r} is not a tuple")
            return tuple(map(self.checked_item, value))
        return self.checked_item(value)

    def checked_item(self, value: typing.Any) -> typing.Any:
        kind: typing.Any = str if self.type() is Path else self.type()
        if type(value) is not kind:
            raise ValueError(f"{value!r} is not of type {kind.__name__}")
        if kind is str and ("\0" in value or not value and self.default != ""):
            raise ValueError("an empty text" if not value else "a text with a NUL in it")
        if self.choices is not None and value not in self.choices:
            raise ValueError(f"{value!r} is not one of {', '.join(self.choices)}")
        if kind in (int, float) and not self.least <= value < self.below:
            bounds = f"{self.least:g} or more and below {self.below:g}"
            raise ValueError(f"{value} is not {bounds}")
        return value

    def add_to(self, parser: argparse._ArgumentGroup, name: str) -> None:
        default = "" if self.default in (None, (), False) else f" (default {self.default})"
        settings: dict[str, typing.Any] = {"help": (self.help + default).replace("%", "%%")}
        if name.startswith("no_"):
            settings["action"] = "store_true"
        elif isinstance(self.default, bool):
            settings["action"] = argparse.BooleanOptionalAction
        else:
            letters = {int: "N", float: "X", Path: "PATH"}
            settings |= {"type": self.parsed, "metavar": letters.get(self.type(), "TEXT")}
            if self.choices:
                settings["metavar"] = "{" + ",".join(self.choices) + "}"
            if isinstance(self.default, tuple):
                settings["nargs"] = "+"
        parser.add_argument("--" + name.replace("_", "-"), **settings)


option = Option

COMMON_OPTIONS: dict[str, typing.Any] = {
    "steps": option(None, "batches in the whole run, resumes included", None, False, 1, kind=int),
    "epochs": option(None, "passes over the data, if they end earlier", None, False, 1, kind=int),
    "batch_size": option(16, "samples of a batch, over all processes", least=1),
    "workers": option(0, "processes that load the data", None, False, 0, 1025),
    "seed": option(0, "of the weights, the order of the data, augmentation, dropout", least=0),
    "device": option("auto", "where to train", ("auto", "cpu", "cuda", "mps"), False),
    "dtype": option(
        "auto",
        "of autocast; auto is bfloat16 on CUDA, else float32",
        ("auto", "float32", "bfloat16"),
        False,
    ),
    "compile": option(False, "run the models through torch.compile", fixed=False),
    "shard": option(False, "spread the models over torchrun's processes", fixed=False),
    "eval_every": option(100, "batches between evaluations", None, False, 1),
    "eval_batches": option(None, "of an evaluation (default all)", None, False, 1, kind=int),
    "save_every": option(500, "batches between periodic checkpoints", None, False, 1),
    "keep": option(3, "periodic checkpoints kept", None, False, 1),
    "log_every": option(10, "batches between rows of metrics.csv", None, False, 1),
    "checkpoint_dir": option("checkpoints", "where checkpoints go", fixed=False, kind=Path),
    "tensorboard": option(False, "also write event files for TensorBoard", fixed=False),
}
NOT_STORED = {
    "resume": option(None, "a checkpoint to go on from, or latest", fixed=False),
    "no_keyboard": option(False, "do not listen to the keyboard", fixed=False),
}


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        hint = "--help lists the options"
        if unknown := re.match(r"unrecognized arguments: (--[^\s=]+)", message):
            if close := difflib.get_close_matches(unknown[1], self._option_string_actions, 1):
                hint = f"did you mean {close[0]}?"
        raise UserError(f"{message} ({hint})")


def declared(options: dict[str, typing.Any]) -> dict[str, Option]:
    """The options of a program: main()'s keyword arguments, then the common ones."""
    own = {}
    for name, value in options.items():
        base = COMMON_OPTIONS.get(name)
        made = (
            value if isinstance(value, Option) else (base or Option(None))._replace(default=value)
        )
        if base is not None and made.kind is None:
            made = made._replace(kind=base.type())
        own[name] = made
    return {**{name: own[name] for name in own if name not in COMMON_OPTIONS},
            **{name: own.get(name, common) for name, common in COMMON_OPTIONS.items()}}  # fmt: skip


def parse_options(
    options: dict[str, Option], argv: Sequence[str] | None, about: str | None
) -> dict[str, typing.Any]:
    """The options that were given on the command line, by name. Raises UserError."""
    parser = OneLineParser(
        usage="%(prog)s [options]",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    own = parser.add_argument_group("this program")
    common = parser.add_argument_group("training")
    for name, one in {**options, **NOT_STORED}.items():
        one.add_to(common if name in COMMON_OPTIONS or name in NOT_STORED else own, name)
    given = vars(parser.parse_args(argv))
    return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}


def configuration(
    options: dict[str, Option], given: dict[str, typing.Any], stored: object, path: Path | None
) -> argparse.Namespace:
    """Defaults, overlaid with a checkpoint's configuration, overlaid with what was given.

    Raises UserError for an option that is fixed and given anew, CheckpointError for a
    configuration that this program cannot have made.
    """
    values = {name: one.default for name, one in options.items()}
    values["checkpoint_dir"] = os.path.abspath(values["checkpoint_dir"])
    if path is not None:
        if not isinstance(stored, dict) or not all(isinstance(name, str) for name in stored):
            raise CheckpointError(f"{path}: not a checkpoint of this program (no configuration)")
        if strange := stored.keys() - options.keys():
            raise CheckpointError(f"{path}: of another program, with --{flag(min(strange))}")
        for name, value in stored.items():
            try:
                values[name] = options[name].checked(value)
            except ValueError as error:
                raise CheckpointError(f"{path}: --{flag(name)}: {one_line(error)}") from None
            if options[name].fixed and given.get(name, value) != value:
                there, here = f"--{flag(name)} {value}", f"--{flag(name)} {given[name]}"
                raise UserError(f"{here} does not fit the checkpoint, whose run has {there}")
    return argparse.Namespace(**{**values, **given})


def flag(name: str) -> str:
    return name.replace("_", "-")


def one_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return text or type(error).__name__


# ---- Terminal ---------------------------------------------------------------------------------


EXIT_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
USER_REQUEST = "user_requested_graceful_exit"


def in_foreground(fd: int) -> bool:
    """False only where fd is our controlling terminal and the shell has given it to another job."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        # Not a terminal, or not our controlling one: job control does not apply.
        return True


def started_by_torchrun() -> bool:
    return dist.is_torchelastic_launched()


def is_first_rank() -> bool:
    """Only rank 0 of many processes speaks."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


def typed_at_us(terminal: int) -> bool:
    """False where a shell has given the terminal to another job: that typing is not ours."""
    try:
        os.tcgetpgrp(terminal)
    except OSError:
        if started_by_torchrun() and os.isatty(terminal) and shutil.which("ps"):
            # torchrun gave us a session of our own; it is the shell's job. + means the foreground.
            question = ["ps", "-o", "stat=", "-p", str(os.getppid())]
            return "+" in subprocess.run(question, capture_output=True, text=True).stdout
    return in_foreground(terminal)


def from_the_background(function: Callable) -> Callable:
    """A decorator: touching the terminal from the background is an error, and stops nobody.

    The signals are blocked for this thread alone: ignored, they would be so in every program
    that is executed, too.
    """

    @functools.wraps(function)
    def wrapper(*arguments, **keywords):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTTIN, signal.SIGTTOU))
        try:
            return function(*arguments, **keywords)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    return wrapper


@from_the_background
def complain(text: str) -> None:
    """On standard error, if anybody is there to read it."""
    with contextlib.suppress(OSError, AttributeError):
        print(text, end="", file=sys.stderr, flush=True)


def complain_of(mistake: UserError) -> None:
    """In one line."""
    complain(f"error: {' '.join(str(mistake).splitlines())}\n")


def descriptor(stream: typing.TextIO | None) -> int | None:
    """None for a stream that was closed by the parent or is no file, as in a notebook."""
    try:
        return None if stream is None else stream.fileno()
    except (OSError, ValueError):
        return None


def short_time(seconds: float) -> str:
    """In words, with one unit: 90 s is 1.5 min."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


class Screen:
    """Lines for people on standard output; a failed write never raises and never blocks training.

    It writes with os.write: text left in Python's own buffer by a failed flush would turn exit
    code 0 into 120.
    """

    # Right of the status line: what is typed, and the last column, where a terminal would wrap.
    TYPING_COLUMNS = 6
    # What is kept for a terminal or a pipe that takes none right now.
    BACKLOG_BYTES = 64 * 1024

    def __init__(self, shown: bool = True) -> None:
        self._lock = threading.Lock()
        self._shown = shown
        self._fd = descriptor(sys.stdout) if shown else None
        self._encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        # Python answers LANG=C with UTF-8; who has set it has a terminal without symbols.
        locale = os.environ.get("LC_ALL") or os.environ.get("LANG")
        if locale in ("C", "POSIX") and not {"PYTHONUTF8", "PYTHONIOENCODING"} & os.environ.keys():
            self._encoding = "ascii"
        self.is_terminal = self._fd is not None and os.isatty(self._fd)
        self._status_width = 0
        self._backlog = b""

    def say(self, text: str) -> None:
        """Prints a line, below whatever the status line showed last."""
        with self._lock:
            self._write(self._erase_status() + text + "\n")

    def status(self, parts: Sequence[str]) -> None:
        """Redraws the status line: as many of parts, the most important first, as fit.

        Draws nothing unless standard output is a terminal and ours.
        """
        if self._fd is None or not self.is_terminal or not in_foreground(self._fd):
            return
        with self._lock:
            try:
                columns = os.get_terminal_size(self._fd).columns or 80
            except OSError:
                # The terminal has just gone.
                return
            room = max(1, columns - self.TYPING_COLUMNS)
            while len(parts) > 1 and len(" | ".join(parts)) > room:
                parts = parts[:-1]
            text = " | ".join(parts)[:room] + " "
            # A line that is redrawn anyway is not worth keeping for later.
            if not self._backlog:
                self._write("\r" + text.ljust(min(self._status_width, columns - 1)))
                self._status_width, self._backlog = len(text), b""

    def clear(self, wait: float = 0.0) -> None:
        """Leaves no status line behind; a stopped terminal has so many seconds to take the rest."""
        with self._lock:
            self._write(self._erase_status(), wait)

    def _erase_status(self) -> str:
        erase = "\r" + " " * self._status_width + "\r" if self._status_width else ""
        self._status_width = 0
        return erase

    @from_the_background
    def _write(self, text: str, wait: float = 0.0) -> None:
        if self._fd is None:
            # A notebook has a standard output without a descriptor.
            if self._shown and sys.stdout is not None:
                sys.stdout.write(text)
            return
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        backlog = self._backlog + text.encode(self._encoding, "replace")
        self._backlog = backlog[-self.BACKLOG_BYTES :]
        try:
            while self._backlog and select.select([], [self._fd], [], wait)[1]:
                written = os.write(self._fd, self._backlog[: select.PIPE_BUF])
                self._backlog = self._backlog[written:]
        except OSError:
            # Hung up, closed or full: there is nobody to tell, and training matters more.
            self._backlog = b""


class Interrupted(BaseException):
    """Raised in the main thread by a request that comes while it waits in interruptible()."""


class ExitMonitor:
    """Watches keyboard and signals in one background thread while the main thread trains.

    Use it as a context manager in the main thread and read `exit_requested` once a batch:

        with ExitMonitor() as monitor:
            for batch in batches:
                train_on(batch)
                if monitor.exit_requested:
                    break

    `reason` and `exit_code` describe the first request; `save_requested` is set when `s` was
    typed. The thread sleeps in select() on standard input, on the pipe to which Python's C signal
    handler writes and on a stop pipe, so it hears a request while the main thread is inside a long
    torch operation. A second SIGINT, half a second or more after the first, ends the process at
    once with code 130. On leaving the block, terminal and signal handlers are as before.

    Forked children, DataLoader workers among them, never reach it (see SignalsOfChildren).
    Raises ValueError when entered outside the main thread.
    """

    KEYS = "Keys: q + Enter saves and leaves, s + Enter saves, Ctrl-C twice leaves without saving."
    # Wakes the main thread out of a system call; by default it does nothing.
    WAKE = signal.SIGURG
    # Two Ctrl-C within this time are one: wrappers such as timeout deliver it twice.
    SAME_CTRL_C_SECONDS = 0.5
    # How long unread typing is left to the program in the foreground before we look again.
    BACKGROUND_PAUSE_SECONDS = 0.5
    # A typed line longer than this is no command.
    LINE_BYTES = 4096

    def __init__(self, screen: Screen | None = None, keyboard: bool = True) -> None:
        self.exit_requested = False
        self.reason: str | None = None
        self.exit_code = 0
        self.save_requested = False
        # What ? shows below the keys.
        self.describe: Callable[[], str] | None = None
        # Set where there is nothing to save: a request then ends the process with this line.
        self.nothing_to_save: str | None = None
        self.signals_heard = 0
        self._screen = screen or Screen()
        self._use_keyboard = keyboard
        self._requests: list[tuple[str, int]] = []
        self._requested = threading.Event()
        self._lock = threading.Lock()
        self._last_interrupt = -math.inf
        self._interruptible = False
        self._stdin = -1
        self._listening = False
        self._typed = b""
        self._terminal_settings: list | None = None

    def __enter__(self) -> ExitMonitor:
        with contextlib.ExitStack() as self._undo:
            self._signal_pipe, self._wakeup = self._pipe()
            self._stop_pipe, self._stop = self._pipe()
            os.set_blocking(self._wakeup, False)
            before_fd = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
            self._undo.callback(signal.set_wakeup_fd, before_fd)
            self._pid = os.getpid()
            before: dict[int, typing.Any] = {
                signum: signal.getsignal(signum) or signal.SIG_DFL for signum in EXIT_SIGNALS
            }
            # nohup's promise.
            if before[signal.SIGHUP] is signal.SIG_IGN:
                del before[signal.SIGHUP]
            self._children = self._undo.enter_context(SignalsOfChildren(before))
            for signum in (*before, self.WAKE):
                previous = signal.signal(signum, self._handler)
                self._undo.callback(signal.signal, signum, previous or signal.SIG_DFL)
            if self._use_keyboard and descriptor(sys.stdin) is not None:
                self._stdin = self._open_keyboard(sys.stdin.fileno())
                self._undo.callback(os.close, self._stdin)
                self._listening = True
                self._save_terminal()
            self._thread = threading.Thread(target=self._watch, name="exit-monitor", daemon=True)
            self._thread.start()
            self._undo = self._undo.pop_all()
        return self

    def __exit__(self, *exc_info) -> None:
        # A forked child that leaves the block: all of this is its parent's.
        if os.getpid() != self._pid:
            return
        os.write(self._stop, b"x")
        self._thread.join()
        self._restore_terminal()
        self._undo.close()

    @contextlib.contextmanager
    def interruptible(self, at_once: bool = True) -> Iterator[None]:
        """In the main thread: a request raises Interrupted in the block, whatever it waits for.

        One that was there before does so where at_once is set.
        """
        self._interruptible = True
        try:
            if self.exit_requested and at_once:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

    def interrupt(self) -> None:
        """Ends the main thread's waiting in interruptible(), if it does."""
        if self._interruptible:
            signal.pthread_kill(typing.cast(int, threading.main_thread().ident), self.WAKE)

    def request(self, reason: str, exit_code: int) -> None:
        """Asks for a graceful exit and says so on the screen; the same reason counts once."""
        with self._lock:
            if any(reason == known for known, _ in self._requests):
                return
            # Of torchrun's processes one that ends with code 0 would be waited for by the others.
            alone = exit_code or not started_by_torchrun()
            if self.nothing_to_save is not None and alone:
                self._abandon(f"🛑 Exit requested. {self.nothing_to_save}", exit_code)
            if not self._requests:
                # Said before the main thread can know, whose next line must come after this one.
                self._screen.say("🛑 Exit requested! Finishing current batch gracefully...")
            self._requests.append((reason, exit_code))
            self._publish()
        self.interrupt()

    def requested_within(self, seconds: float) -> bool:
        """Waits for a request, for so long at most."""
        return self._requested.wait(seconds)

    def hear(self, signum: int) -> None:
        """Turns a signal into a request; the second SIGINT ends the process."""
        self.signals_heard += 1
        if signum not in EXIT_SIGNALS:
            return
        self._children.parent_heard(signum)
        if signum == signal.SIGINT:
            now, last = time.monotonic(), self._last_interrupt
            self._last_interrupt = now
            if last > -math.inf and now - last > self.SAME_CTRL_C_SECONDS:
                text = "🛑 Second Ctrl-C: leaving without saving. Earlier checkpoints are whole."
                self._abandon(text, 128 + signal.SIGINT)
            if last == -math.inf and self.exit_requested:
                self._screen.say("Leaving already. Ctrl-C once more leaves without saving.")
        self.request(f"signal_{signal.Signals(signum).name}", 128 + signum)

    def withdraw(self, reason: str) -> None:
        """Takes a request back, for a save that failed; one that came after it stays."""
        with self._lock:
            self._requests = [request for request in self._requests if request[0] != reason]
            self._publish()

    def _publish(self) -> None:
        self.reason, self.exit_code = self._requests[0] if self._requests else (None, 0)
        self.exit_requested = bool(self._requests)
        if self.exit_requested:
            self._requested.set()
        else:
            self._requested.clear()

    def _handler(self, signum: int, frame: object) -> None:
        """In the main thread. What counts is the byte in the pipe, unless another has its place.

        An asyncio loop with signal handlers takes the wake-up descriptor and puts none back.
        """
        other = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        if other != self._wakeup:
            os.write(self._wakeup, bytes([signum]))
            if other != -1:
                signal.set_wakeup_fd(other, warn_on_full_buffer=False)
        if signum == self.WAKE and self._interruptible:
            self._interruptible = False
            raise Interrupted

    def _pipe(self) -> tuple[int, int]:
        ends = os.pipe()
        for fd in ends:
            self._undo.callback(os.close, fd)
        return ends

    @staticmethod
    def _open_keyboard(fd: int) -> int:
        """A descriptor of our own, so that nobody closes it under select().

        Of a terminal one that does not wait: around fg, the shell may read the line that select()
        has announced to us, and O_NONBLOCK on the shared descriptor would be the shell's trouble.
        """
        if os.isatty(fd):
            with contextlib.suppress(OSError):
                return os.open(os.ttyname(fd), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        return os.dup(fd)

    @from_the_background
    def _watch(self) -> None:
        pause = None
        while True:
            keyboard = [self._stdin] if self._listening and pause is None else []
            waited_for = [self._signal_pipe, self._stop_pipe, *keyboard]
            ready, _, _ = select.select(waited_for, [], [], pause)
            pause = None
            if self._signal_pipe in ready:
                for signum in os.read(self._signal_pipe, 4096):
                    self.hear(signum)
            if self._stop_pipe in ready:
                return
            if self._stdin in ready:
                if typed_at_us(self._stdin):
                    if select.select([self._stdin], [], [], 0)[0]:
                        self._read_keyboard()
                else:
                    # Not ours to read. fg sends no signal to a running job: look again.
                    pause = self.BACKGROUND_PAUSE_SECONDS

    def _read_keyboard(self) -> None:
        self._save_terminal()
        try:
            data = os.read(self._stdin, 65536)
        except BlockingIOError:
            return
        except OSError:
            # EIO: the terminal has gone, or was given to another job this very moment.
            data = b""
        if not data:
            self._typed = b""
            try:
                # A terminal that is still there: only Ctrl-D on an empty line.
                termios.tcgetattr(self._stdin)
            except termios.error:
                self._listening = False
            return
        *lines, self._typed = (self._typed + data).split(b"\n")
        self._typed = self._typed[: self.LINE_BYTES]
        self._obey([line.strip().lower() for line in lines])

    def _obey(self, commands: list[bytes]) -> None:
        if any(command in (b"q", b"quit", b"exit") for command in commands):
            self.request(USER_REQUEST, 0)
        elif b"s" in commands:
            self.save_requested = True
            self._screen.say("💾 Saving a checkpoint after this batch...")
        elif commands and not self.exit_requested and os.isatty(self._stdin):
            # torchrun passes on no second Ctrl-C.
            self._screen.say(self.KEYS.split(", Ctrl-C")[0] if started_by_torchrun() else self.KEYS)
            if b"?" in commands and self.describe is not None:
                self._screen.say(self.describe())

    def _abandon(self, text: str, exit_code: int) -> typing.NoReturn:
        """Ends the process here and now: the main thread may be inside a call of minutes."""
        self._screen.say(text)
        self._restore_terminal()
        end_children()
        os._exit(exit_code)

    def _save_terminal(self) -> None:
        # In the background it is in the shell's editing mode: that is not ours to remember.
        ours = os.isatty(self._stdin) and in_foreground(self._stdin)
        if self._terminal_settings is None and ours:
            self._terminal_settings = termios.tcgetattr(self._stdin)

    @from_the_background
    def _restore_terminal(self) -> None:
        if self._terminal_settings is None or not in_foreground(self._stdin):
            return
        try:
            # TCSANOW: waiting for output to drain would hang on a terminal stopped with Ctrl-S.
            termios.tcsetattr(self._stdin, termios.TCSANOW, self._terminal_settings)
            # A q typed too many is not for the shell.
            termios.tcflush(self._stdin, termios.TCIFLUSH)
        except termios.error:
            # Hung up: no terminal is left to restore.
            pass


class SignalsOfChildren:
    """What signals do in the children of a process that an ExitMonitor watches.

    A terminal or a scheduler signals the whole group. A child leaves to its parent what the parent
    has heard too, within a second; else it does what it would without a monitor, so that
    terminate() ends it. Its handlers are Python's, which a program that it executes does not
    inherit (as it would an ignored or a blocked signal). A context manager.
    """

    # For which a child waits for its parent to hear a signal too.
    PARENT_SECONDS = 0.5
    active: SignalsOfChildren | None = None

    def __init__(self, before: dict[int, typing.Any]) -> None:
        self._before = before
        # Shared with the children: when the parent last heard each signal.
        self._heard = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("d")

    def __enter__(self) -> SignalsOfChildren:
        self._outer, SignalsOfChildren.active = SignalsOfChildren.active, self
        self._terminate = multiprocessing.process.BaseProcess.terminate

        def terminate(process: multiprocessing.process.BaseProcess) -> None:
            # This one is meant for the child.
            self._heard[signal.SIGTERM] = 0.0
            self._terminate(process)

        multiprocessing.process.BaseProcess.terminate = terminate  # type: ignore[assignment, method-assign]
        return self

    def __exit__(self, *exc_info) -> None:
        multiprocessing.process.BaseProcess.terminate = self._terminate  # type: ignore[method-assign]
        SignalsOfChildren.active = self._outer

    def parent_heard(self, signum: int) -> None:
        self._heard[signum] = time.monotonic()

    def in_child(self) -> None:
        # The pipe is the parent's.
        signal.set_wakeup_fd(-1)
        for signum in self._before:
            signal.signal(signum, self._in_child)
        workers: typing.Any = sys.modules.get("torch.utils.data._utils.signal_handling")
        if workers is not None:
            # A DataLoader worker takes a handler for SIGTERM that ends it whoever has sent it.
            set_handlers = workers._set_worker_signal_handlers

            def set_our_handler_too() -> None:
                set_handlers()
                signal.signal(signal.SIGTERM, self._in_child)

            workers._set_worker_signal_handlers = set_our_handler_too

    def _in_child(self, signum: int, frame: object) -> None:
        deadline = time.monotonic() + self.PARENT_SECONDS
        while time.monotonic() < deadline:
            if time.monotonic() - self._heard[signum] < 1:
                return
            # The parent's monitor may not have come to it yet, and nothing will tell.
            time.sleep(0.005)
        signal.signal(signum, self._before[signum])
        signal.raise_signal(signum)


_forking = threading.local()


def before_fork() -> None:
    """Until a child's handlers are there, its signals wait."""
    if SignalsOfChildren.active is not None:
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_SIGNALS)


def after_fork() -> None:
    mask = vars(_forking).pop("mask", None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def after_fork_in_child() -> None:
    if SignalsOfChildren.active is not None:
        SignalsOfChildren.active.in_child()
    after_fork()


os.register_at_fork(
    before=before_fork, after_in_parent=after_fork, after_in_child=after_fork_in_child
)


def end_children() -> None:
    """Kills and reaps the loader's workers that are still there; they hold nothing to save."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join()


# ---- Checkpoints ------------------------------------------------------------------------------
#
# A checkpoint is what torch.save writes: a zip file with a pickle, data.pkl, which holds everything
# but the bytes of the tensors, and a record for each storage (data/0, data/1, ...), in the order in
# which the pickle first meets them. torch writes the file without those bytes; several threads, or
# several processes, then put them in their places.


# What a save may fail with: disk, device (in torch's words), memory, what cannot be saved.
SAVE_ERRORS = (OSError, RuntimeError, MemoryError, TypeError)
# What one thread reads or writes at a time, and what a cache still holds for its checksum.
PIECE_BYTES, CACHED_BYTES = 4 * 2**20, 2**18
# Of the pickle, which holds what is no tensor: a list takes one byte there, and 64 in memory.
PICKLE_BYTES = 32 * 2**20
PLAIN_TYPES = (
    {bool, int, float, complex, str, type(None)}
    | {torch.dtype, torch.device, torch.Size}
)  # fmt: skip
PLAIN_GLOBALS = {
    "__builtin__.complex",
    "__builtin__.set",
    "collections.Counter",
    "collections.OrderedDict",
    "torch.Size",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch.device",
    "torch.storage.UntypedStorage",
}


class Record(typing.NamedTuple):
    """A storage's bytes within a checkpoint: where they start, and where their CRC-32 stands."""

    name: str
    start: int
    size: int
    crc: int
    crc_at: int


class Part(typing.NamedTuple):
    """Some consecutive bytes of a record, by its number; data is uint8, 1-D, on any device."""

    record: int
    start: int
    data: Tensor


class Rows(typing.NamedTuple):
    """What one of many processes has of a tensor: consecutive rows. In a checkpoint it is whole."""

    local: Tensor
    first: int
    shape: torch.Size


class OneWriter:
    """Who writes a checkpoint: this process. Of Processes all take part, each with its Rows."""

    rank = 0

    def lead(self, function: Callable, *arguments: object) -> typing.Any:
        """Calls function on rank 0; what it returns, or one of SAVE_ERRORS, is for all."""
        return function(*arguments)

    def each(self, function: Callable, *arguments: object) -> list:
        """Calls function on every rank; one of SAVE_ERRORS is for all, the results for rank 0."""
        return [function(*arguments)]

    def begin_save(self) -> None:
        """Whatever became of the save before, lead() and each() now speak of the next one."""


def save_checkpoint(state: dict, path: Path | str) -> None:
    """Writes state, as torch.save does, so that path is, at every instant, old or whole.

    State is nested dicts, lists and tuples of dense tensors, numbers (numpy's become Python's),
    texts, None, and what else torch.load(weights_only=True) takes and cannot grow: dtypes,
    devices, sizes, sets. Nothing may change it meanwhile. The file is written beside its target,
    flushed to the disk, renamed, and the directory flushed. Raises TypeError, with the place, for
    anything else in state; OSError, or what torch raises where memory or a device fails it.
    Whatever is raised, the file that was at path before is untouched.
    """
    if not isinstance(state, dict):
        raise TypeError(f"state is a {type(state).__qualname__}, not a dict")
    write_checkpoint(state, Path(path), OneWriter())


def write_checkpoint(state: dict, path: Path, writers: OneWriter) -> None:
    """save_checkpoint for all writers; raises one of SAVE_ERRORS, the same in all of them."""
    # Of this save alone: others may write the same path at the same time.
    token = writers.lead(lambda: uuid.uuid4().hex[:8])
    temporary = path.with_name(f".{path.stem}.{token}{path.suffix}.tmp")
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, f"{path} is a directory, pipe or device, no checkpoint")
    shown, parts = laid_out(state, writers.rank)
    try:
        writers.lead(write_without_data, shown, temporary)
        checksums = writers.each(write_parts, parts, temporary)
        writers.lead(publish, temporary, checksums, path)
    except BaseException:
        if writers.rank == 0:
            # On a file system that takes no change the next start clears up.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise


def laid_out(state: dict, rank: int = 0) -> tuple[dict, list[Part]]:
    """State as torch.save is to see it, and this process's part of each record, in their order.

    Raises TypeError for what load_checkpoint would refuse, and names its place.
    """
    parts: dict[int, Part] = {}
    stand_ins: dict[int, Tensor] = {}

    def stand_in(key: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor that torch.save takes for one on the CPU, though it has no memory."""
        if key not in stand_ins:
            from torch._subclasses.fake_tensor import FakeTensorMode

            with FakeTensorMode():
                stand_ins[key] = torch.empty(shape, dtype=dtype)
        return stand_ins[key]

    def shown(value: typing.Any) -> object:
        if isinstance(value, Rows):
            local, first, shape = value
            key = local.untyped_storage()._cdata
            start = first * math.prod(shape[1:]) * local.element_size()
            data = local.contiguous().flatten().view(torch.uint8)
            parts.setdefault(key, Part(len(parts), start, data))
            return stand_in(key, shape, local.dtype)
        value = savable(value)
        if not isinstance(value, Tensor):
            return value
        key, data = value.untyped_storage()._cdata, storage_bytes(value)
        parts.setdefault(key, Part(len(parts), 0, data if rank == 0 else data[:0]))
        if value.is_cpu:
            return value
        whole = stand_in(key, [len(data) // value.element_size()], value.dtype)
        return whole.as_strided(value.shape, value.stride(), value.storage_offset())

    try:
        if unfolded(state, {}) > PICKLE_BYTES:
            raise TypeError(" holds the same values too many times")
        return mapped(state, shown), list(parts.values())
    except TypeError as error:
        raise TypeError(f"state{error}") from None
    except RecursionError:
        raise TypeError("state contains itself, or is nested too deeply") from None


def storage_bytes(tensor: Tensor) -> Tensor:
    """All bytes of the memory that a tensor is a view of; uint8, 1-D."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def savable(value: typing.Any) -> typing.Any:
    """A leaf of a state, numpy's numbers as Python's. Raises TypeError for what is refused."""
    if isinstance(value, np.generic):
        value = value.item()
    kind = type(value)
    if kind is int and value.bit_length() > 2000:
        raise TypeError(" is an integer of more than 2,000 bits, which torch.load refuses")
    if kind in PLAIN_TYPES or kind is set and all(type(item) in PLAIN_TYPES for item in value):
        return value
    what = f"{kind.__module__}.{kind.__qualname__}"
    if kind in (Tensor, nn.Parameter):
        strange = value.is_meta or value.is_nested or value.is_quantized or vars(value)
        if value.layout == torch.strided and not strange:
            # One that is larger than its memory (expanded) is saved with all its elements: a
            # small file must not become a large state.
            small = value.nbytes <= value.untyped_storage().nbytes()
            return value if small else value.contiguous()
        what += f" ({value.dtype}, {value.layout})"
    raise TypeError(
        f" is a {what}: only dense tensors, numbers, texts, None, and dicts, lists and tuples of"
        " them can be saved (as float(x), x.tolist(), str(x), vars(x), x.state_dict() make them)"
    )


def mapped(state: typing.Any, change: Callable[[typing.Any], typing.Any]) -> typing.Any:
    """Nested dicts, lists and tuples with change(leaf) in the place of every leaf.

    What is there twice is changed once. Raises what change raises, a TypeError with the place in
    front of it ("['model'][0] is a ...").
    """
    known: dict[int, tuple[object, object]] = {}

    def visit(value: typing.Any) -> typing.Any:
        kind = type(value)
        if kind not in (dict, collections.OrderedDict, collections.Counter, list, tuple):
            return change(value)
        if id(value) in known:
            return known[id(value)][0]
        new = []
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            try:
                new.append((change(key), visit(item)))
            except TypeError as error:
                raise TypeError(f"[{key!r}]{error}") from None
        if isinstance(value, dict):
            made = kind()
            for key, item in new:
                made[key] = item
            # A module's state_dict has an attribute, _metadata.
            if attributes := getattr(value, "__dict__", None):
                vars(made).update(visit(attributes))
        else:
            made = kind(item for _, item in new)
        # The value is kept too, so that no other takes its identity.
        known[id(value)] = made, value
        return made

    return visit(state)


def write_without_data(state: dict, path: Path) -> None:
    """torch.save into a new file, with holes (which take no place) for the bytes of the tensors."""
    new_folders = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    checksums_wanted = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        with open(path, "xb") as file:
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save(state, file)
    except RuntimeError as error:
        # torch's zip writer stumbles over a write that has failed: that one is the reason.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        torch.serialization.set_crc32_options(checksums_wanted)
    flush_names(*(new.parent for new in new_folders))


def read_records(file: typing.BinaryIO) -> list[Record]:
    """The storages of a checkpoint, by number. Raises ValueError or BadZipFile where it is none."""
    with zipfile.ZipFile(file) as archive:
        found, entry = {}, archive.start_dir
        for info in archive.infolist():
            if number := re.fullmatch("[^/]+/data/([0-9]+)", info.filename):
                header = os.pread(file.fileno(), 30, info.header_offset).ljust(30, b"\0")
                start = info.header_offset + 30 + sum(struct.unpack("<26x2H", header))
                name = f"data/{number[1]}"
                found[int(number[1])] = Record(name, start, info.file_size, info.CRC, entry + 16)
            elif info.filename.endswith("/data.pkl") and info.file_size > PICKLE_BYTES:
                limit = f"{PICKLE_BYTES / 2**20:.0f} MiB"
                raise ValueError(f"more than {limit} of values beside its tensors")
            entry += 46 + len(info.orig_filename.encode()) + len(info.extra) + len(info.comment)
    return [found[number] for number in sorted(found)]


def write_parts(parts: Sequence[Part], path: Path) -> list[int]:
    """Writes parts of records to their places and flushes them; returns what moved() returns."""
    with open(path, "r+b", buffering=0) as file:
        try:
            records = read_records(file)
        except ValueError as error:
            raise RuntimeError(f"the state holds {error}") from None
        if len(records) != len(parts):
            raise RuntimeError("torch.save has written other storages than those in the state")

        def write(part: Part) -> int:
            data = part.data.cpu().numpy().data
            start, done, crc = records[part.record].start + part.start, 0, 0
            while done < len(data):
                count = os.pwrite(file.fileno(), data[done : done + CACHED_BYTES], start + done)
                crc, done = zlib.crc32(data[done : done + count], crc), done + count
            if hasattr(os, "posix_fadvise"):
                # On Linux this starts the write to the disk without waiting for it.
                os.posix_fadvise(file.fileno(), start, len(data), os.POSIX_FADV_DONTNEED)
            return crc

        checksums = moved(parts, write, records)
        flush_to_disk(file.fileno())
    return checksums


def publish(temporary: Path, checksums: Sequence[list[int]], path: Path) -> None:
    """Puts the checksums, of which each process knows its share, into the file; then its name."""
    with open(temporary, "r+b", buffering=0) as file:
        for record, shares in zip(read_records(file), zip(*checksums)):
            crc = functools.reduce(operator.xor, shares).to_bytes(4, "little")
            os.pwrite(file.fileno(), crc, record.crc_at)
            if record.size:
                # Behind the bytes torch has written a signature and, again, the checksum.
                os.pwrite(file.fileno(), crc, record.start + record.size + 4)
        flush_to_disk(file.fileno())
    os.replace(temporary, path)
    flush_names(path.parent)


def moved(
    parts: Sequence[Part], move: Callable[[Part], int], records: Sequence[Record]
) -> list[int]:
    """Reads or writes parts piece by piece, in threads; move(piece) returns its CRC-32.

    Returns what each record's CRC-32 owes to these parts: XORed over all of them, it is its own.
    """
    batches: list[list[Part]] = [[]]
    room = PIECE_BYTES
    for record, start, data in parts:
        for first in range(0, len(data), PIECE_BYTES):
            piece = Part(record, start + first, data[first : first + PIECE_BYTES])
            if len(piece.data) > room:
                batches.append([])
                room = PIECE_BYTES
            batches[-1].append(piece)
            room -= len(piece.data)
    checksums = [0] * len(records)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        # After an error those that have not begun are dropped.
        run = threads.map if len(batches) > 1 else map
        for batch, crcs in zip(
            batches, run(lambda batch: [move(piece) for piece in batch], batches)
        ):
            for piece, crc in zip(batch, crcs):
                behind = records[piece.record].size - piece.start - len(piece.data)
                checksums[piece.record] ^= crc32_followed_by(behind, crc)
    return checksums


def crc32_followed_by(size: int, crc: int) -> int:
    """What bytes with this CRC-32 are worth with size bytes behind them.

    crc * x ** (8 * size), modulo the CRC's polynomial: crc32_combine of zlib 1.2.12 (Mark Adler).
    """
    return multiplied(power_of_x(8 * size), crc) if size and crc else crc


@functools.lru_cache(maxsize=4096)
def power_of_x(exponent: int) -> int:
    """x ** exponent modulo the polynomial of CRC-32, as in multiplied."""
    if exponent < 2:
        return 1 << 31 - exponent
    half = power_of_x(exponent // 2)
    return multiplied(multiplied(half, half), power_of_x(exponent % 2))


def multiplied(a: int, b: int) -> int:
    """a * b modulo the polynomial of CRC-32; the lowest power of x stands in the highest bit."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
    return product


def flush_names(*folders: Path) -> None:
    """Makes the names in folders as durable as the files, where the file system knows how to."""
    for folder in folders:
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                raise
        finally:
            os.close(fd)


def flush_to_disk(fd: int) -> None:
    """fsync; on macOS, where that only reaches the drive's cache, the call that goes further."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        # A file system without it still has fsync.
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def load_checkpoint(path: Path | str) -> dict:
    """What is in a file of save_checkpoint or torch.save, tensors on the CPU. Runs no code in it.

    Every record's checksum is compared with what has arrived in memory: torch.load alone misses
    a flipped bit. Raises CheckpointError where the file cannot be read, is damaged, or holds
    anything but tensors and plain values.
    """
    with opened_checkpoint(path) as checkpoint:
        state = mapped(checkpoint.state, checkpoint.whole)
        check_checksums(path, checkpoint.records, [checkpoint.read()])
        return state


@contextlib.contextmanager
def opened_checkpoint(path: Path | str) -> Iterator[CheckpointReader]:
    """A checkpoint for reading. Whatever goes wrong with it is a CheckpointError."""
    try:
        # A pipe would be waited for.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path}: a directory, pipe or device, not a checkpoint")
        with open(path, "rb") as file:
            check_records(file)
            yield CheckpointReader(file)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except Exception as error:
        # zipfile and torch have dozens of ways to stumble over damage; all mean the same here.
        text = f"{path}: damaged, or not a checkpoint ({one_line(error)})"
        raise CheckpointError(text) from error


def check_records(file: typing.BinaryIO) -> None:
    """Raises ValueError, or what zipfile raises, for a file that torch.save cannot have written.

    torch.load(weights_only=True) runs no code, but builds objects of any size (a bytearray, say):
    so what the pickle refers to is compared with what tensors and plain values need.
    """
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        names = [record.orig_filename for record in records]
        folder = names[0].partition("/")[0] if names else ""
        # torch finds records without regard to case, zipfile cuts names at a NUL: no name may
        # mean two things.
        form = re.escape(folder) + r"/(data/[0-9]+|\.data/serialization_id|[a-z_.]+)"
        well_named = all(re.fullmatch(form, name) for name in names)
        unique = len(set(names)) == len(names) and f"{folder}/data.pkl" in names
        if not (folder.strip(".") and well_named and unique):
            raise ValueError("its records are not torch.save's")
        # An attribute that calls a record a folder makes torch return memory it never filled.
        if any(record.compress_type or record.external_attr for record in records):
            raise ValueError("its records are compressed, or no files")
        if sum(record.file_size for record in records) > os.fstat(file.fileno()).st_size:
            raise ValueError("its records lie upon each other")
        read_records(file)
        for record in records:
            if "/data/" not in record.filename:
                # Raises where its checksum is wrong.
                archive.read(record)
        for opcode, argument, _ in pickletools.genops(archive.read(f"{folder}/data.pkl")):
            if opcode.name == "GLOBAL" and not is_plain(*str(argument).split(" ")):
                raise ValueError(f"it refers to {str(argument).replace(' ', '.')}")


def is_plain(module: str, name: str) -> bool:
    """True for what the pickle of a tensor or a plain value refers to, and nothing that grows."""
    if module == "torch":
        torchs = name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)
    return module == "torch" and torchs or f"{module}.{name}" in PLAIN_GLOBALS


class CheckpointReader:
    """An open checkpoint: `state`, with tensors on the meta device, which have no bytes yet.

    whole() and rows() return tensors that read() fills, all at once and in several threads.
    """

    def __init__(self, file: typing.BinaryIO) -> None:
        self.file, self.records = file, read_records(file)
        self._numbers = {record.start: number for number, record in enumerate(self.records)}
        self._parts: list[Part] = []
        self._storages: dict[int, torch.UntypedStorage] = {}
        file.seek(0)
        self.state = torch.load(file, map_location="meta", weights_only=True)
        if not isinstance(self.state, dict):
            raise ValueError(f"holds a {type(self.state).__name__}")
        mapped(self.state, lambda leaf: self._number(leaf) if is_tensor(leaf) else savable(leaf))
        if unfolded(self.state, {}) > PICKLE_BYTES:
            raise ValueError("it holds the same values too many times")

    def _number(self, tensor: Tensor) -> int:
        """Of a tensor's record. Raises ValueError where the tensor claims more than is there."""
        storage = tensor.untyped_storage()
        number = self._numbers.get(typing.cast(typing.Any, storage)._checkpoint_offset)
        fits = number is not None and storage.nbytes() == self.records[number].size
        if number is None or not fits or tensor.nbytes > storage.nbytes():
            raise ValueError("a tensor does not fit its record")
        return number

    def whole(self, leaf: object) -> object:
        """For a tensor of state one on the CPU; those that share memory share it here, too."""
        if not isinstance(leaf, Tensor):
            return leaf
        number = self._number(leaf)
        if number not in self._storages:
            self._storages[number] = torch.UntypedStorage(self.records[number].size)
            self._ask(number, 0, self._storages[number])
        return like(leaf, self._storages[number], int(leaf.storage_offset()))

    def rows(self, tensor: Tensor, first: int, last: int) -> Tensor:
        """For a tensor of state its rows first ... last - 1, in memory of their own."""
        part = tensor[first:last]
        size = part.element_size()
        steps = sum((count - 1) * stride for count, stride in zip(part.shape, part.stride()))
        storage = torch.UntypedStorage(size * (1 + steps) if part.numel() else 0)
        self._ask(self._number(tensor), int(part.storage_offset()) * size, storage)
        return like(part, storage, 0)

    def _ask(self, number: int, start: int, storage: torch.UntypedStorage) -> None:
        self._parts.append(Part(number, start, torch.empty(0, dtype=torch.uint8).set_(storage)))

    def share(self, rank: int, world_size: int) -> None:
        """Asks for an equal share of every record, for nothing but its checksum."""
        for number, record in enumerate(self.records):
            first, last = (record.size * r // world_size for r in (rank, rank + 1))
            nowhere = torch.empty(last - first, dtype=torch.uint8, device="meta")
            self._parts.append(Part(number, first, nowhere))

    def read(self) -> list[int]:
        """Reads what was asked for; returns what moved() returns. ValueError for a cut file."""
        parts, self._parts = self._parts, []
        return moved(parts, self._read, self.records)

    def _read(self, part: Part) -> int:
        data = torch.empty_like(part.data, device="cpu") if part.data.is_meta else part.data
        left, start, crc = data.numpy().data, self.records[part.record].start + part.start, 0
        while left:
            count = os.preadv(self.file.fileno(), [left[:CACHED_BYTES]], start)
            if not count:
                raise ValueError("it has been cut")
            crc, left, start = zlib.crc32(left[:count], crc), left[count:], start + count
        return crc


def unfolded(value: typing.Any, known: dict[int, int]) -> int:
    """How many values a state is to who copies what is there twice twice."""
    if not isinstance(value, (dict, list, tuple)):
        return 1
    if id(value) not in known:
        items = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(unfolded(item, known) for item in items)
    return known[id(value)]


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def like(tensor: Tensor, storage: torch.UntypedStorage, offset: int) -> Tensor:
    """A view of storage as a tensor of a checkpoint's state, which is on the meta device, is."""
    new = torch.empty(0, dtype=tensor.dtype).set_(storage, offset, tensor.shape, tensor.stride())
    new = new.conj() if tensor.is_conj() else new
    new = torch._neg_view(new) if tensor.is_neg() else new
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(new, tensor.requires_grad)
    return new.requires_grad_(tensor.requires_grad)


def check_checksums(
    path: Path | str, records: Sequence[Record], checksums: Sequence[list[int]]
) -> None:
    """Raises CheckpointError unless the records, read in shares, are what was written."""
    for record, shares in zip(records, zip(*checksums)):
        if functools.reduce(operator.xor, shares) != record.crc:
            raise CheckpointError(f"{path}: damaged checkpoint (record {record.name})")


def host_copy(state: dict, kept: dict[int, Tensor]) -> dict:
    """State with its tensors copied to host memory; those that share memory share it there, too.

    kept holds the copies' memory by number, for the next copy to write into.
    """
    copies: dict[int, Tensor] = {}

    def copied(value: typing.Any) -> typing.Any:
        if isinstance(value, Rows):
            return value._replace(local=copied(value.local))
        if not isinstance(value, Tensor):
            return value
        key, number = value.untyped_storage()._cdata, len(copies)
        if key not in copies:
            data = storage_bytes(value)
            if number not in kept or len(kept[number]) != len(data):
                kept[number] = torch.empty(len(data), dtype=torch.uint8, pin_memory=data.is_cuda)
            copies[key] = kept[number].copy_(data)
        return like(value, copies[key].untyped_storage(), int(value.storage_offset()))

    return mapped(state, copied)


# ---- The checkpoint directory -----------------------------------------------------------------


class Found(typing.NamedTuple):
    """A checkpoint in a directory, ordered as `latest` prefers them, the last one most.

    A run that was resumed from an older checkpoint than its furthest goes on from there: that is
    a later session, and what it saves counts more.
    """

    run_saved_at: str
    run_id: str
    session: int
    step: int
    saved_at: str
    path: Path


def fallback_directory(directory: Path | str) -> Path:
    """Where the last save of a run goes whose checkpoint directory takes none."""
    name = os.fsencode(os.path.abspath(directory))
    digest = hashlib.blake2b(name, digest_size=6).hexdigest()
    return Path(tempfile.gettempdir(), f"train_graceful_{os.getuid()}_{digest}")


def checkpoint_files(directory: Path | str) -> list[Path]:
    """All checkpoints of a directory, emergency ones and those in the temporary one included."""
    folders = [Path(directory), Path(directory, "emergency_exit")]
    with contextlib.suppress(OSError):
        fallback = fallback_directory(directory)
        # Anybody may make a folder of that name.
        if fallback.is_dir() and fallback.stat().st_uid == os.getuid():
            folders.append(fallback)
    return sorted(file for folder in folders for file in folder.glob("[!.]*.pt") if file.is_file())


def find_checkpoints(directory: Path | str, report: Callable[[str], None]) -> list[Found]:
    """The checkpoints of this program in a directory, the one that `latest` prefers first.

    It is the furthest of the run that has saved last, of which a start that was stopped before
    its first step is none. Those that cannot be read are named through report; nobody's tensors
    are read.
    """
    found, newest = [], dict[str, str]()
    for path in checkpoint_files(directory):
        try:
            with opened_checkpoint(path) as checkpoint:
                state = checkpoint.state
            if "run_id" not in state:
                continue
            run_id, step, saved_at = state["run_id"], state["step"], state["saved_at"]
            session = state["metrics"]["sessions"]
            if (type(run_id), type(saved_at), type(step), type(session)) != (str, str, int, int):
                raise CheckpointError(f"{path}: not a checkpoint of this program")
        except (CheckpointError, LookupError, TypeError) as error:
            report(f"⚠️ Skipped {error if isinstance(error, CheckpointError) else path}")
            continue
        found.append(Found("", run_id, session, step, saved_at, path))
        newest[run_id] = max(newest.get(run_id, ""), saved_at if step else "")
    return sorted((one._replace(run_saved_at=newest[one.run_id]) for one in found), reverse=True)


def latest_checkpoint(directory: Path | str, report: Callable[[str], None] = print) -> Path:
    """The furthest whole checkpoint of the newest run in a directory.

    Damaged ones are named through report and skipped. Raises CheckpointError where none is left.
    """
    return first_whole(directory, load_checkpoint, report)[0]


def first_whole(
    directory: Path | str,
    read: Callable[[Path], typing.Any],
    report: Callable[[str], None],
    paths: Sequence[Path] | None = None,
) -> tuple[Path, typing.Any]:
    """The first checkpoint, by find_checkpoints, that read takes, and what it returns."""
    if paths is None:
        paths = [found.path for found in find_checkpoints(directory, report)]
    for path in paths:
        try:
            return path, read(path)
        except UserError as error:
            report(f"⚠️ Skipped {error}")
    what = "no checkpoint there" if os.path.isdir(directory) else "No such file or directory"
    raise CheckpointError(f"{directory}: {what}")


def home_of(path: Path) -> Path:
    """The directory that a checkpoint's run saves in, links resolved."""
    folder = Path(os.path.realpath(path)).parent
    return folder.parent if folder.name == "emergency_exit" else folder


class CheckpointWriter:
    """Saves in a thread: training waits for one copy of the state, and for the write before."""

    def __init__(self, save: Callable[[dict, str], Path], report: Callable[[str], None]) -> None:
        self._save, self._report = save, report
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._pending: Future | None = None
        self._kept: dict[int, Tensor] = {}

    def submit(self, state: dict, targets: dict[str, str]) -> None:
        """Saves state as it is now to every target {exit_reason: name}; failures are reported."""
        self.wait()
        try:
            copied = host_copy(state, self._kept)
        except SAVE_ERRORS as error:
            # Its memory is not worth keeping either. With many writers all hear of it.
            copied, self._kept = {"error": error}, {}
        self._pending = self._thread.submit(self._write, copied, targets)

    def _write(self, copied: dict, targets: dict[str, str]) -> None:
        for reason, name in targets.items():
            try:
                path = self._save({**copied, "exit_reason": reason}, name)
                if reason == "user_requested_save":
                    self._report(f"✅ Checkpoint saved: {path}")
            except SAVE_ERRORS as error:
                self._report(f"⚠️ {name} not saved: {one_line(error)}. Training goes on.")

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        self._thread.shutdown()


class RunDirectory:
    """One run's hold on a checkpoint directory: the lock, and the names that are free for it.

    The lock (fcntl.lockf, which no child inherits) is held until the process is gone; where the
    file system has none, report says so. Raises UserError where the directory cannot be written
    or belongs to a run that is alive.
    """

    # Of a checkpoint: they hold the first keys, run_id among them.
    HEAD_BYTES = 4096

    def __init__(self, path: Path, run_id: str, report: Callable[[str], None]) -> None:
        self.path, self.run_id = path, run_id
        self._own: set[Path] = set()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock_file = os.open(path / "run.lock", os.O_RDWR | os.O_CREAT, 0o666)
            self._lock(report)
            self.write_outcome("")
            for folder in (path, path / "emergency_exit"):
                for leftover in folder.glob(".*.pt.tmp"):
                    # Of a killed run; in the way of nothing.
                    with contextlib.suppress(OSError):
                        leftover.unlink()
        except FileExistsError:
            raise UserError(f"--checkpoint-dir {path}: a file, not a directory") from None
        except OSError as error:
            raise UserError(f"--checkpoint-dir {path}: {error.strerror}") from error
        steps = {
            file: re.fullmatch(r"step_([0-9]+)(_[0-9]+)?\.pt", file.name) for file in path.iterdir()
        }
        periodic = sorted(
            (int(m[1]), file) for file, m in steps.items() if m and self._is_own(file)
        )
        self._periodic = [file for _, file in periodic]

    def _lock(self, report: Callable[[str], None]) -> None:
        try:
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                text = f"no locks there ({error.strerror}); see to it that no other run uses it"
                report(f"⚠️ {self.path}: {text}")
                return
            words = os.pread(self._lock_file, 256, 0).decode(errors="replace").split()
            pid, host = (words + ["unknown", "unknown"])[:2]
            os.close(self._lock_file)
            raise UserError(
                f"{self.path} is in use by another run (pid {pid} on {host});"
                " give this one its own --checkpoint-dir"
            ) from None

    def write_outcome(self, outcome: str) -> None:
        """Leaves pid and host of this run, and how it ended, in the lock file for stop.sh."""
        text = f"{os.getpid()} {os.uname().nodename}\n{outcome}".encode(errors="replace")
        # Before the cut, so that a reader always finds a pid.
        os.pwrite(self._lock_file, text, 0)
        os.ftruncate(self._lock_file, len(text))

    def path_for(self, name: str) -> Path:
        """Where to save under name: another run's file is never overwritten but evaded."""
        first = path = self.path / name
        for number in itertools.count(2):
            if path in self._own or not path.exists() or self._is_own(path):
                self._own.add(path)
                return path
            path = first.with_name(f"{first.stem}_{number}{first.suffix}")
        raise AssertionError

    def prune(self, newest: Path, keep: int) -> None:
        """Deletes this run's oldest periodic checkpoints beyond keep; newest is on the disk."""
        self._periodic = [path for path in self._periodic if path != newest] + [newest]
        for path in self._periodic[:-keep]:
            # What cannot be deleted now is tried again after the next save.
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                self._periodic.remove(path)

    def _is_own(self, path: Path) -> bool:
        try:
            # A pipe would be waited for.
            if not path.is_file():
                return False
            with open(path, "rb") as file:
                # It comes early: this stays cheap with many files.
                return self.run_id.encode() in file.read(self.HEAD_BYTES)
        except OSError:
            return False

    def close(self) -> None:
        os.close(self._lock_file)


# ---- The order of the data --------------------------------------------------------------------


def seed_generators(*what: object, device: str = "cpu") -> None:
    """Seeds torch, random and numpy with a number that follows from what alone."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1
    # With the devices' generators torch takes a hundred times as long.
    (torch.default_generator if device == "cpu" else torch).manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def shuffled(index: int, n: int, key: bytes) -> int:
    """The image of index under a permutation of range(n) that depends on key alone.

    It is found without listing the permutation: a four-round Feistel network on the smallest
    domain of 4**k numbers that holds n, walked until it is back inside (Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002).
    """
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    while True:
        left, right = index >> bits, index & mask
        for number in range(4):
            text = b"%d %d" % (number, right)
            digest = hashlib.blake2b(text, key=key, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = left << bits | right
        if index < n:
            return index


class Samples(typing.Protocol):
    """A map-style dataset: a list, or any torch Dataset with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> typing.Any: ...


Key = tuple[str, int]


class Batches(torch.utils.data.Dataset):
    """The batches of a run, of which this process has every world_size-th sample.

    Item ("training", step) is the batch after so many; it is a function of seed and step alone, so
    nothing has to be replayed to go on at any of them. Item ("validation", n) is batch n of an
    evaluation. An item is (its key, the collated samples, how many of them count).
    """

    def __init__(
        self, training, validation, collate, batch_size, options, rank, world_size
    ) -> None:
        self.training, self.validation = training, validation
        self.collate = collate or torch.utils.data.default_collate
        self.batch_size, self.seed = batch_size, options.seed
        self.rank, self.world_size = rank, world_size
        self.per_epoch = len(training) // batch_size
        self.validated = len(validation) if validation is not None else 0
        if options.eval_batches is not None:
            self.validated = min(self.validated, options.eval_batches * batch_size)

    @property
    def per_evaluation(self) -> int:
        return -(-self.validated // self.batch_size)

    def __getitem__(self, key: Key) -> tuple[Key, typing.Any, int]:
        split, number = key
        if split == "training":
            epoch, in_epoch = divmod(number, self.per_epoch)
            order = b"%d %d" % (self.seed, epoch)
            first, last = in_epoch * self.batch_size, (in_epoch + 1) * self.batch_size
            mine = range(first + self.rank, last, self.world_size)
            indices = [shuffled(position, len(self.training), order) for position in mine]
            samples = [self._sample(self.training, epoch, index) for index in indices]
            count = len(samples)
        else:
            first = number * self.batch_size
            last = min(first + self.batch_size, self.validated)
            mine = range(first + self.rank, last, self.world_size)
            # Evenly spread. Without a sample of its own a rank computes one all the same: every
            # rank makes as many forward passes.
            indices = [place * len(self.validation) // self.validated for place in mine]
            samples = [self._sample(self.validation, -1, index) for index in indices or [0]]
            count = len(indices)
        seed_generators(self.seed, "collate", key, self.rank)
        return key, self.collate(samples), count

    def _sample(self, dataset: typing.Any, epoch: int, index: int) -> typing.Any:
        seed_generators(self.seed, epoch, index)
        return dataset[index]


def begin_worker(number: int) -> None:
    """In a worker that forkserver or spawn has started: signals are the parent's affair."""
    if multiprocessing.get_start_method() == "fork":
        return
    for signum in EXIT_SIGNALS:
        # Not SIG_IGN, which programs that it executes would inherit.
        signal.signal(signum, lambda signum, frame: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_SIGNALS)

    def end_with_parent() -> None:
        # Its parent is the forkserver, for torch; this is the process that trains.
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def unchanged(item: typing.Any) -> typing.Any:
    return item


class Loader:
    """One loader for a whole run, evaluations included: its workers start once.

    It draws training batches ahead; those that come before a validation batch that was asked for
    wait until it is their turn.
    """

    # Without a batch for so long, the workers that have died or stand still are named.
    PATIENCE_SECONDS = 30.0

    def __init__(
        self, batches: Batches, workers: int, step: int, pin: bool, report: Callable[[str], None]
    ) -> None:
        self.step = step
        self._batches, self._next = batches, step
        self._wanted: collections.deque[int] = collections.deque()
        self._early: collections.deque = collections.deque()
        self._report = report
        self._waiting_since = math.inf
        self._closed = threading.Event()
        loader = torch.utils.data.DataLoader(
            batches,
            batch_size=None,
            sampler=self._keys(),
            num_workers=workers,
            pin_memory=pin,
            collate_fn=unchanged,
            worker_init_fn=begin_worker,
            # Its own: the default one is the loop's.
            generator=torch.Generator(),
        )
        others, on_child = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
        with quiet_start(workers):
            self._items = iter(loader)
        # torch's handler raises wherever the main thread is when a worker dies, in the middle of
        # an optimizer step too; without it the loader says so at the next batch.
        signal.signal(signal.SIGCHLD, on_child)
        self._workers = [one for one in multiprocessing.active_children() if one not in others]
        threading.Thread(target=self._watch, name="loader-watch", daemon=True).start()

    def _keys(self) -> Iterator[Key]:
        while True:
            if self._wanted:
                yield "validation", self._wanted.popleft()
            else:
                yield "training", self._next
                self._next += 1

    def training(self) -> typing.Any:
        """The next training batch."""
        _, batch, _ = self._early.popleft() if self._early else self._get("training")
        self.step += 1
        return batch

    def validation(self, number: int, count: int | None = None) -> tuple[typing.Any, int]:
        """Batch number of an evaluation of count batches, and how many of its samples count."""
        if number == 0:
            self._wanted.extend(range(count or self._batches.per_evaluation))
        _, batch, samples = self._get("validation")
        return batch, samples

    def _get(self, split: str) -> tuple[Key, typing.Any, int]:
        self._waiting_since = time.monotonic()
        try:
            while (item := next(self._items))[0][0] != split:
                self._early.append(item)
            return item
        finally:
            self._waiting_since = math.inf

    def _watch(self) -> None:
        named, pause = math.inf, self.PATIENCE_SECONDS
        while not self._closed.wait(pause):
            since, pause = self._waiting_since, self.PATIENCE_SECONDS
            if since != named and since < math.inf:
                pause -= time.monotonic() - since
                if pause <= 0:
                    named, pause = since, self.PATIENCE_SECONDS
                    self._report(f"⚠️ No batch for {pause:.0f} s: {self._state_of_workers()}.")
                pause = max(pause, 0.01)

    def _state_of_workers(self) -> str:
        states = []
        for worker in self._workers:
            state = "stands still or is slow"
            if not worker.is_alive():
                state = f"has died (exit code {worker.exitcode})"
            states.append(f"worker {worker.pid} {state}")
        return ", ".join(states) or "the dataset is slow or stands still"

    def close(self) -> None:
        self._closed.set()
        for worker in self._workers:
            worker.kill()
            worker.join()


@contextlib.contextmanager
def quiet_start(workers: int) -> Iterator[None]:
    """While workers start, signals wait: those that are not forked begin without a handler."""
    if workers:
        # Made here, it is the workers' too, and is removed however they end.
        multiprocessing.util.get_temp_dir()
    if not workers or multiprocessing.get_start_method() == "fork":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_SIGNALS)
    try:
        from multiprocessing import forkserver, resource_tracker

        # Starting it unblocks two of them.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_SIGNALS)
        if multiprocessing.get_start_method() == "forkserver":
            forkserver.ensure_running()
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def to_device(batch: typing.Any, device: torch.device) -> typing.Any:
    """A batch with everything that can be moved on the device: tensors, in dicts, lists, tuples."""
    if hasattr(batch, "to"):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def fingerprint(dataset: typing.Any) -> list:
    """How data is known on resume: its length, and its fingerprint() if it has one."""
    if dataset is None:
        return [0, None]
    return [len(dataset), dataset.fingerprint() if hasattr(dataset, "fingerprint") else None]


def difference(saved: list, own: list) -> str | None:
    """What tells two fingerprints apart, in words; None for the same data."""
    (length, there), (here_length, here) = saved, own
    if isinstance(there, dict) and isinstance(here, dict):
        # Files by name: the same ones may lie elsewhere.
        if list(there.values()) == list(here.values()):
            return None
        changes = {
            "added": sorted(here.keys() - there.keys()),
            "removed": sorted(map(str, there.keys() - here.keys())),
            "changed": [name for name in there if name in here and there[name] != here[name]],
        }
        some = {
            word: ", ".join(names[:3]) + ", ..." * (len(names) > 3)
            for word, names in changes.items()
            if names
        }
        return "; ".join(f"{word}: {names}" for word, names in some.items()) or "in another order"
    if length != here_length:
        return f"{length:,} samples then, {here_length:,} now"
    return None if there == here else "their fingerprints differ"


# ---- The run ----------------------------------------------------------------------------------


class Metrics:
    """metrics.csv: a row every --log-every batches, the run's id in its last column.

    Rows after `step` are left out when a run goes on: they will come again. A row that cannot be
    written (a full disk, say) waits for the next one and never raises.
    """

    def __init__(self, directory: Path, run_id: str, step: int, old_directory: Path) -> None:
        self.run_id = run_id
        self.columns: list[str] = []
        self._lock = threading.Lock()
        self._waiting: list[dict] = []
        for number in itertools.count(1):
            self.path = directory / ("metrics.csv" if number == 1 else f"metrics_{number}.csv")
            path, rows = self.path, self._rows(self.path)
            if rows or not self.path.exists():
                break
        if not rows:
            # The run goes on in another directory than before.
            for path in [
                old_directory / "metrics.csv",
                *sorted(old_directory.glob("metrics_*.csv")),
            ]:
                if rows := self._rows(path):
                    break
        if rows:
            self.columns = list(rows[0])
            kept = [row for row in rows if int(row["step"]) <= step]
            if path != self.path or len(kept) < len(rows) or is_torn(path):
                self._rewrite(kept)

    def _rows(self, path: Path) -> list[dict]:
        """The rows of this run; none where the file is another's, or was made so by a person."""
        try:
            with open(path, newline="", errors="surrogateescape") as file:
                # Python 3.10 would stumble over a NUL.
                rows = list(csv.DictReader(line.replace("\0", "") for line in file))
        except (OSError, csv.Error):
            return []
        mine = [row for row in rows if row.get("run") == self.run_id and None not in row]
        return [row for row in mine if re.fullmatch("[0-9]{1,18}", row.get("step") or "")]

    def _rewrite(self, kept: list[dict]) -> None:
        text = self._encoded(kept, header=True)
        with contextlib.suppress(OSError):
            if self.path.exists() and self.path.read_bytes().startswith(text):
                # It needs no room, and loses nothing whenever it is killed.
                os.truncate(self.path, len(text))
                return
            self.path.unlink(missing_ok=True)
        self._waiting = kept
        self._append()

    def _encoded(self, rows: list[dict], header: bool) -> bytes:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode(errors="surrogateescape")

    def row(self, values: dict[str, object]) -> None:
        self.columns = self.columns or [*values, "run"]
        with self._lock:
            self._waiting.append({**values, "run": self.run_id})
            self._append()

    def _append(self) -> bool:
        """Writes the rows that wait, all or none; False where the disk takes none."""
        try:
            with open(self.path, "ab", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                encoded = self._encoded(self._waiting, header=not size)
                if file.write(encoded) < len(encoded):
                    file.truncate(size)
                    return False
                self._waiting.clear()
                return True
        except OSError:
            return False

    def flush(self) -> None:
        """To the disk. Raises OSError where it refuses: no checkpoint is ahead of its rows."""
        with self._lock:
            if self._waiting and not self._append():
                raise OSError(errno.ENOSPC, f"{self.path}: no room for its rows")
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())


def is_torn(path: Path) -> bool:
    """True where the last line has no end, as a power cut may leave it."""
    try:
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() != b"\n"
    except OSError:
        return False


METRICS_KEYS = ("sums", "counts", "smooth_loss", "seconds", "sessions", "done_step")


@dataclasses.dataclass
class Progress:
    """What follows from the batches so far; a checkpoint holds it beside what is kept."""

    step: int = 0
    best: float | None = None
    best_step: int = 0
    evaluation: dict[str, float] = dataclasses.field(default_factory=dict)
    evaluated_step: int = -1
    # What was due up to this step is done.
    done_step: int = 0
    # Of the values logged since the last row.
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    smooth_loss: float | None = None
    seconds: float = 0.0
    sessions: int = 0

    def stored(self) -> dict:
        return {
            "step": self.step,
            "best": {"value": self.best, "step": self.best_step},
            "evaluation": {"values": dict(self.evaluation), "step": self.evaluated_step},
            "metrics": {key: copy.copy(getattr(self, key)) for key in METRICS_KEYS},
        }

    @classmethod
    def restored(cls, state: dict) -> Progress:
        """Raises LookupError, TypeError or ValueError for what stored() cannot have made."""
        best, evaluation = state["best"], state["evaluation"]
        values = {
            "step": state["step"],
            "best": best["value"],
            "best_step": best["step"],
            "evaluation": evaluation["values"],
            "evaluated_step": evaluation["step"],
            **{key: state["metrics"][key] for key in METRICS_KEYS},
        }
        made, plain = cls(**values), vars(cls())
        for name, value in values.items():
            # None stands for a number that is not known yet.
            kinds = (float, type(None)) if plain[name] is None else (type(plain[name]),)
            if type(value) not in kinds:
                raise ValueError(f"{name} is {value!r}")
        for named, number in ((made.evaluation, float), (made.sums, float), (made.counts, int)):
            if not all(type(k) is str and type(v) is number for k, v in named.items()):
                raise ValueError("its metrics are no numbers")
        if made.best_step if made.best is None else math.isnan(made.best):
            raise ValueError(f"best is {made.best!r}")
        if made.sums.keys() != made.counts.keys() or min(made.step, *made.counts.values(), 0) < 0:
            raise ValueError("its counters contradict each other")
        return made


SMALL_PARTS = (LRScheduler, ReduceLROnPlateau, torch.amp.GradScaler)


@dataclasses.dataclass
class Boundary:
    """The last point at which all of the state was of one step."""

    progress: Progress
    # Each buffer of the models, and a copy.
    buffers: list[tuple[Tensor, Tensor]] = dataclasses.field(default_factory=list)
    # Schedulers and GradScalers, which an exception may leave one step ahead.
    small: list[tuple[typing.Any, dict]] = dataclasses.field(default_factory=list)


class Run:
    """One training run: what a checkpoint holds, and what happens between two batches.

    main() makes it and hands it to train(run). Use it in this order: data(), model(), keep(), then
    one loop over batches(), in which log(), clip_gradients() and autocast() are for the body.

    `options` is what the command line says; `device`, `rank` and `world_size` are where this
    process computes; `resumed` is the checkpoint that the run goes on from, or None.
    """

    FORMAT_VERSION = 2
    # What a checkpoint consists of.
    ENTRIES = {
        **dict.fromkeys(("format_version", "step"), int),
        **dict.fromkeys(("run_id", "exit_reason", "torch_version", "saved_at"), str),
        **dict.fromkeys(("model_state_dict", "optimizer_state_dicts", "state_dicts"), dict),
        **dict.fromkeys(("scheduler_state_dicts", "best", "evaluation", "metrics"), dict),
        **dict.fromkeys(("config", "data_fingerprint"), dict),
    }
    # Without a step of a kept optimizer for so many batches, each is a boundary.
    LONGEST_ACCUMULATION = 16
    STATUS_SECONDS = 0.1
    # What the summary calls a checkpoint that is not of the last moment.
    NEWEST = "Newest whole checkpoint"

    def __init__(
        self,
        options: argparse.Namespace,
        processes: Processes,
        screen: Screen,
        resumed: tuple[Path, dict] | None,
    ) -> None:
        self.options, self.processes, self.screen = options, processes, screen
        # What all processes have agreed on, and what this one has heard.
        self.monitor, self.own_monitor = processes.monitor, processes.own_monitor
        self.rank, self.world_size = processes.rank, processes.world_size
        self.device = choose_device(options.device)
        self.resumed: Path | None = resumed[0] if resumed else None
        self._state: dict = resumed[1] if resumed else {}
        self.run_id = self._state.get("run_id", uuid.uuid4().hex[:12])
        self.progress = Progress.restored(self._state) if resumed else Progress()
        config = self._state.get("config", {})
        lengths = [(one.get("steps"), one.get("epochs")) for one in (config, vars(options))]
        # The same run with another length, or one that is done.
        self._stretched = resumed is not None and lengths[0] != lengths[1]
        self.completed = self._state.get("exit_reason") == "completed" and not self._stretched
        self.exit_code = 0
        # (what the summary calls it, its path), once the last save is done.
        self.saved: tuple[str, Path] | None = None
        self._models: dict[str, tuple[nn.Module, nn.Module]] = {}
        self._kept: dict[str, dict[str, typing.Any]] = {
            "optimizer_state_dicts": {},
            "scheduler_state_dicts": {},
            "state_dicts": {},
        }
        self._batches: Batches | None = None
        self._loader: Loader | None = None
        self._evaluate: Callable | None = None
        self._best_name, self._higher = "loss", False
        self._value_names: list[str] = []
        # Has begun to train, and has completed a batch.
        self.trains = self.trained = False
        self._began = self._in_body = self._stepped = False
        # {name: (sum, count)} of what the batch at hand has logged.
        self._logged: dict[str, tuple[float, int]] = {}
        self._late_columns: set[str] = set()
        self._last_save: tuple[str, float] | None = None
        self._writer: CheckpointWriter | None = None
        self._boundary = Boundary(copy.deepcopy(self.progress))
        self._undo = contextlib.ExitStack()
        if self.device.type == "cuda":
            # Bit for bit needs kernels that add in a fixed order.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        seed_generators(options.seed, "start", device=self.device.type)

    # What train(run) uses before the loop.

    def data(
        self,
        training: Samples,
        validation: Samples | None = None,
        collate: Callable[[list], typing.Any] | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Sets the datasets, map-style. `collate` makes a batch of a list of samples.

        batch_size is that of all processes (default --batch-size). Raises UserError for data that
        cannot be resumed bit for bit or is too short, and on resume for other data.
        """
        batch_size = batch_size or self.options.batch_size
        for dataset in (training, *([] if validation is None else [validation])):
            is_stream = isinstance(dataset, torch.utils.data.IterableDataset)
            if is_stream or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
                raise UserError(
                    f"run.data: {type(dataset).__name__} is no map-style dataset. A stream cannot"
                    " be resumed at any batch: give it __getitem__(index) and __len__()"
                )
        if batch_size % self.world_size:
            text = f"{batch_size} cannot be shared out equally among {self.world_size} processes"
            raise UserError(f"--batch-size {text}")
        if len(training) < batch_size:
            raise UserError(
                f"run.data: {len(training)} training samples are less than a batch of {batch_size}"
            )
        if validation is not None and not len(validation):
            raise UserError("run.data: the validation dataset is empty")
        self._batches = Batches(
            training, validation, collate, batch_size, self.options, self.rank, self.world_size
        )
        self._fingerprint = {
            "training": fingerprint(training),
            "validation": fingerprint(validation),
        }
        if self.resumed is not None:
            self._check_data()

    def _check_data(self) -> None:
        for split, own in self._fingerprint.items():
            saved = self._state["data_fingerprint"].get(split)
            if not isinstance(saved, list) or len(saved) != 2 or type(saved[0]) is not int:
                raise CheckpointError(
                    f"{self.resumed}: not a checkpoint of this program (its data)"
                )
            if change := difference(saved, own):
                text = f"the {split} data is not what the run of {self.resumed} was trained on"
                raise CheckpointError(f"{text} ({change})")

    @property
    def total_steps(self) -> int:
        """Batches in the whole run: --steps, or --epochs if that comes earlier."""
        steps, epochs = self.options.steps, self.options.epochs
        if steps is None and epochs is None:
            raise UserError("how long? Give --steps or --epochs, or main() one of them")
        if epochs is not None:
            steps = min(steps or math.inf, epochs * self._ready_batches().per_epoch)
        return int(steps)

    def _ready_batches(self) -> Batches:
        if self._batches is None:
            raise UserError("call run.data(training, validation) first")
        return self._batches

    def model(self, module: nn.Module, name: str = "model") -> nn.Module:
        """Moves a module to the device, wraps and compiles it, and restores its weights on resume.

        Returns what the loop calls. Optimizers are made after this. Raises UserError for a module
        that cannot be sharded, CheckpointError where the checkpoint's is another one.
        """
        if self._began or name in self._models:
            reason = "already in the loop" if self._began else "there is one of this name: name=..."
            raise UserError(f"run.model({name}): {reason}")
        module, wrapped = self.processes.wrap(module, self.device)
        if self.resumed is not None:
            saved = self._state["model_state_dict"]
            if name != "model":
                saved = self._state["state_dicts"].get(name, {})
            own = module.state_dict()
            check_same({name: saved}, {name: own}, self.resumed)
            self._load(module, self.processes.restored(self.resumed, saved, own), name)
        if self.options.compile:
            module.compile()
        self._models[name] = (module, wrapped)
        return wrapped

    @property
    def module(self) -> nn.Module:
        """The bare model, without what makes it one of many processes."""
        return next(iter(self._models.values()))[0]

    def keep(self, **objects: typing.Any) -> typing.Any:
        """Saves and restores objects with state_dict and load_state_dict, and dicts of them.

        Optimizers, schedulers, EMA, GradScaler, ... They are restored when the loop begins.
        Returns the object; of several a tuple.
        """
        for label, value in objects.items():
            for name, part in (value if isinstance(value, dict) else {label: value}).items():
                if self._began or not hasattr(part, "load_state_dict"):
                    reason = "before the loop" if self._began else "it has no load_state_dict"
                    raise UserError(f"run.keep({label}=...): {reason}")
                kind = "state_dicts"
                if isinstance(part, (LRScheduler, ReduceLROnPlateau)):
                    kind = "scheduler_state_dicts"
                if isinstance(part, Optimizer):
                    kind = "optimizer_state_dicts"
                if name in self._kept[kind] or name == "model":
                    raise UserError(f"run.keep({label}=...): the name {name} is taken")
                self._kept[kind][name] = part
        values = tuple(objects.values())
        return values[0] if len(values) == 1 else values

    # What the body of the loop uses.

    @property
    def step(self) -> int:
        """Batches that are complete."""
        return self.progress.step

    @property
    def epoch(self) -> int:
        return self.step // self._ready_batches().per_epoch

    @property
    def best(self) -> float | None:
        """The best value so far of what batches() calls best; None before the first evaluation."""
        return self.progress.best

    @property
    def best_step(self) -> int:
        return self.progress.best_step

    @property
    def evaluation(self) -> dict[str, float] | None:
        """{name: mean} in the body of the first batch after an evaluation, else None."""
        fresh = self.progress.evaluated_step == self.step
        return dict(self.progress.evaluation) if fresh else None

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context that --dtype asks for, for the body and for evaluate."""
        wanted = self.options.dtype
        bfloat16 = wanted == "bfloat16" or wanted == "auto" and self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16)

    def clip_gradients(self, max_norm: float, parameters: typing.Any = None) -> Tensor:
        """Scales the gradient to a norm of at most max_norm; returns the norm that it had.

        Raises FloatingPointError, before anything is updated, where it is not finite; not with a
        kept GradScaler that is enabled, which then skips the step itself.
        """
        if parameters is None:
            modules = [module for module, _ in self._models.values()]
            parameters = itertools.chain.from_iterable(one.parameters() for one in modules)
        norm = whole(nn.utils.clip_grad_norm_(list(parameters), max_norm))
        others = self._kept["state_dicts"].values()
        scaled = any(isinstance(one, torch.amp.GradScaler) and one.is_enabled() for one in others)
        if not scaled and not norm.isfinite():
            raise FloatingPointError(
                "the gradient is NaN or infinite; nothing was updated. A resumed run comes to it"
                " again: start a new one with a smaller learning rate or another --seed"
            )
        return norm

    def log(self, **values: float | Tensor) -> None:
        """Numbers whose means since the last row become columns of metrics.csv; `loss` is shown.

        A loss that is not finite ends the run when the batch is complete, and is not saved.
        """
        for name, value in values.items():
            number = float(value.detach() if isinstance(value, Tensor) else value)
            total, count = self._logged.get(name, (0.0, 0))
            self._logged[name] = total + number, count + 1

    def average(self, mean: Tensor) -> Tensor:
        """A mean over this process's part of a batch becomes that over all of it."""
        return self.processes.average(mean)

    def batches(self, evaluate: Callable | None = None, best: str = "min loss") -> Iterator:
        """Yields batches on the device. Coming back for the next one completes the one before.

        evaluate(batch) returns {name: a value for each sample}; best names one of them, and min or
        max. A request to leave is honoured between batches: all is saved, and SystemExit raised.
        """
        direction, _, self._best_name = best.partition(" ")
        if direction not in ("min", "max") or not self._best_name:
            raise UserError(f'run.batches(best="{best}"): "min" or "max", and the name of a value')
        if self._began:
            raise UserError("run.batches: there is one loop in a run. Put both into one")
        if evaluate is not None and not self._ready_batches().validated:
            raise UserError(
                "run.batches(evaluate): there is no validation data; run.data(training, validation)"
            )
        self._evaluate, self._higher = evaluate, direction == "max"
        self._ready_batches()
        return self._loop()

    def _loop(self) -> Iterator:
        self._begin()
        if self.completed:
            text = f"step {self.step} of {self.total_steps}. A larger --steps trains further"
            self.screen.say(f"✅ Nothing left to do: {text}.")
            return
        if self.progress.done_step < self.step:
            # A request cut an evaluation short.
            self._at_boundary()
        while not self.finished:
            batch = self._next_batch()
            seed_generators(
                self.options.seed, "step", self.step, self.rank, device=self.device.type
            )
            self._in_body, self._logged = True, {}
            yield batch
            self._complete()
        self._finish()

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    # The beginning of the loop.

    def _begin(self) -> None:
        self._check_optimizers()
        if self.resumed is not None:
            self._restore()
        self._began = True
        if self.completed or self.step > self.total_steps:
            self.completed = True
            return
        self._rates_before = self._rates()
        # Where rank 0 may not save, none begins.
        self.processes.first(self._open_directory)
        if self.processes.sharded or self.rank == 0:
            self._writer = CheckpointWriter(self._save, self.screen.say)
        self.progress.sessions += 1
        self._hooks()
        self._mark_boundary()
        self.own_monitor.describe, self.own_monitor.nothing_to_save = self._describe, None
        self._clock = self._row_clock = self._start_clock = time.monotonic()
        self._status_clock, self._first_step, self._row_step = 0.0, self.step, self.step
        self._introduce()
        self.trains = True
        # Twice: the question at hand was asked long ago.
        self.processes.agree()
        self.processes.agree()
        if self._evaluate is not None:
            self._try_evaluation()

    def _check_optimizers(self) -> None:
        if not self._models:
            raise UserError("call run.model(module) before the loop")
        own = self._parameter_names()
        for name, optimizer in self._kept["optimizer_state_dicts"].items():
            for group in optimizer.param_groups:
                if any(parameter not in own for parameter in group["params"]):
                    raise UserError(
                        f"run.keep({name}=...): the optimizer has parameters that no run.model(...)"
                        " has. Call run.model first, and give the optimizer its parameters"
                    )

    def _parameter_names(self) -> dict[Tensor, str]:
        names: dict[Tensor, str] = {}
        for name, (module, _) in self._models.items():
            names |= {parameter: f"{name}.{key}" for key, parameter in module.named_parameters()}
        return names

    def _hooks(self) -> None:
        """A batch in which a kept optimizer has stepped is a boundary; no other may step."""
        own = set(self._parameter_names())
        kept = set(self._kept["optimizer_state_dicts"].values())
        for part in self._kept["state_dicts"].values():
            kept |= set(optimizers_in(part))

        def before_step(optimizer: Optimizer, *arguments: object) -> None:
            self._stepped = self._stepped or optimizer in kept
            if optimizer not in kept:
                parameters = itertools.chain(*(group["params"] for group in optimizer.param_groups))
                if not own.isdisjoint(parameters):
                    word = type(optimizer).__name__
                    raise UserError(
                        f"{word} trains the model but is not kept: run.keep(name={word}(...))"
                    )

        hook = register_optimizer_step_pre_hook(before_step)
        self._undo.callback(hook.remove)

    def _open_directory(self) -> None:
        path = Path(self.options.checkpoint_dir)
        self.directory = RunDirectory(path, self.run_id, self.screen.say)
        old = home_of(self.resumed) if self.resumed else path
        self.metrics = Metrics(path, self.run_id, self.step, old)
        self._tensorboard = None
        if self.options.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError(
                    "--tensorboard needs its package: pip install tensorboard"
                ) from None
            # What a run that died has written of later steps will come again.
            self._tensorboard = SummaryWriter(path / "tensorboard", purge_step=self.step + 1)
            self._undo.callback(self._tensorboard.close)

    def _restore(self) -> None:
        """What is kept, the optimizers last: a scheduler's constructor changes their rates."""
        path = typing.cast(Path, self.resumed)
        own = self.state_dict(None)
        check_same(self._state, own, path)
        for kind in ("scheduler_state_dicts", "state_dicts", "optimizer_state_dicts"):
            for name, part in self._kept[kind].items():
                like_own = own[kind][name]
                if isinstance(part, Optimizer):
                    groups = [group["params"] for group in part.param_groups]
                    like_own = {"state": dict(enumerate(itertools.chain(*groups)))}
                saved = self.processes.restored(path, self._state[kind][name], like_own)
                self._load(part, saved, name)
        for scheduler in self._kept["scheduler_state_dicts"].values():
            planned = getattr(scheduler, "total_steps", None)
            if isinstance(planned, int) and planned < self.total_steps:
                raise UserError(
                    f"--steps or --epochs: {type(scheduler).__name__} was made for {planned} steps,"
                    f" not for {self.total_steps}; a longer run needs a new start"
                )
        # Its tensors are not needed any more.
        self._state = {}

    def _load(self, part: typing.Any, saved: dict, name: str) -> None:
        try:
            part.load_state_dict(saved)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            text = f"{self.resumed} does not fit {name} ({one_line(error)})"
            raise CheckpointError(text) from error

    def _introduce(self) -> None:
        batches, say = self._ready_batches(), self.screen.say
        count = sum(parameter.numel() for parameter in self._parameter_names())
        # fully_shard has made a class of its own of it.
        kinds = (type(module).__name__.removeprefix("FSDP") for module, _ in self._models.values())
        names = " and ".join(kinds)
        where = (
            str(self.device) if self.world_size == 1 else f"{self.world_size} x {self.device.type}"
        )
        say(
            f"🧠 {names}, {count:,} parameters, on {where}: {len(batches.training):,} samples,"
            f" {batches.per_epoch:,} batches an epoch; saves in {self.options.checkpoint_dir}"
        )
        if self.resumed is not None:
            say(f"📂 Resumed at step {self.step} of {self.total_steps} from {self.resumed}")
        elif self.rank == 0 and self.metrics.path.name != "metrics.csv":
            say(f"📂 Another run has saved here before; this one logs to {self.metrics.path.name}")
        say("🔄 Training started. Press 'q' + Enter to exit gracefully...")

    # Between two batches.

    def _next_batch(self) -> typing.Any:
        while True:
            if self.monitor.exit_requested and self.step == self._boundary.progress.step:
                self._leave()
            try:
                return self._fetched(Loader.training)
            except Interrupted:
                self._leave()

    def _fetched(self, get: Callable, *arguments: object) -> typing.Any:
        """What the loader gives, on the device. Waiting for it, one process is at a boundary.

        Raises Interrupted where somebody asks to leave meanwhile, whatever the loader does.
        """
        try:
            with self._waiting():
                if self._loader is None:
                    pin, workers = self.device.type == "cuda", self.options.workers
                    batches = self._ready_batches()
                    self._loader = Loader(batches, workers, self.step, pin, self.screen.say)
                return to_device(get(self._loader, *arguments), self.device)
        except Interrupted:
            self._close_loader()
            raise

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        if self.world_size > 1:
            # The others are in a collective: here a request waits for the loader.
            yield
            return
        # In the middle of an accumulation a request waits for its end, but not for ever.
        alarm = None
        if self.monitor.exit_requested and self.step > self._boundary.progress.step:
            alarm = threading.Timer(10.0, self.own_monitor.interrupt)
            alarm.start()
        try:
            with self.own_monitor.interruptible(at_once=alarm is None):
                yield
        except Exception:
            # The workers may have died of a signal that we are about to hear, too.
            if not self.own_monitor.requested_within(0.5):
                raise
            raise Interrupted from None
        finally:
            if alarm is not None:
                alarm.cancel()

    def _close_loader(self) -> None:
        if self._loader is not None:
            self._loader.close()
        self._loader = None
        # Those that were interrupted while they started.
        end_children()

    def _complete(self) -> None:
        """Counts the batch that the body has had, and does what is due."""
        self._add_logged()
        self._in_body = False
        self.progress.step += 1
        now = time.monotonic()
        self.progress.seconds, self._clock = self.progress.seconds + now - self._clock, now
        before = self._boundary.progress.step
        waited = self.step - before >= self.LONGEST_ACCUMULATION
        ends = self._stepped or waited or self.finished or not self._kept["optimizer_state_dicts"]
        if ends:
            self._mark_boundary()
        # Where another rank has died this raises; by now the batch is complete.
        self.processes.agree()
        if ends:
            if not self.trained:
                self._after_first_step()
            self.trained = True
            self._at_boundary()

    def _add_logged(self) -> None:
        """Adds what all ranks have logged in this batch to the next row."""
        progress, logged = self.progress, self._logged
        # Where another rank has died our own part is all there is; agree() will raise.
        with contextlib.suppress(RuntimeError):
            logged = self.processes.logged(logged)
        for name, (total, count) in logged.items():
            progress.sums[name] = progress.sums.get(name, 0.0) + total
            progress.counts[name] = progress.counts.get(name, 0) + count
            if name == "loss":
                mean, smooth = total / count, progress.smooth_loss
                progress.smooth_loss = mean if smooth is None else 0.9 * smooth + 0.1 * mean
        if not math.isfinite(progress.sums.get("loss", 0.0)):
            raise FloatingPointError("the loss is NaN or infinite; nothing of it is saved")

    def _mark_boundary(self) -> None:
        self._stepped = False
        buffers = [buffer for module, _ in self._models.values() for buffer in module.buffers()]
        # All of them: BatchNorm changes its own without a new version.
        copies = [(buffer, buffer.detach().clone()) for buffer in buffers]
        parts = [part for kind in self._kept.values() for part in kind.values()]
        small = [(p, copy.deepcopy(p.state_dict())) for p in parts if isinstance(p, SMALL_PARTS)]
        self._boundary = Boundary(copy.deepcopy(self.progress), copies, small)

    @torch.no_grad()
    def _back_to_boundary(self) -> None:
        """Undoes what batches have changed since the last boundary without an optimizer's step."""
        for buffer, saved in self._boundary.buffers:
            buffer.copy_(saved)
        for part, state in self._boundary.small:
            part.load_state_dict(state)
        self.progress = copy.deepcopy(self._boundary.progress)

    def _after_first_step(self) -> None:
        """What cannot be saved is said now, and what saving needs is imported now."""
        try:
            laid_out(self.processes.rows(self.state_dict("")))
        except TypeError as error:
            # Nor is there anything to save on leaving.
            self._writer = None
            raise UserError(f"this run could not be saved: {error}") from None
        rates = zip(self._rates_before, self._rates()) if self._stretched else ()
        if any(abs(now - before) > 0.1 * before for before, now in rates):
            before, now = self._rates_before[0], self._rates()[0]
            self.screen.say(
                f"📈 The learning rate goes on at {now:.2e}, after {before:.2e}: its schedule is"
                f" now one of {self.total_steps} steps"
            )

    def _due(self, every: int) -> bool:
        return self.step // every > self.progress.done_step // every

    def _at_boundary(self) -> None:
        """Evaluates, logs and saves what is due since the last time.

        A request to leave cuts an evaluation short; all of this is then done on resume.
        """
        targets = {}
        evaluated = self._evaluate is not None and (
            self._due(self.options.eval_every) or self.finished
        )
        if evaluated:
            if not self._evaluated():
                return
            if self.progress.best_step == self.step:
                targets["best"] = "best.pt"
        logged = evaluated or self.finished or self._due(self.options.log_every)
        if logged:
            self._log_row(evaluated)
        if self.monitor.save_requested or self._due(self.options.save_every):
            reason = "user_requested_save" if self.monitor.save_requested else "periodic"
            self.monitor.save_requested = False
            targets[reason] = f"step_{self.step}.pt"
        # What an evaluation has found is part of the state of this step.
        self.progress.done_step = self.step
        self._boundary.progress = copy.deepcopy(self.progress)
        if targets and self._writer is not None:
            self._writer.submit(self.processes.rows(self.state_dict(None)), targets)
        self._show(logged)

    # Evaluation.

    def _evaluated(self) -> bool:
        """Finds the mean of each value over all samples; False where a request cut it short."""
        totals: dict[str, float] = {}
        count = 0
        with self._evaluating():
            for number in range(self._ready_batches().per_evaluation):
                try:
                    if self.monitor.exit_requested:
                        raise Interrupted
                    batch, counted = self._fetched(Loader.validation, number)
                except Interrupted:
                    self._close_loader()
                    return False
                count += counted
                for name, total in self._values(batch, counted, number).items():
                    totals[name] = totals.get(name, 0.0) + total
                self.processes.agree()
        *sums, all_samples = self.processes.sum([*totals.values(), float(count)])
        progress = self.progress
        progress.evaluation = {name: total / all_samples for name, total in zip(totals, sums)}
        progress.evaluated_step = self.step
        value, best = progress.evaluation[self._best_name], progress.best
        if best is None and value == value or best is not None and (
            value > best if self._higher else value < best
        ):  # fmt: skip
            progress.best, progress.best_step = value, self.step
        return True

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Modules in eval mode; afterwards each submodule is as it was. Buffers are rank 0's."""
        roots = [wrapped for _, wrapped in self._models.values()]
        roots += [
            part for part in self._kept["state_dicts"].values() if isinstance(part, nn.Module)
        ]
        training = [(one, one.training) for root in roots for one in root.modules()]
        self.processes.share_buffers(roots)
        for root in roots:
            root.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for one, was in training:
                one.training = was

    def _values(self, batch: typing.Any, count: int, number: int) -> dict[str, float]:
        """What evaluate returns for a batch, summed up. Raises UserError for anything else."""
        seed_generators(self.options.seed, "evaluation", number, device=self.device.type)
        values = typing.cast(Callable, self._evaluate)(batch)
        if not isinstance(values, dict) or self._best_name not in values:
            got = list(values) if isinstance(values, dict) else type(values).__name__
            wanted = f"{{name: a value for each sample}}, {self._best_name} among them"
            raise UserError(f"evaluate returned {got}; it has to return {wanted} (see best=...)")
        sums = {}
        for name, value in values.items():
            value = whole(torch.as_tensor(value).detach())
            if value.shape != (max(count, 1),):
                shape = f"{tuple(value.shape)} for a batch of {max(count, 1)} samples"
                raise UserError(
                    f'evaluate returned "{name}" of shape {shape}: one value for each sample is'
                    ' wanted (as reduction="none" gives it), whose mean is taken'
                )
            sums[name] = value[:count].to("cpu", torch.float64).sum().item()
        return sums

    def _try_evaluation(self) -> None:
        """One batch, before training: a mistake in evaluate shows now, and its values' names."""
        try:
            with self._evaluating():
                batch, count = self._fetched(Loader.validation, 0, 1)
                self._value_names = list(self._values(batch, count, 0))
        except Interrupted:
            # The loop will leave at once.
            pass

    # What people see.

    def _rates(self) -> list[float]:
        optimizers = self._kept["optimizer_state_dicts"].values()
        return [float(optimizer.param_groups[0]["lr"]) for optimizer in optimizers]

    def _log_row(self, evaluated: bool) -> None:
        progress, now = self.progress, time.monotonic()
        means = {name: total / progress.counts[name] for name, total in progress.sums.items()}
        samples = (self.step - self._row_step) * self._ready_batches().batch_size
        values = {
            "step": self.step,
            "epoch": self.epoch,
            **means,
            **{
                f"val_{name}": progress.evaluation[name] if evaluated else ""
                for name in self._value_names
            },
            **dict(
                zip((f"lr_{name}" for name in self._kept["optimizer_state_dicts"]), self._rates())
            ),
            "samples_per_second": round(samples / max(1e-9, now - self._row_clock), 1),
            "seconds": round(progress.seconds, 3),
        }
        progress.sums, progress.counts = {}, {}
        self._row_clock, self._row_step = now, self.step
        if self.rank != 0:
            return
        self.metrics.row(values)
        for name in values.keys() - {*self.metrics.columns, *self._late_columns}:
            self._late_columns.add(name)
            self.screen.say(
                f"⚠️ {name} is not in {self.metrics.path.name}: its columns are those of the first"
                f" row. Log {name} from the first batch on"
            )
        if self._tensorboard is not None:
            for name, value in values.items():
                if value != "" and name not in ("step", "run"):
                    self._tensorboard.add_scalar(name.replace("_", "/", 1), value, self.step)

    def _show(self, logged: bool) -> None:
        """The status line on a terminal; elsewhere a plain line for every row of metrics.csv."""
        now = time.monotonic()
        too_soon = self.screen.is_terminal and now - self._status_clock < self.STATUS_SECONDS
        if too_soon or not (self.screen.is_terminal or logged):
            return
        self._status_clock, progress = now, self.progress
        seconds = max(1e-9, now - self._start_clock) / max(1, self.step - self._first_step)
        left = datetime.timedelta(
            seconds=min(round(seconds * (self.total_steps - self.step)), 10**9)
        )
        parts = [f"step {self.step}/{self.total_steps}", f"{left} left"]
        if progress.smooth_loss is not None:
            parts.insert(1, f"loss {progress.smooth_loss:.4f}")
        if progress.best is not None:
            last = progress.evaluation[self._best_name]
            parts.append(f"val {self._best_name} {last:.4f} (best {progress.best:.4f})")
        parts.append(f"epoch {self.epoch}")
        parts.append(f"{self._ready_batches().batch_size / seconds:,.0f} samples/s")
        parts += [f"lr {rate:.2e}" for rate in self._rates()[-1:]]
        if self.screen.is_terminal:
            self.screen.status(parts)
        else:
            self.screen.say(" | ".join(parts))

    def _describe(self) -> str:
        if self._last_save is None:
            since = "the one that was resumed" if self.resumed else "this start"
            return f"No checkpoint yet since {since}."
        name, when = self._last_save
        return f"Last checkpoint: {name}, {short_time(time.monotonic() - when)} ago."

    def summary(self) -> str:
        """What is read last: how far it came, what was saved, and the command that goes on."""
        best = "none yet" if self.best is None else f"{self.best:.4f}"
        lines = [
            "📊 Training Summary:",
            f"   Completed Steps: {self.step}",
            f"   Epoch: {self.epoch}",
            f"   Best {self._best_name.replace('_', ' ').title()}: {best}",
        ]
        if self.saved is not None:
            label, path = self.saved
            lines.append(f"   {label}: {path}")
            further, word = "", "Resume"
            if self.completed:
                word, options = "Train further", self.options
                further = f" --steps {2 * self.step}" if options.steps else ""
                further += f" --epochs {2 * options.epochs}" if options.epochs else ""
            command = f"{own_command()} --resume {shlex.quote(str(path))}{further}"
            lines.append(f"▶️ {word} with: {command}")
        return "\n".join(lines)

    # Saving and leaving.

    def state_dict(self, exit_reason: str | None) -> dict:
        """The checkpoint as of the last boundary. Its tensors are the live ones, not copies."""
        models = {name: module.state_dict() for name, (module, _) in self._models.items()}
        names = self._parameter_names()
        optimizers = {}
        for name, optimizer in self._kept["optimizer_state_dicts"].items():
            kind = type(optimizer)
            groups = [
                [names[parameter] for parameter in group["params"]]
                for group in optimizer.param_groups
            ]
            # PyTorch takes the state of any optimizer that has as many parameters.
            whose = {"class": f"{kind.__module__}.{kind.__qualname__}", "param_names": groups}
            optimizers[name] = {**optimizer.state_dict(), **whose}
        schedulers, others = (
            {name: part.state_dict() for name, part in self._kept[kind].items()}
            for kind in ("scheduler_state_dicts", "state_dicts")
        )
        return {
            "format_version": self.FORMAT_VERSION,
            # Early in the file, for RunDirectory.
            "run_id": self.run_id,
            "model_state_dict": models.pop("model", {}),
            "optimizer_state_dicts": optimizers,
            "scheduler_state_dicts": schedulers,
            "state_dicts": {**models, **others},
            **self._boundary.progress.stored(),
            "config": {k: v for k, v in vars(self.options).items() if k not in NOT_STORED},
            "data_fingerprint": self._fingerprint,
            "exit_reason": exit_reason,
            "torch_version": str(torch.__version__),
            "saved_at": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        }

    def _writers(self) -> OneWriter:
        """Who takes part in the save that begins now."""
        writers = self.processes if self.processes.sharded else OneWriter()
        writers.begin_save()
        return writers

    def _save(self, state: dict, name: str) -> Path:
        """Where it has saved. A state may hold the error that came instead of a copy."""
        writers = self._writers()
        path = Path(writers.lead(self._path_to_save, name))
        writers.each(raise_error_of, state)
        write_checkpoint(state, path, writers)
        if self.rank == 0:
            self._last_save = name, time.monotonic()
            if path.name.startswith("step_"):
                self.directory.prune(path, self.options.keep)
        return path

    def _path_to_save(self, name: str) -> str:
        # Somebody may have deleted it; without it the rows that wait could not be written.
        self.directory.path.mkdir(parents=True, exist_ok=True)
        self.metrics.flush()
        if self._tensorboard is not None:
            self._tensorboard.flush()
        return str(self.directory.path_for(name))

    def _leave(self) -> None:
        """Saves and raises SystemExit. Returns only where a save after q has failed.

        A person can make room then and type q again. After a signal there may be no second
        chance: the system's temporary directory is tried, and the exit code is 1 if that fails too.
        """
        # Of torchrun's only process, what has interrupted its waiting may be new to it.
        self.processes.agree()
        if self.step > self._boundary.progress.step:
            self._back_to_boundary()
        self.screen.say("📝 Saving emergency checkpoint...")
        name = f"emergency_exit/emergency_step_{self.step}.pt"
        while self.monitor.exit_requested:
            reason, self.exit_code = typing.cast(str, self.monitor.reason), self.monitor.exit_code
            try:
                self._save_last("Emergency checkpoint", name, reason, reason != USER_REQUEST)
            except SAVE_ERRORS as error:
                self.exit_code = 0
                self.screen.say(
                    f"❌ Emergency checkpoint not saved: {one_line(error)}. Training goes on: make"
                    " room, then press 'q' + Enter again."
                )
                self.monitor.withdraw(reason)
            else:
                raise Leaving(self.exit_code)

    def _finish(self) -> None:
        """Ends a run whose steps are all done."""
        while self.progress.done_step < self.step:
            # The evaluation was cut short by a request.
            self._leave()
            self._at_boundary()
        self._save_final()
        self.own_monitor.nothing_to_save = "Everything is saved already."

    def _save_final(self) -> None:
        self._save_last("Final checkpoint", "final.pt", "completed", True)
        self.completed = True

    def _save_last(self, label: str, name: str, reason: str, fall_back: bool) -> None:
        """Raises one of SAVE_ERRORS where the save fails and fall_back is False."""
        arguments = (label, name, reason, fall_back)
        if self.processes.sharded:
            text = self._save_now(*arguments)
        else:
            text = self.processes.first(self._save_now, *arguments)
        if text is None:
            self.exit_code = 1
            self._name_newest()
            return
        self.saved = (label, Path(text))
        self.screen.say(f"✅ {label} saved: {text}")
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()
            self.screen.say(f"🧹 {self.device.type.upper()} cache cleared")

    def _save_now(self, label: str, name: str, reason: str, fall_back: bool) -> str | None:
        """The path, for all; None where nothing could be saved."""
        typing.cast(CheckpointWriter, self._writer).wait()
        state = self.processes.rows(self.state_dict(reason))
        try:
            return str(self._save(state, name))
        except SAVE_ERRORS as error:
            if not fall_back:
                raise
            self.screen.say(
                f"⚠️ {label} not saved: {one_line(error)}. Trying the temporary directory..."
            )
        writers = self._writers()
        try:
            path = Path(writers.lead(self._fallback_path, name))
            write_checkpoint(state, path, writers)
        except SAVE_ERRORS as error:
            self.screen.say(f"❌ {label} not saved: {one_line(error)}. TMPDIR names another place.")
            return None
        return str(path)

    def _fallback_path(self, name: str) -> str:
        folder = fallback_directory(self.options.checkpoint_dir)
        folder.mkdir(mode=0o700, exist_ok=True)
        return str(folder / f"{Path(name).stem}_{self.run_id}.pt")

    def _name_newest(self) -> None:
        """For a summary after which nothing new is on the disk."""
        if self.rank == 0:
            # Where there is none, the summary names none.
            with contextlib.suppress(CheckpointError, OSError):
                newest = latest_checkpoint(self.directory.path, self.screen.say)
                self.saved = (self.NEWEST, newest)

    def end(self) -> None:
        """After train() has returned: a loop that was left by break or return is completed."""
        if not self._began or self.completed:
            return
        if self._in_body and self._stepped:
            self._complete()
        else:
            self._back_to_boundary()
        self._save_final()

    def leave_after_exception(self, error: BaseException) -> None:
        """Saves the state of the last boundary, unless an optimizer has stepped since."""
        rank, name = self.processes.first_failure(type(error).__name__)
        if self._writer is None:
            return
        self.processes.break_off()
        self._writer.wait()
        if rank != self.rank:
            self.screen.say(f"❌ {name} in rank {rank}.")
        writers = self._writers()
        try:
            step = None if self._stepped else self._boundary.progress.step
            writers.lead(check_same_step, writers.each(lambda: step))
        except SAVE_ERRORS as incomplete:
            self._name_newest()
            self.screen.say(f"❌ {one_line(incomplete)}: nothing half-updated is saved.")
            return
        self._back_to_boundary()
        self.screen.say("📝 Saving emergency checkpoint...")
        path, label = f"emergency_exit/emergency_step_{self.step}.pt", "Emergency checkpoint"
        text = self._save_now(label, path, f"exception_{name}", True)
        if text is None:
            self._name_newest()
        else:
            self.saved = (label, Path(text))
            self.screen.say(f"✅ {label} saved: {text}")

    def close(self) -> None:
        if self._loader is not None:
            self._close_loader()
        if self._writer is not None:
            self._writer.close()
        self._undo.close()


class Leaving(SystemExit):
    """Raised by the loop where all is saved and somebody has asked to leave."""


def raise_error_of(state: dict) -> None:
    if "error" in state:
        raise state["error"]


def check_same_step(steps: list[int | None]) -> None:
    if None in steps or len(set(steps)) > 1:
        raise RuntimeError("The exception came after a step of an optimizer")


def whole(tensor: typing.Any) -> Tensor:
    """Of a tensor that is spread over processes all of it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def is_sharded(tensor: object) -> bool:
    """True for a DTensor. (Importing its class takes time that most runs need not spend.)"""
    return hasattr(tensor, "full_tensor")


def optimizers_in(part: object) -> Iterator[Optimizer]:
    """The optimizers that a kept object, a controller for instance, saves and restores itself."""
    for value in getattr(part, "__dict__", {}).values():
        for one in value.values() if isinstance(value, dict) else [value]:
            if isinstance(one, Optimizer):
                yield one


def check_same(saved: dict, own: dict, path: Path) -> None:
    """Raises CheckpointError, with the first difference, where saved is of another run than own.

    Models are compared by keys, shapes and types, optimizers by class and parameters, all else by
    name: what is in it is for its own load_state_dict.
    """
    try:
        there, here = outline(saved), outline(own)
    except (LookupError, TypeError, AttributeError) as error:
        text = f"not a checkpoint of this program ({one_line(error)})"
        raise CheckpointError(f"{path}: {text}") from error
    for place in [*here, *there]:
        if there.get(place) != here.get(place):
            was, now = there.get(place), here.get(place)
            if was is None or now is None:
                where = (
                    "in the checkpoint, but not kept by this run"
                    if now is None
                    else "kept by this run, but not in the checkpoint"
                )
                raise CheckpointError(
                    f"{path} does not fit this run: {place} is {where}: run.keep or run.model"
                )
            raise CheckpointError(
                f"{path} does not fit this run: {place} is {was} there, {now} here"
            )


def outline(state: dict) -> dict[str, str]:
    """{a place in a checkpoint: what is there}."""
    found: dict[str, str] = {}

    def add(place: str, value: typing.Any) -> None:
        if isinstance(value, Tensor):
            found[place] = f"{tuple(value.shape)} {value.dtype}"
        elif isinstance(value, dict):
            for key, item in value.items():
                add(f"{place}.{key}", item)

    for key, value in state.items():
        if key == "optimizer_state_dicts":
            for name, optimizer in value.items():
                if not isinstance(optimizer, dict):
                    raise TypeError(f"its {key}")
                found[f"optimizer {name}"] = optimizer["class"]
                for group, names in enumerate(optimizer["param_names"]):
                    for number, parameter in enumerate(names):
                        found[f"parameter {number} of group {group} of {name}"] = str(parameter)
        elif key in ("scheduler_state_dicts", "state_dicts"):
            for name in value:
                found[f"{'scheduler' if key[1] == 'c' else 'state'} {name}"] = "there"
        elif key not in ("config", "metrics", "evaluation", "data_fingerprint"):
            add(str(key), value)
    return found


def own_command() -> str:
    """This program as the person would type it here."""
    script = Path(os.path.abspath(sys.argv[0]))
    words = [sys.executable, str(script)]
    # Elsewhere a relative path would be of no use tomorrow.
    if script.parent == Path.cwd():
        words = [word.removeprefix(f"{script.parent}/") for word in words]
    words = list(map(shlex.quote, words))
    if shutil.which("python") == sys.executable:
        words[0] = "python"
    if started_by_torchrun():
        count = os.environ["LOCAL_WORLD_SIZE"]
        wrapper = Path(__file__).resolve().parent / "scripts" / "train_torchrun.sh"
        if wrapper.exists():
            own = script == Path(__file__).resolve()
            variable = "" if own else f"SCRIPT={words[1]} "
            return f"{variable}{shlex.quote(str(wrapper))} {count}"
        words[1:1] = ["-m torch.distributed.run", f"--nproc-per-node={count}"]
    if not (script.parent / Path(__file__).name).exists():
        # Started by one of the scripts, which have said where to import this file from.
        words.insert(0, f"PYTHONPATH={shlex.quote(os.path.dirname(os.path.abspath(__file__)))}")
    return " ".join(words)


# ---- Processes --------------------------------------------------------------------------------


class Processes(OneWriter):
    """The processes that train one model together: this one alone. torchrun's: ManyProcesses.

    `monitor` is what all have agreed on, `own_monitor` what this one has heard. `sharded`: each has
    a part of the models.
    """

    world_size = 1
    sharded = False

    def __init__(self, monitor: ExitMonitor) -> None:
        self.own_monitor = monitor
        self.monitor: ExitMonitor | AgreedMonitor = monitor

    def wrap(self, module: nn.Module, device: torch.device) -> tuple[nn.Module, nn.Module]:
        """The module on the device, and what the loop calls."""
        return module.to(device), module

    def read(self, path: Path) -> dict:
        """A verified checkpoint; where restored() comes after it, its tensors may be empty."""
        return load_checkpoint(path)

    def restored(self, path: Path, saved: dict, own: dict) -> dict:
        """Part of what read() returned, with the tensors that this process loads into own."""
        return saved

    def rows(self, state: dict) -> dict:
        """A state to be saved, with Rows in the place of tensors that are spread over processes."""
        return state

    def average(self, mean: Tensor) -> Tensor:
        return mean

    def sum(self, values: Sequence[float]) -> Sequence[float]:
        return values

    def logged(self, own: dict[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
        """{name: (sum, count)} of what all have logged in a batch, which may be other names."""
        return own

    def first(self, function: Callable, *arguments: object) -> typing.Any:
        """A collective: what function returns or raises on rank 0 is for all."""
        return function(*arguments)

    def share_buffers(self, roots: Sequence[nn.Module]) -> None:
        """Rank 0's buffers are those of all."""

    def agree(self) -> None:
        """Between two batches: what one process has heard becomes the request of all."""

    def first_failure(self, name: str) -> tuple[int, str]:
        """Rank and name of the exception that came first, of which others may be consequences."""
        return self.rank, name

    def break_off(self) -> None:
        """After a failure: who waits for us in the middle of a batch gets an exception instead."""

    def close(self) -> None:
        """Of a run that has left gracefully."""


class AgreedMonitor:
    """In an ExitMonitor's place: what any rank has heard shows on all after the same batch.

    The question travels while a batch is computed, so the answer costs no waiting; a request is
    honoured after the batch that follows the one it came in.
    """

    REQUESTS: list[tuple[str | None, int]] = [
        (None, 0),
        (USER_REQUEST, 0),
        ("torchrun_died", 1),
        *((f"signal_{signum.name}", 128 + signum) for signum in EXIT_SIGNALS),
    ]

    def __init__(self, own: ExitMonitor) -> None:
        self.own, self._torchrun = own, os.getppid()
        self.save_requested = False
        self._ask()

    def _ask(self) -> None:
        self.exit_requested, self.reason, self.exit_code = False, typing.cast(str | None, None), 0
        if os.getppid() != self._torchrun:
            # Nobody is left who could end us.
            self.own.request("torchrun_died", 1)
        save, self.own.save_requested = self.own.save_requested, False
        number = [reason for reason, _ in self.REQUESTS].index(self.own.reason)
        self._heard = torch.tensor([number, save])
        self._question = dist.all_reduce(self._heard, dist.ReduceOp.MAX, async_op=True)

    def agree(self) -> None:
        """Takes the answer and asks anew. Raises RuntimeError where a rank has died."""
        if self.exit_requested:
            return
        # torchrun's only process has the answer to a new question at once.
        for _ in range(2 if dist.get_world_size() == 1 else 1):
            self._question.wait()
            number, save = self._heard.tolist()
            self.save_requested |= bool(save)
            if number:
                self.exit_requested = True
                self.reason, self.exit_code = self.REQUESTS[number]
                # Whoever heard it, rank 0 says so.
                self.own.request(self.reason, self.exit_code)
                return
            self._ask()

    def withdraw(self, reason: str) -> None:
        self.own.withdraw(reason)
        self._ask()


class ManyProcesses(Processes):
    """This process's view of the group that torchrun made: rank 0 alone prints and hears the keys.

    Each rank has the whole model, DistributedDataParallel averages the gradients, and rank 0
    saves. If sharded, each has rows of every parameter, gradient and optimizer state (fully_shard,
    PyTorch's FSDP2) and saves those. What they tell each other about a save goes through torchrun's
    store: beside training, and after a failure, when no process group is of use.
    """

    # What a rank waits for another that may have died.
    ANSWER_SECONDS = 30

    def __init__(self, monitor: ExitMonitor) -> None:
        super().__init__(monitor)
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        backend, local_rank = "gloo", int(os.environ["LOCAL_RANK"])
        if torch.cuda.is_available():
            if local_rank >= torch.cuda.device_count():
                count = os.environ["LOCAL_WORLD_SIZE"]
                raise UserError(
                    f"{count} processes, but only {torch.cuda.device_count()} GPUs here"
                )
            torch.cuda.set_device(local_rank)
            backend = "cpu:gloo,cuda:nccl"
        store, _, _ = next(dist.rendezvous("env://"))
        # torchrun keeps it over a restart, with what those that have died have said.
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
        self._store = dist.PrefixStore(f"attempt_{attempt}", store)
        dist.init_process_group(
            backend, store=self._store, rank=self.rank, world_size=self.world_size
        )
        self._mesh: typing.Any = None
        self._save, self._exchanges, self._save_began = 0, itertools.count(), 0.0
        self._signals_heard: int | None = None
        self.agreed = AgreedMonitor(monitor)
        self.monitor = self.agreed
        # From here on a request is for all, when the loop begins.
        monitor.nothing_to_save = None

    def wrap(self, module: nn.Module, device: torch.device) -> tuple[nn.Module, nn.Module]:
        module = module.to(device)
        if self.sharded:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.detach(), src=0)
            return self._sharded(module, device), module
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return module, module
        # Found anew in each batch, the parameters that take no part in it may differ (a GAN in one
        # module); and its buckets keep their order, so that a resumed run adds up in the same one.
        parallel = nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
        return module, parallel

    def _sharded(self, module: nn.Module, device: torch.device) -> nn.Module:
        from torch.distributed.fsdp import fully_shard

        if self._mesh is None:
            self._mesh = dist.device_mesh.init_device_mesh(device.type, (self.world_size,))
        lists = [one for one in module.modules() if isinstance(one, nn.ModuleList)]
        found = (unit for one in reversed(lists) for unit in one if list(unit.parameters()))
        units = list(dict.fromkeys(found))
        modules = dict(module.named_modules(remove_duplicate=False))
        owners: dict[Tensor, tuple[str, nn.Module]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if not parameter.dim():
                raise UserError(f"--shard: {name} is a scalar, which cannot be shared out")
            above = (modules[name.rsplit(".", n)[0]] for n in range(1, name.count(".") + 1))
            unit = next((one for one in above if one in units), module)
            other, owner = owners.setdefault(parameter, (name, unit))
            if owner is not unit:
                raise UserError(f"--shard: {other} and {name} are one parameter in two units")
        for unit in (*units, module):
            try:
                fully_shard(unit, mesh=self._mesh)
            except (ValueError, NotImplementedError) as error:
                raise UserError(f"--shard: {one_line(error)}") from None
        return module

    def read(self, path: Path) -> dict:
        """Each rank verifies its share of every record; the tensors are on the meta device."""
        answer: tuple[list[int], str | None] = [], None
        try:
            with opened_checkpoint(path) as checkpoint:
                checkpoint.share(self.rank, self.world_size)
                answer = checkpoint.read(), None
        except CheckpointError as error:
            answer = [], str(error)
        answers: list[typing.Any] = [None] * self.world_size
        dist.all_gather_object(answers, answer)
        for _, mistake in answers:
            if mistake is not None:
                raise CheckpointError(mistake)
        check_checksums(path, checkpoint.records, [checksums for checksums, _ in answers])
        return checkpoint.state

    def restored(self, path: Path, saved: dict, own: dict) -> dict:
        with opened_checkpoint(path) as checkpoint:

            def asked(value: typing.Any, own: typing.Any) -> typing.Any:
                if isinstance(value, dict):
                    made = copy.copy(value)
                    for key, item in value.items():
                        made[key] = asked(item, own.get(key) if isinstance(own, dict) else own)
                    return made
                if is_sharded(own) and is_tensor(value) and value.shape == own.shape:
                    first, last = self._share_of(len(own))
                    return Rows(checkpoint.rows(value, first, last), first, value.shape)
                return mapped(value, checkpoint.whole)

            state = asked(saved, own)
            checkpoint.read()
        return mapped(state, self._from_rows)

    def _from_rows(self, value: typing.Any) -> typing.Any:
        if not isinstance(value, Rows):
            return value
        from torch.distributed.tensor import DTensor, Shard

        local = value.local.contiguous().to(self._mesh.device_type)
        stride = torch.empty(value.shape, device="meta").stride()
        return DTensor.from_local(
            local, self._mesh, [Shard(0)], run_check=False, shape=value.shape, stride=stride
        )

    def _share_of(self, rows: int) -> tuple[int, int]:
        """First row of this rank, and of the next, as PyTorch shards a tensor."""
        share = -(-rows // self.world_size)
        return min(self.rank * share, rows), min((self.rank + 1) * share, rows)

    def rows(self, state: dict) -> dict:
        def own(value: typing.Any) -> typing.Any:
            if not is_sharded(value):
                return value
            if not value.dim() or not value.placements[0].is_shard(0):
                raise TypeError(" is a tensor that is spread over processes, but not by its rows")
            return Rows(value.to_local().detach(), self._share_of(len(value))[0], value.shape)

        return mapped(state, own) if self.sharded else state

    def average(self, mean: Tensor) -> Tensor:
        total = mean.clone()
        dist.all_reduce(total)
        return total / self.world_size

    def sum(self, values: Sequence[float]) -> Sequence[float]:
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def logged(self, own: dict[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
        parts: list[typing.Any] = [None] * self.world_size
        dist.all_gather_object(parts, own)
        total: dict[str, tuple[float, int]] = {}
        for name, (part, count) in itertools.chain.from_iterable(one.items() for one in parts):
            before = total.get(name, (0.0, 0))
            total[name] = before[0] + part, before[1] + count
        return total

    def first(self, function: Callable, *arguments: object) -> typing.Any:
        answer = [attempt(function, *arguments) if self.rank == 0 else None]
        if self.rank == 0:
            # That a rank has died is not the function's fault: the next batch will tell.
            with contextlib.suppress(RuntimeError):
                dist.broadcast_object_list(answer)
        else:
            dist.broadcast_object_list(answer)
        return answered(typing.cast(tuple, answer[0]))

    def share_buffers(self, roots: Sequence[nn.Module]) -> None:
        for root in roots:
            for buffer in root.buffers():
                dist.broadcast(buffer, src=0)

    def agree(self) -> None:
        self.agreed.agree()

    def begin_save(self) -> None:
        self._save, self._exchanges = self._save + 1, itertools.count()
        self._save_began = time.monotonic()

    def lead(self, function: Callable, *arguments: object) -> typing.Any:
        key = f"{self._save} {next(self._exchanges)}"
        if self.rank == 0:
            self._store.set(key, json.dumps(attempt(function, *arguments), default=str))
        return self._answer(key, 0)

    def each(self, function: Callable, *arguments: object) -> list:
        key, results = f"{self._save} {next(self._exchanges)} of ", []
        self._store.set(f"{key}{self.rank}", json.dumps(attempt(function, *arguments)))

        def gather() -> None:
            for rank in range(self.world_size):
                results.append(self._answer(f"{key}{rank}", rank))
                self._store.delete_key(f"{key}{rank}")

        self.lead(gather)
        return results

    def _answer(self, key: str, rank: int) -> typing.Any:
        """What attempt() has returned on a rank.

        Raises RuntimeError where none comes: a rank is waited for much longer than this one itself
        has taken for its part, but not after torchrun has signalled that one has died.
        """
        began, own = time.monotonic(), self.own_monitor
        patience = self.ANSWER_SECONDS + 10 * (began - self._save_began)
        while not self._store.check([key]):
            waited = time.monotonic() - began
            heard = self._signals_heard is not None and own.signals_heard > self._signals_heard
            if waited > patience or heard:
                raise RuntimeError(f"Rank {rank}, which has a part of the model, does not answer")
            # Waiting in the store would hear no signal, and print warnings.
            time.sleep(min(0.1, 0.001 + waited / 8))
        return answered(json.loads(self._store.get(key)))

    def first_failure(self, name: str) -> tuple[int, str]:
        try:
            answer = self._store.compare_set("failure", "", f"{self.rank} {name}").decode()
        except RuntimeError:
            # The store has died with torchrun.
            answer = f"{self.rank} {name}"
        rank, _, name = answer.partition(" ")
        return int(rank), name

    def break_off(self) -> None:
        # A device may be waiting for ranks that will not come.
        typing.cast(typing.Any, dist.group.WORLD).abort()
        if self.sharded:
            self._signals_heard = self.own_monitor.signals_heard
            self._hang_up()

    def _hang_up(self) -> None:
        """Closes the connections to the other ranks, which gloo's abort() does not."""
        store = int(os.environ["MASTER_PORT"])
        for fd in map(int, os.listdir("/dev/fd")):
            # Closed by now, or not connected.
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.fstat(fd).st_mode):
                    with socket.socket(fileno=os.dup(fd)) as connection:
                        ours = connection.family in (socket.AF_INET, socket.AF_INET6)
                        if ours and store not in (
                            connection.getpeername()[1],
                            connection.getsockname()[1],
                        ):
                            connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        dist.destroy_process_group()


def attempt(function: Callable, *arguments: object) -> tuple:
    """(result, error), one of them None, for another process."""
    try:
        return function(*arguments), None
    except UserError as error:
        return None, ("user", str(error))
    except SAVE_ERRORS as error:
        return None, (getattr(error, "errno", None), one_line(error))


def answered(answer: tuple) -> typing.Any:
    """The result of an attempt() elsewhere. Raises its UserError, or one of SAVE_ERRORS."""
    result, error = answer
    if error is not None and error[0] == "user":
        raise UserError(error[1])
    if error is not None:
        raise OSError(*error) if error[0] else RuntimeError(error[1])
    return result


# ---- main -------------------------------------------------------------------------------------


def main(
    train: Callable[[Run], None], argv: Sequence[str] | None = None, **options: typing.Any
) -> int:
    """Parses the command line, calls train(run), and ends the process with the run's exit code.

    Keyword arguments become options, or change the default of a common one; option(...) says more
    about one. With argv, in a notebook for instance, it returns the exit code instead.
    """
    end_process = argv is None
    try:
        code = trained(train, declared(options), argv)
    except SystemExit as end:
        # Of --help.
        code = end.code if isinstance(end.code, int) else 0
    except UserError as error:
        if is_first_rank():
            complain_of(error)
        code = 2
    if end_process:
        leave_process(code)
    return code


def trained(
    train: Callable[[Run], None], options: dict[str, Option], argv: Sequence[str] | None
) -> int:
    """Parses, trains and says how it ended; returns the exit code. Raises UserError."""
    about = train.__doc__ or sys.modules["__main__"].__doc__
    given = parse_options(options, argv, about)
    for fd in range(3):
        # A checkpoint must never become descriptor 1 or 2 because the parent has closed it.
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    screen = Screen(shown=is_first_rank())
    with contextlib.ExitStack() as stack:
        stack.callback(end_children)
        monitor = ExitMonitor(screen, is_first_rank() and not given.get("no_keyboard"))
        monitor.nothing_to_save = "Training has not begun: there is nothing to save."
        stack.enter_context(monitor)
        processes = ManyProcesses(monitor) if started_by_torchrun() else Processes(monitor)
        run = prepared(options, given, processes, screen)
        stack.callback(run.close)
        error = outcome(train, run)
        monitor.nothing_to_save = None
        if error is None:
            processes.close()
        # A signal or a q that comes only now takes away neither the last words nor the exit code.
        code = last_words(run, error)
    if argv is not None and run.rank == 0 and run.trains:
        # At the end of a process the lock goes with it, and not before.
        run.directory.close()
    return code


def prepared(options: dict[str, Option], given: dict, processes: Processes, screen: Screen) -> Run:
    """The run that the command line asks for, with the checkpoint that it goes on from."""
    directory = given.get("checkpoint_dir", os.path.abspath(options["checkpoint_dir"].default))
    resumed = checkpoint_to_resume(given.pop("resume", None), directory, processes, screen.say)
    given.pop("no_keyboard", None)
    path, state = resumed or (None, {})
    if path is not None:
        home = home_of(path)
        stored = state["config"] if isinstance(state["config"], dict) else {}
        if home == fallback_directory(str(stored.get("checkpoint_dir"))).resolve():
            home = stored["checkpoint_dir"]
        given.setdefault("checkpoint_dir", str(home))
    config = configuration(options, given, state.get("config"), path)
    if config.shard and not started_by_torchrun():
        if "shard" in given or resumed is None:
            raise UserError("--shard needs processes: scripts/train_torchrun.sh 2 --shard")
        # The checkpoint of a sharded run is one like any other.
        config.shard = False
    processes.sharded = config.shard
    try:
        return Run(config, processes, screen, resumed)
    except (LookupError, TypeError, ValueError) as error:
        text = f"{path}: not a checkpoint of this program ({one_line(error)})"
        raise CheckpointError(text) from error


def checkpoint_to_resume(
    name: str | None, directory: str, processes: Processes, report: Callable[[str], None]
) -> tuple[Path, dict] | None:
    """The checkpoint that --resume names, verified; None for a fresh start. Raises UserError."""

    def read(path: Path) -> dict:
        state = processes.read(path)
        version = state.get("format_version")
        numbered = type(version) is int
        if numbered and version == 1:
            raise CheckpointError(f"{path}: of the first edition, which this one does not read")
        wrong = [k for k, kind in Run.ENTRIES.items() if not isinstance(state.get(k), kind)]
        if not wrong and not re.fullmatch("[0-9a-f]{12}", state["run_id"]):
            wrong = ["run_id"]
        if wrong or version != Run.FORMAT_VERSION:
            what = ", ".join(wrong) or "format_version"
            raise CheckpointError(f"{path}: not a checkpoint of this program ({what})")
        return state

    if name is None:
        return None
    if name == "latest":
        paths = processes.first(lambda: [one.path for one in find_checkpoints(directory, report)])
        if not paths and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
            return None
        return first_whole(directory, read, report, paths)
    path = Path(os.path.abspath(name))
    # Path.exists() raises where a name is too long.
    if not os.path.exists(path):
        raise CheckpointError(
            f"{path}: No such file or directory; scripts/checkpoints.py lists them"
        )
    if path.is_dir() and (found := find_checkpoints(path, lambda text: None)):
        newest = os.path.relpath(found[0].path)
        raise CheckpointError(f"{path} is a directory of checkpoints; its latest is {newest}")
    return path, read(path)


def outcome(train: Callable[[Run], None], run: Run) -> BaseException | None:
    """Trains; returns the exception that ended it, if one has, once the state is safe."""
    try:
        train(run)
        run.end()
        return None
    except Leaving:
        return None
    except Exception as error:
        failure: BaseException = error
        if run.processes.sharded and not run.trained and (part := optimizer_in(error)):
            text = f"PyTorch cannot share out what {part} does ({one_line(error)})"
            failure = UserError(f"--shard: {text}")
        run.exit_code = 2 if isinstance(failure, UserError) else 1
    except SystemExit as end:
        failure = end
        run.exit_code = end.code if isinstance(end.code, int) else int(end.code is not None)
    saved = run.completed or isinstance(failure, UserError) and not run.trained
    if run.trains and not saved:
        run.leave_after_exception(failure)
    return failure


def optimizer_in(error: Exception) -> str | None:
    """The class in torch.optim, of an optimizer or an average, in whose code an error came up."""
    folder = os.path.dirname(torch.optim.__file__)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename.startswith(folder) and "self" in frame.f_locals:
            no_room = isinstance(error, (MemoryError, torch.OutOfMemoryError))
            return None if no_room else type(frame.f_locals["self"]).__name__
    return None


def last_words(run: Run, error: BaseException | None) -> int:
    """Prints how it ended, and leaves that in the lock file for stop.sh; returns the exit code."""
    screen, first = run.screen, is_first_rank()
    if isinstance(error, UserError) and not run.trained:
        raise error
    if error is None:
        if run.saved is not None and run.saved[0] != run.NEWEST:
            screen.say("🎉 All steps done!" if run.completed else "✨ Graceful exit completed!")
    elif run.processes.first_failure(type(error).__name__)[0] == run.rank:
        # No other rank can say more.
        if isinstance(error, UserError):
            complain_of(error)
        elif not isinstance(error, SystemExit):
            complain("".join(traceback.format_exception(error)))
    if run.trains:
        summary = run.summary()
        screen.say(summary)
        if first:
            # On a full disk scripts/stop.sh will know less.
            with contextlib.suppress(OSError):
                run.directory.write_outcome(f"{run.exit_code}\n{summary}\n")
    # A terminal that was stopped with Ctrl-S may take the last lines yet.
    screen.clear(wait=2.0)
    if error is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        # torchrun would start again what was asked to leave.
        return 0
    return run.exit_code


def choose_device(name: str) -> torch.device:
    """Raises UserError where the device is not there, or torch.distributed cannot use it."""
    present = torch.accelerator.current_accelerator(check_available=True)
    usable = ("cuda",) if started_by_torchrun() else ("cuda", "mps")
    if name == "auto":
        return present if present is not None and present.type in usable else torch.device("cpu")
    if name == "mps" and name not in usable:
        raise UserError("--device mps: torchrun's processes cannot use it; --device cpu")
    if name != "cpu" and (present is None or present.type != name):
        found = present.type if present else "only the CPU"
        raise UserError(f"--device {name}: there is none here (found {found})")
    return torch.device(name)


def leave_process(code: int) -> typing.NoReturn:
    """Ends the process. All is saved and said: a signal in the last moments changes nothing.

    Taking torch's modules apart would keep the accelerator's memory, and leave what is typed to
    the shell, for most of a second more.
    """
    for signum in EXIT_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        # Gone with the terminal, or closed.
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


# ---- The built-in program: text ---------------------------------------------------------------


def standard_library_files() -> list[Path]:
    """Python's own source, without installed packages and tests, which some distributions omit."""
    found: list[Path] = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
        subfolders[:] = set(subfolders) - left_out
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def data_files(paths: Sequence[str], left_out: Path) -> dict[str, tuple[Path, int]]:
    """{name: (file, size in bytes)} of every non-empty file in paths, folders in sorted order.

    Hidden files and what is below left_out are not data. Raises UserError for a path that is
    missing, unreadable or not a file or folder.
    """
    found: dict[str, tuple[Path, int]] = {}
    for path in map(Path, paths):
        file = path
        try:
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            for file in files or [path]:
                name = str(file.relative_to(path)) if file != path else file.name
                hidden = any(part.startswith(".") for part in Path(name).parts) and file != path
                if hidden or left_out in file.parents:
                    continue
                status = file.stat()
                if stat.S_ISREG(status.st_mode):
                    with open(file, "rb"):
                        if status.st_size:
                            found[name if name not in found else str(file)] = file, status.st_size
                elif file == path:
                    what = "an empty folder" if path.is_dir() else "not a file or folder"
                    raise UserError(f"--data {path}: {what}")
        except OSError as error:
            raise UserError(f"--data {file}: {error.strerror}") from error
    return found


class Corpus:
    """Files laid end to end, memory-mapped where they are read."""

    # Of a larger one, a fingerprint holds samples.
    SMALL_BYTES = 64 * 2**20

    def __init__(self, files: dict[str, tuple[Path, int]]) -> None:
        self.names = list(files)
        self.files = list(files.values())
        self.starts = list(itertools.accumulate((size for _, size in self.files), initial=0))

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, start: int, length: int) -> Tensor:
        """Bytes start to start + length, across the ends of files; uint8 of shape (length,)."""
        pieces = []
        number = bisect.bisect_right(self.starts, start) - 1
        while length:
            offset = start - self.starts[number]
            piece = self._mapped(number)[offset : offset + length]
            pieces.append(piece)
            start, length, number = start + len(piece), length - len(piece), number + 1
        return torch.cat(pieces)

    def _mapped(self, number: int) -> Tensor:
        # Not kept: a mapping costs 20 us, and a kept one counts all that was read as our memory.
        path, size = self.files[number]
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)

    def fingerprint(self) -> dict[str, str]:
        """{name: a digest of its content}; of more than 1,000 files a digest for each folder."""
        digests: dict[str, typing.Any] = {}
        for number, (name, (_, size)) in enumerate(zip(self.names, self.files)):
            label = name if len(self.names) <= 1000 else os.path.dirname(name) or "."
            digest = digests.setdefault(label, hashlib.blake2b(digest_size=8))
            digest.update(b"%d" % size)
            text = self._mapped(number)
            if len(self) <= self.SMALL_BYTES:
                digest.update(text.numpy())
            else:
                for sample in range(8):
                    start = sample * max(0, size - 4096) // 7
                    digest.update(text[start : start + 4096].numpy())
        return {label: digest.hexdigest() for label, digest in digests.items()}


class ByteDataset(torch.utils.data.Dataset):
    """Windows of a corpus: item i is bytes i * context and the context that follow it, uint8.

    A model predicts bytes 1 ... context from bytes 0 ... context - 1.
    """

    def __init__(self, corpus: Corpus, first: int, last: int, context: int) -> None:
        self.corpus, self.first, self.context = corpus, first, context
        self._windows = max(0, last - first - 1) // context

    def __len__(self) -> int:
        return self._windows

    def __getitem__(self, index: int) -> Tensor:
        return self.corpus.read(self.first + index * self.context, self.context + 1)

    def fingerprint(self) -> dict[str, str] | None:
        """Of the whole corpus, once."""
        return self.corpus.fingerprint() if self.first == 0 else None


def text_datasets(
    paths: Sequence[str], context: int, left_out: Path
) -> tuple[ByteDataset, ByteDataset]:
    """Training and validation data: the first 95 % of the files in paths, and the rest."""
    files = data_files(paths, left_out)
    if not paths:
        library = Path(sysconfig.get_path("stdlib"))
        found = standard_library_files()
        files = {str(file.relative_to(library)): (file, file.stat().st_size) for file in found}
        files = {name: (file, size) for name, (file, size) in files.items() if size}
    corpus = Corpus(files)
    split = len(corpus) - len(corpus) // 20
    training = ByteDataset(corpus, 0, split, context)
    validation = ByteDataset(corpus, split, len(corpus), context)
    if not len(training) or not len(validation):
        where = " ".join(paths) or "(the standard library)"
        raise UserError(
            f"--data {where}: {len(corpus):,} bytes are too few for --context {context}"
        )
    return training, validation


# ---- The built-in program: model --------------------------------------------------------------


MAX_ANGLE = math.pi / 4


class Attention(nn.Module):
    """Causal self-attention; (batch, context, dim) to the same shape."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.out(y.transpose(1, 2).flatten(-2))


def rotate_columns(weight: Tensor, angle: Tensor) -> Tensor:
    """weight @ R(angle), for weight (..., hidden, dim) and angle (..., planes) in radians.

    R is the product of the Givens rotations of the disjoint coordinate planes (i, i + planes), with
    planes <= dim / 2: it maps (x_i, x_j) to (x_i cos - x_j sin, x_i sin + x_j cos). Since
    (W R) x = W (R x), folding R into the weight rotates every input.
    """
    planes = angle.shape[-1]
    cos, sin = angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)
    sizes = [planes, planes, weight.shape[-1] - 2 * planes]
    first, second, rest = weight.split(sizes, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin, rest], dim=-1)


class Experts(nn.Module):
    """A softmax-routed mixture of two-layer MLPs that share 4 * dim hidden units.

    Every expert sees every token, weighted by its gate, so the mixture is two matrix products over
    all experts. With rotations, expert e sees its input through R_e with angles
    max_angle * tanh(theta_e), folded into its first weight: once a forward pass, at a cost that
    does not grow with the batch. `gates` (..., experts) and `rotated_by` (experts, dim // 2) are
    then the routing and the angles of the last pass: theta itself may be spread over processes.
    """

    def __init__(self, dim: int, experts: int, rotations: bool = True) -> None:
        super().__init__()
        hidden = 4 * dim // experts
        self.router = nn.Linear(dim, experts, bias=False)
        # Separate 2-D weights, not one 3-D tensor: Muon orthogonalizes matrices.
        w_in = (torch.randn(hidden, dim) * dim**-0.5 for _ in range(experts))
        w_out = (torch.randn(dim, hidden) * hidden**-0.5 for _ in range(experts))
        self.w_in, self.w_out = nn.ParameterList(w_in), nn.ParameterList(w_out)
        # Not zero: where all rotations are alike, the orthogonality loss has no slope.
        self.theta = nn.Parameter(0.1 * torch.randn(experts, dim // 2)) if rotations else None
        self.gates: Tensor | None = None
        self.rotated_by: Tensor | None = None

    def angles(self) -> Tensor:
        """(experts, dim // 2), radians."""
        assert self.theta is not None
        return MAX_ANGLE * self.theta.tanh()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, context, dim) to the same shape."""
        gates = self.router(x).softmax(dim=-1)
        w_in = torch.stack(list(self.w_in))
        if self.theta is not None:
            self.gates, self.rotated_by = gates, self.angles()
            w_in = rotate_columns(w_in, self.rotated_by)
        hidden = F.gelu(F.linear(x, w_in.flatten(0, 1))).unflatten(-1, (len(self.w_in), -1))
        hidden = (hidden * gates.unsqueeze(-1)).flatten(-2)
        return F.linear(hidden, torch.cat(list(self.w_out), dim=1))


class Block(nn.Module):
    """(batch, context, dim) to the same shape."""

    def __init__(self, dim: int, heads: int, experts: int, dropout: float, rotations: bool) -> None:
        super().__init__()
        self.norm_attention, self.norm_experts = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.attention = Attention(dim, heads, dropout)
        self.experts = Experts(dim, experts, rotations)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_attention(x)))
        return x + self.dropout(self.experts(self.norm_experts(x)))


class ByteLM(nn.Module):
    """A byte-level decoder-only Transformer whose feed-forward layers are mixtures of experts."""

    def __init__(
        self,
        context: int,
        layers: int,
        heads: int,
        dim: int,
        experts: int,
        dropout: float,
        rotations: bool,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(256, dim)
        self.position = nn.Embedding(context, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(dim, heads, experts, dropout, rotations) for _ in range(layers)
        )
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, 256, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (batch, context) int64 to logits (batch, context, 256)."""
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# ---- The built-in program: controllers --------------------------------------------------------


def orthogonality_loss(angles: Tensor) -> Tensor:
    """How alike the experts' rotations are: mean over e < f of (<R_e, R_f> / <R_e, R_e>)**2.

    <A, B> = trace(A^T B). Both are block diagonal in the same planes, so the quotient is
    mean_i cos(angle_ei - angle_fi). In [0, 1]; zero for a single expert. angles (experts, planes),
    radians.
    """
    count = len(angles)
    first, second = torch.triu_indices(count, count, offset=1, device=angles.device)
    if not len(first):
        return angles.new_zeros(())
    return (angles[first] - angles[second]).cos().mean(dim=-1).square().mean()


def rotation_efficiency_loss(angles: Tensor) -> Tensor:
    """mean((angle / max_angle)**2), in [0, 1): no more rotation than the task pays for."""
    return (angles / MAX_ANGLE).square().mean()


def specialization_loss(gates: Tensor, load: Tensor) -> Tensor:
    """(mean_t H(p_t) - H(load)) / log(experts), in [-1, 0]; H is the entropy.

    Minus the information a token has about its expert: low when each token is routed decisively
    while all experts share the load (regularized information maximization; Krause, Perona and
    Gomes, 2010). gates (..., experts), each row summing to 1; load (experts,) is their mean over
    the tokens of the batch.
    """
    if gates.shape[-1] == 1:
        return gates.new_zeros(())
    entropy = torch.special.entr(gates.float()).sum(dim=-1).mean()
    return (entropy - torch.special.entr(load).sum()) / math.log(gates.shape[-1])


def no_regularization() -> float:
    return 0.0


def forward_backward(
    model: nn.Module,
    loss: Callable[[typing.Any], Tensor],
    batch: typing.Any,
    grad_accum: int = 1,
    regularization: Callable[[], Tensor | float] = no_regularization,
) -> Tensor:
    """Adds the gradient of loss(batch) + regularization() to .grad; returns the mean of loss.

    A batch that is a tensor is taken in grad_accum forward passes; loss is a mean over samples.
    """
    parts = [batch] if grad_accum == 1 else batch.chunk(grad_accum)
    losses = []
    for part in parts:
        # Of many processes, the gradients meet in the last pass.
        alone = part is not parts[-1] and hasattr(model, "no_sync")
        with typing.cast(typing.Any, model).no_sync() if alone else contextlib.nullcontext():
            value = loss(part)
            ((value + regularization()) / len(parts)).backward()
            losses.append(value.detach())
    return torch.stack(losses).mean()


def cosine(progress: float) -> float:
    """Half a cosine, from 1 down to a tenth."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def cubic(progress: float) -> float:
    """From 1 down to 0.03, most of it early: only a lower rate averages out Muon's large steps."""
    return 0.03 + 0.97 * (1 - progress) ** 3


def warmup_decay(
    optimizer: Optimizer, warmup_steps: int, total_steps: int, decay: Callable[[float], float]
) -> LambdaLR:
    """A straight rise over warmup_steps, then decay(progress), progress from 0 to 1 at the end."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return decay(min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)))

    return LambdaLR(optimizer, factor)


class TrainingController:
    """Turns batches into optimizer steps. A subclass fills `optimizers` and `schedulers`.

    loss(batch) is the mean loss of a batch, a scalar; model is what run.model() returned. The
    options are those of the command line: lr, warmup_steps, weight_decay, grad_clip, grad_accum
    and rotation_lr, if they are there.
    """

    DEFAULTS = {
        "lr": 3e-3,
        "rotation_lr": 1e-2,
        "warmup_steps": 50,
        "weight_decay": 0.1,
        "grad_clip": 1.0,
        "grad_accum": 1,
    }

    def __init__(self, run: Run, model: nn.Module, loss: Callable[[typing.Any], Tensor]) -> None:
        self.run, self.model, self.loss = run, model, loss
        self.options = argparse.Namespace(**{**self.DEFAULTS, **vars(run.options)})
        self.optimizers: dict[str, Optimizer] = {}
        self.schedulers: dict[str, LRScheduler] = {}

    def regularization(self) -> Tensor | float:
        """What is added to the loss of the last forward pass."""
        return 0.0

    def training_step(self, batch: typing.Any) -> Tensor:
        """One step of every optimizer; returns the mean loss of the batch."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        accum = self.options.grad_accum
        loss = forward_backward(self.model, self.loss, batch, accum, self.regularization)
        self.run.clip_gradients(self.options.grad_clip)
        for optimizer in self.optimizers.values():
            optimizer.step()
        for scheduler in self.schedulers.values():
            scheduler.step()
        return loss


class StandardTrainingController(TrainingController):
    """One AdamW over all parameters, one warm-up and cosine schedule."""

    def __init__(self, run: Run, model: nn.Module, loss: Callable[[typing.Any], Tensor]) -> None:
        super().__init__(run, model, loss)
        o = self.options
        parameters = model.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=o.lr, weight_decay=o.weight_decay, fused=True)
        self.optimizers = {"adamw": optimizer}
        self.schedulers = {
            "adamw": warmup_decay(optimizer, o.warmup_steps, run.total_steps, cosine)
        }


def orthogonalize(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """The nearest (semi-)orthogonal matrix, roughly, to each of matrices (count, rows, columns).

    A quintic Newton-Schulz iteration whose singular values end near 1, not at it (Jordan et al.,
    "Muon", 2024). In bfloat16, or in float32 on a CPU without bfloat16 arithmetic, which would
    emulate it at a fraction of the speed.
    """
    a, b, c = coefficients
    emulated = matrices.is_cpu and not torch.cpu.get_capabilities().get("avx512_bf16")
    x = matrices.to(torch.float32 if emulated else torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class BatchedMuon(torch.optim.Muon):
    """torch.optim.Muon, its options and its state; all matrices of a shape go at once."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
                    if not self.state[parameter]:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            for shape, parameters in by_shape.items():
                scale = math.sqrt(max(1, shape[0] / shape[1]))
                self._update_all(parameters, group, group["lr"] * scale)

    def _update_all(self, parameters: list[Tensor], group: dict, lr: float) -> None:
        buffers = [local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        momentum = torch.stack(buffers)
        gradient = torch.stack([local(parameter.grad) for parameter in parameters])
        momentum.lerp_(gradient, 1 - group["momentum"])
        torch._foreach_copy_(buffers, list(momentum))
        update = gradient.lerp_(momentum, group["momentum"])
        newton_schulz = functools.partial(
            orthogonalize,
            coefficients=group["ns_coefficients"],
            steps=group["ns_steps"],
            eps=group["eps"],
        )
        if is_sharded(parameters[0]):
            update = on_whole_matrices(newton_schulz, update, parameters[0])
        else:
            update = newton_schulz(update)
        weights = [local(parameter) for parameter in parameters]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(update), alpha=-lr)


def local(tensor: typing.Any) -> Tensor:
    """Of a sharded tensor this process's part, in the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def on_whole_matrices(
    function: Callable[[Tensor], Tensor], rows: Tensor, parameter: typing.Any
) -> Tensor:
    """function of whole matrices for a rank that has some rows of each, as of parameter.

    Every rank computes all of it. rows (count, local rows, columns), and so the result.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, shape = parameter.device_mesh, torch.Size((len(rows), *parameter.shape))
    stride = torch.empty(shape, device="meta").stride()
    spread = DTensor.from_local(rows, mesh, [Shard(1)], run_check=False, shape=shape, stride=stride)
    result = DTensor.from_local(
        function(spread.full_tensor()), mesh, [Replicate()], run_check=False
    )
    return result.redistribute(placements=[Shard(1)]).to_local()


class GeometricTrainingController(TrainingController):
    """Geometric constrained learning: rotated experts, and an optimizer for each kind of parameter.

    loss = task + 0.01 orthogonality + 0.001 rotation_efficiency + 0.01 specialization, each
    averaged over the Experts of the model. `rotation`: Adam on their angles. `expert`: Muon (Jordan
    et al., 2024) on the 2-D matrices inside them or an nn.ModuleList. `embedding`: AdamW on the
    rest, the routers among it. Raises UserError for a model without tg.Experts that have rotations.
    """

    ORTHOGONALITY, ROTATION_EFFICIENCY, SPECIALIZATION = 0.01, 0.001, 0.01
    # Muon's learning rate relative to --lr, which is AdamW's.
    MUON_LR_FACTOR = 8.0

    def __init__(self, run: Run, model: nn.Module, loss: Callable[[typing.Any], Tensor]) -> None:
        super().__init__(run, model, loss)
        modules = list(model.modules())
        self.experts = [
            one for one in modules if isinstance(one, Experts) and one.theta is not None
        ]
        if not self.experts:
            raise UserError(
                "GeometricTrainingController: the model has no tg.Experts(dim, experts)"
            )
        groups = self._groups(modules)
        o, muon = self.options, self.MUON_LR_FACTOR
        self.optimizers = {
            "rotation": torch.optim.Adam(groups["rotation"], lr=o.rotation_lr, fused=True),
            # A step decays the weights by lr * weight_decay: as much as AdamW's does. Four
            # iterations instead of five: a fifth of Muon's time, and the loss falls as fast.
            "expert": BatchedMuon(
                groups["expert"], lr=muon * o.lr, ns_steps=4, weight_decay=o.weight_decay / muon
            ),
            "embedding": torch.optim.AdamW(
                groups["embedding"], lr=o.lr, weight_decay=o.weight_decay, fused=True
            ),
        }
        self.schedulers = {
            name: warmup_decay(optimizer, o.warmup_steps, run.total_steps, cubic)
            for name, optimizer in self.optimizers.items()
        }

    def _groups(self, modules: list[nn.Module]) -> dict[str, list[Tensor]]:
        angles: set[Tensor | None] = {one.theta for one in self.experts}
        inside: set[Tensor] = set()
        for module in modules:
            if isinstance(module, (nn.ModuleList, Experts)):
                inside.update(p for p in module.parameters() if p.dim() == 2)
        # What looks things up or chooses is no hidden layer.
        others: set[Tensor | None] = {m.weight for m in modules if isinstance(m, nn.Embedding)}
        others |= {m.router.weight for m in modules if isinstance(m, Experts)} | angles
        groups: dict[str, list[Tensor]] = {"rotation": [], "expert": [], "embedding": []}
        for parameter in self.model.parameters():
            kind = "expert" if parameter in inside - others else "embedding"
            groups["rotation" if parameter in angles else kind].append(parameter)
        return groups

    def regularization(self) -> Tensor:
        """The three geometric losses, weighted, averaged over the model's Experts."""
        routing = [typing.cast(Tensor, one.gates) for one in self.experts]
        loads = torch.cat([gates.float().flatten(0, -2).mean(dim=0) for gates in routing])
        # The value is that of all processes, the slope this one's, as for the rest of the loss.
        loads = loads + (self.run.average(loads.detach()) - loads.detach())
        total = torch.zeros((), device=loads.device)
        each = loads.split([gates.shape[-1] for gates in routing])
        for one, gates, load in zip(self.experts, routing, each):
            angles = typing.cast(Tensor, one.rotated_by)
            one.gates = one.rotated_by = None
            total = total + self.ORTHOGONALITY * orthogonality_loss(angles)
            total = total + self.ROTATION_EFFICIENCY * rotation_efficiency_loss(angles)
            total = total + self.SPECIALIZATION * specialization_loss(gates, load)
        return total / len(routing)


# ---- The built-in program: loops --------------------------------------------------------------


def standard_training_loop(
    run: Run,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    loss: Callable[[typing.Any], Tensor],
    evaluate: Callable[[typing.Any], dict],
) -> None:
    """Trains until all steps are done or somebody asks to leave; either way everything is saved."""
    for batch in run.batches(evaluate):
        optimizer.zero_grad()
        mean = forward_backward(model, loss, batch, run.options.grad_accum)
        run.clip_gradients(run.options.grad_clip)
        optimizer.step()
        scheduler.step()
        run.log(loss=mean)


def controller_training_loop(
    run: Run, controller: TrainingController, evaluate: Callable[[typing.Any], dict]
) -> None:
    """The same for any controller, which decides what an optimizer step on a batch is."""
    for batch in run.batches(evaluate):
        run.log(loss=controller.training_step(batch))


def train(run: Run) -> None:
    """Trains a byte-level language model on text."""
    o = run.options
    geometric = o.mode == "geometric"
    if geometric and o.loop == "standard":
        raise UserError(
            "--mode geometric needs --loop controller: the standard loop has one optimizer"
        )
    check_model(o, run.resumed)
    training, validation = text_datasets(o.data, o.context, Path(o.checkpoint_dir).resolve())
    run.data(training, validation, batch_size=o.batch_size * o.grad_accum)
    sizes = (o.context, o.layers, o.heads, o.dim, o.experts, o.dropout)
    try:
        model = run.model(ByteLM(*sizes, rotations=geometric))
    except (RuntimeError, MemoryError) as error:
        raise UserError(f"no memory for a model of this size ({one_line(error)})") from error

    def losses(windows: Tensor) -> Tensor:
        windows = windows.long()
        with run.autocast():
            logits = model(windows[:, :-1])
        # Nats a byte; (batch, context).
        flat = F.cross_entropy(
            logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none"
        )
        return flat.view(len(windows), -1)

    def loss(windows: Tensor) -> Tensor:
        return losses(windows).mean()

    def evaluate(windows: Tensor) -> dict[str, Tensor]:
        return {"loss": losses(windows).mean(dim=1)}

    kind = GeometricTrainingController if geometric else StandardTrainingController
    controller = kind(run, model, loss)
    run.keep(optimizers=controller.optimizers, schedulers=controller.schedulers)
    if geometric or o.loop == "controller":
        controller_training_loop(run, controller, evaluate)
    else:
        optimizer, scheduler = controller.optimizers["adamw"], controller.schedulers["adamw"]
        standard_training_loop(run, model, optimizer, scheduler, loss, evaluate)


def check_model(o: argparse.Namespace, resumed: Path | None) -> None:
    """Raises UserError for sizes that do not go together, or not with the checkpoint."""
    if o.dim % o.heads:
        raise UserError(f"--dim {o.dim} is not divisible by --heads {o.heads}")
    if o.mode == "geometric" and o.dim < 2:
        raise UserError(f"--mode geometric needs --dim 2 or more to rotate, not {o.dim}")
    if 4 * o.dim < o.experts:
        raise UserError(
            f"--experts {o.experts} is more than the {4 * o.dim} units of --dim {o.dim}"
        )
    # A forged one must not take memory before its weights are compared with the model's.
    at_least = o.dim * (512 + o.context + o.layers * (4 * o.dim + o.experts))
    if resumed is not None and 4 * at_least > resumed.stat().st_size:
        raise CheckpointError(f"{resumed}: too small for a model of its sizes")


OPTIONS = {
    "mode": option(
        "standard", "one AdamW, or rotated experts and three optimizers", ("standard", "geometric")
    ),
    "loop": option(None, "for --mode standard (default standard)", ("standard", "controller")),
    "data": option(
        (), "text files or folders (default Python's own source)", None, False, kind=Path
    ),
    "steps": option(2000, "optimizer steps in the whole run, resumes included", None, False, 1),
    "grad_accum": option(1, "forward passes that make one optimizer step", least=1),
    "context": option(128, "bytes the model sees at once", least=1),
    "layers": option(4, "Transformer blocks", least=1),
    "heads": option(4, "attention heads", least=1),
    "dim": option(128, "width of the model", least=1),
    "experts": option(4, "experts in each block", least=1),
    "dropout": option(0.0, "dropout probability", least=0, below=1),
    "lr": option(3e-3, "peak learning rate of AdamW", least=1e-12),
    "rotation_lr": option(1e-2, "peak learning rate of the rotations", least=1e-12),
    "warmup_steps": option(50, "steps over which the learning rate rises", least=0),
    "weight_decay": option(0.1, "decoupled weight decay", least=0, below=1),
    "grad_clip": option(1.0, "largest norm of the gradient", least=1e-12),
    "eval_batches": 16,
}


if __name__ == "__main__":
    main(train, None, **OPTIONS)
