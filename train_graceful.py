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
import datetime
import difflib
import errno
import fcntl
import functools
import gc
import hashlib
import io
import itertools
import json
import math
import mmap
import multiprocessing.resource_tracker
import multiprocessing.sharedctypes
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
import types
import uuid
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU
from typing import Any, BinaryIO, NamedTuple, NoReturn, TextIO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate


class UserError(Exception):
    """A mistake that the user can mend: main() prints it as one line and exits with code 2."""


class CheckpointError(UserError):
    """The file is not a checkpoint, is damaged, or does not fit this run."""


def one_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return text or type(error).__name__


# ---- Options ----------------------------------------------------------------------------------


class Option(NamedTuple):
    """An option of the command line: its type is that of the default, unless kind converts it.

    A fixed one cannot change when a run is resumed. Numbers are at least `least` and less than
    `below`; a tuple takes several values.
    """

    default: Any
    help: str = ""
    choices: tuple[str, ...] | None = None
    fixed: bool = True
    least: float = -math.inf
    below: float = 1e15
    kind: Callable[[Any], Any] | None = None

    def value(self, text: str) -> Any:
        """What a text on the command line stands for. Raises ArgumentTypeError, with the reason."""
        item = self.default[0] if isinstance(self.default, tuple) and self.default else self.default
        kind: Any = self.kind or (str if item in (None, ()) else type(item))
        try:
            value = kind(text)
        except ValueError:
            word = {int: "a whole number", float: "a number"}.get(kind, f"a {kind.__name__}")
            raise argparse.ArgumentTypeError(f"{text!r} is not {word}") from None
        if isinstance(value, (int, float)) and not self.least <= value < self.below:
            least = "" if self.least == -math.inf else f"{self.least:g} or more and "
            raise argparse.ArgumentTypeError(f"{text} is not {least}below {self.below:g}")
        if not text and self.default != "":
            raise argparse.ArgumentTypeError("an empty text")
        return value

    def add_to(self, group: argparse._ArgumentGroup, name: str) -> None:
        text = self.help.replace("%", "%%")
        if isinstance(self.default, bool):
            group.add_argument(flag(name), action=argparse.BooleanOptionalAction, help=text)
            return
        text += f" (default {self.default})" if self.default not in (None, ()) else ""
        several = "+" if isinstance(self.default, tuple) else None
        settings: dict[str, Any] = {"type": self.value, "choices": self.choices}
        group.add_argument(flag(name), **settings, nargs=several, help=text)


option = Option


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


DTYPES = "auto", "float32", "bfloat16"
COMMON_OPTIONS = {
    "steps": option(None, "batches in the whole run, resumes included", None, False, 1, kind=int),
    "epochs": option(None, "passes over the data, if they end earlier", None, False, 1, kind=int),
    "batch_size": option(16, "samples of a batch, over all processes", least=1),
    "workers": option(0, "processes that load the data", None, False, 0, 1025),
    "seed": option(0, "of the weights, the order of the data, augmentation, dropout", least=0),
    "device": option("auto", "where to train", ("auto", "cpu", "cuda", "mps"), False),
    "dtype": option("auto", "of autocast; auto: bfloat16 on CUDA, else float32", DTYPES, False),
    "compile": option(False, "run the models through torch.compile", fixed=False),
    "shard": option(False, "spread the models over torchrun's processes", fixed=False),
    "eval_every": option(100, "batches between evaluations", None, False, 1),
    "eval_batches": option(None, "of an evaluation (default all)", None, False, 1, kind=int),
    "save_every": option(500, "batches between periodic checkpoints", None, False, 1),
    "keep": option(3, "periodic checkpoints kept", None, False, 1),
    "log_every": option(10, "batches between rows of metrics.csv", None, False, 1),
    "checkpoint_dir": option("checkpoints", "where it saves", fixed=False, kind=os.path.abspath),
    "tensorboard": option(False, "also write event files for TensorBoard", fixed=False),
}
NOT_STORED = {
    "resume": option(None, "a checkpoint to go on from, or latest"),
    "keyboard": option(True, "listen to the keyboard"),
}


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = "--help lists the options"
        if unknown := re.match(r"unrecognized arguments: (--[^\s=]+)", message):
            if close := difflib.get_close_matches(unknown[1], self._option_string_actions, 1):
                hint = f"did you mean {close[0]}?"
        raise UserError(f"{message} ({hint})")


def declared(own: dict[str, Any]) -> dict[str, Option]:
    """The options of a program: the common ones, overlaid with main()'s keyword arguments."""
    options = dict(COMMON_OPTIONS)
    for name, value in own.items():
        if name in NOT_STORED:
            raise UserError(f"main({name}=...): that is for the command line alone")
        common = COMMON_OPTIONS.get(name)
        one = (
            value if isinstance(value, Option) else (common or Option(None))._replace(default=value)
        )
        if common is not None:
            # It keeps its type and bounds.
            kind = one.kind or common.kind or type(common.default)
            one = one._replace(kind=kind, least=max(one.least, common.least))
        try:
            default = mapped(one.default, savable)
            if common is not None and type(default) in (int, float, str):
                default = one.value(str(default))
        except (TypeError, argparse.ArgumentTypeError) as error:
            raise UserError(f"main({name}=...): {str(error).strip()}") from None
        default = tuple(default) if isinstance(default, list) else default
        options[name] = one._replace(default=default)
    return options


def parse_options(
    options: dict[str, Option], argv: Sequence[str] | None, about: str | None
) -> dict[str, Any]:
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
    options: dict[str, Option], given: dict[str, Any], stored: dict[str, Any], path: Path | None
) -> argparse.Namespace:
    """Defaults, overlaid with the configuration of a checkpoint, overlaid with what was given.

    Raises UserError for a fixed option that is given anew, CheckpointError for one that is unknown
    or has a value that it cannot have.
    """
    values = {name: one.default for name, one in options.items()}
    for name, value in stored.items():
        if name not in options:
            text = f"of another program, which has {flag(str(name))}; --checkpoint-dir can tell"
            raise CheckpointError(f"{path}: {text} the two apart")
        if type(value) in (int, float, str):
            try:
                options[name].value(str(value))
            except argparse.ArgumentTypeError as error:
                raise CheckpointError(f"{path}: {flag(name)}: {error}") from None
        if options[name].fixed and name in given and given[name] != value:
            here, there = f"{flag(name)} {given[name]}", f"{flag(name)} {value}: leave it out"
            raise UserError(f"{here} does not fit the checkpoint, whose run has {there}")
    return argparse.Namespace(**{**values, **stored, **given})


# ---- Terminal ---------------------------------------------------------------------------------

EXIT_SIGNALS = (SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU)
USER_REQUEST = "user_requested_graceful_exit"


def is_first_rank() -> bool:
    """Of torchrun's processes only the first one speaks."""
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


def in_foreground(fd: int) -> bool:
    """False only where fd is our controlling terminal and the shell has given it to another job."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        # Not a terminal, or not our controlling one: job control does not apply.
        return True


def typed_at_us(terminal: int) -> bool:
    """False where a shell has given the terminal to another job: that typing is not ours."""
    try:
        os.tcgetpgrp(terminal)
    except OSError:
        if dist.is_torchelastic_launched() and os.isatty(terminal) and shutil.which("ps"):
            # torchrun gave us a session of our own; it is the shell's job. + means the foreground.
            question = ["ps", "-o", "stat=", "-p", str(os.getppid())]
            return "+" in subprocess.run(question, capture_output=True, text=True).stdout
    return in_foreground(terminal)


@contextlib.contextmanager
def allowed_in_background() -> Iterator[None]:
    """Whoever touches the terminal from the background gets an error, and is not stopped."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTTIN, signal.SIGTTOU))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@allowed_in_background()
def complain(text: str) -> None:
    """On standard error, if anybody is there to read it."""
    with contextlib.suppress(OSError, AttributeError):
        print(text, end="", file=sys.stderr, flush=True)


def descriptor(stream: TextIO | None) -> int | None:
    """None for a stream that was closed by the parent or is no file, as in a notebook."""
    try:
        return None if stream is None else stream.fileno()
    except (OSError, ValueError):
        return None


class Screen:
    """Lines for people on standard output; a failed write never raises and never blocks training.

    It writes with os.write: text left in Python's own buffer by a failed flush would turn exit
    code 0 into 120.
    """

    def __init__(self, shown: bool = True) -> None:
        self._lock = threading.Lock()
        self._stream = sys.stdout if shown else None
        self._fd = descriptor(self._stream)
        self._encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        # Python answers LANG=C with UTF-8; who has set it has a terminal without symbols.
        locale = os.environ.get("LC_ALL") or os.environ.get("LANG")
        if locale in ("C", "POSIX") and not {"PYTHONUTF8", "PYTHONIOENCODING"} & os.environ.keys():
            self._encoding = "ascii"
        self.is_terminal = self._fd is not None and os.isatty(self._fd)
        self._status_width = 0
        self._unwritten = b""

    def say(self, text: str) -> None:
        """Prints a line, below whatever the status line showed last."""
        with self._lock:
            self._write(self._erase_status() + text + "\n")

    def status(self, parts: Sequence[str]) -> None:
        """Redraws the status line, on a terminal that is ours: the first of parts, as many as fit.

        Six columns stay free for what is typed and where a terminal would wrap.
        """
        if self._fd is None or not self.is_terminal or not in_foreground(self._fd):
            return
        # An OSError: the terminal has just gone.
        with self._lock, contextlib.suppress(OSError):
            columns = os.get_terminal_size(self._fd).columns or 80
            fitting = itertools.accumulate(parts, "{} | {}".format)
            lines = [text for text in fitting if len(text) <= columns - 6]
            text = (lines[-1] if lines else parts[0][: max(1, columns - 6)]) + " "
            # A line that is redrawn anyway is not worth keeping for later.
            if not self._unwritten:
                self._write("\r" + text.ljust(min(self._status_width, columns - 1)))
                self._status_width, self._unwritten = len(text), b""

    def clear(self, wait: float = 0.0) -> None:
        """Leaves no status line behind; a stopped terminal has so many seconds to take the rest."""
        with self._lock:
            self._write(self._erase_status(), wait)

    def _erase_status(self) -> str:
        erase = "\r" + " " * self._status_width + "\r" if self._status_width else ""
        self._status_width = 0
        return erase

    @allowed_in_background()
    def _write(self, text: str, wait: float = 0.0) -> None:
        if self._fd is None:
            if self._stream is not None:
                self._stream.write(text)
            return
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        # So much is kept for a terminal or a pipe that takes none right now.
        self._unwritten = (self._unwritten + text.encode(self._encoding, "replace"))[-65536:]
        try:
            while self._unwritten and select.select([], [self._fd], [], wait)[1]:
                written = os.write(self._fd, self._unwritten[: select.PIPE_BUF])
                self._unwritten = self._unwritten[written:]
        except OSError:
            # Hung up, closed or full: there is nobody to tell, and training matters more.
            self._unwritten = b""


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

    Children, DataLoader workers say, never reach it (see SignalsOfChildren). Raises ValueError
    when entered outside the main thread.
    """

    KEYS = "Keys: q + Enter saves and leaves, s + Enter saves"
    # Wakes the main thread out of a system call; by default it does nothing.
    WAKE = signal.SIGURG

    def __init__(self, screen: Screen | None = None, keyboard: bool = True) -> None:
        self.save_requested = False
        # What ? shows below the keys.
        self.describe: Callable[[], str] | None = None
        # Set where there is nothing to save: a request then ends the process with this line.
        self.nothing_to_save: str | None = None
        self.signals_heard = 0
        self.keyboard = keyboard
        self._screen = screen or Screen()
        self._stdin = -1
        self._listening = keyboard and descriptor(sys.stdin) is not None
        # What this process has heard, and what it acts on: of several, what all have agreed on.
        self.heard: list[tuple[str, int]] = []
        self.requests = self.heard
        self._lock = threading.Lock()
        self._last_interrupt = -math.inf
        self._interruptible = False
        self._typed = b""
        self._terminal_settings: list | None = None

    @property
    def exit_requested(self) -> bool:
        return bool(self.requests)

    @property
    def reason(self) -> str | None:
        return self.requests[0][0] if self.requests else None

    @property
    def exit_code(self) -> int:
        return self.requests[0][1] if self.requests else 0

    def __enter__(self) -> ExitMonitor:
        global signals_of_children
        with contextlib.ExitStack() as undo:
            pipes = [*os.pipe(), *os.pipe()]
            self._signal_pipe, self._wakeup, self._stop_pipe, self._stop = pipes
            for fd in pipes:
                undo.callback(os.close, fd)
            if self._listening:
                # A descriptor of our own, so that nobody closes it under select().
                self._stdin = open_keyboard(sys.stdin.fileno())
                undo.callback(os.close, self._stdin)
            os.set_blocking(self._wakeup, False)
            before_fd = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
            undo.callback(signal.set_wakeup_fd, before_fd)
            self._pid = os.getpid()
            if signals_of_children is None or signals_of_children.pid != self._pid:
                signals_of_children = SignalsOfChildren()
            before: dict[int, Any] = {
                signum: signal.getsignal(signum) or signal.SIG_DFL for signum in EXIT_SIGNALS
            }
            # nohup's promise.
            if before[SIGHUP] is signal.SIG_IGN:
                del before[SIGHUP]
            self._children = signals_of_children
            undo.enter_context(self._children.watched(before))
            for signum in (*before, self.WAKE):
                previous = signal.signal(signum, self._handler)
                undo.callback(signal.signal, signum, previous or signal.SIG_DFL)
            self._save_terminal()
            self._thread = threading.Thread(target=self._watch, name="exit-monitor", daemon=True)
            self._thread.start()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        # A forked child that leaves the block: all of this is its parent's.
        if os.getpid() != self._pid:
            return
        os.write(self._stop, b"x")
        self._thread.join()
        self._restore_terminal()
        self._undo.close()

    @contextlib.contextmanager
    def interruptible(self, at_once: bool) -> Iterator[None]:
        """In the main thread: a request raises Interrupted in the block, whatever it waits for.

        One that was there before does so where at_once is set.
        """
        self._interruptible = True
        try:
            if self.heard and at_once:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

    def request(self, reason: str, exit_code: int) -> None:
        """Asks for a graceful exit and says so on the screen; the same reason counts once."""
        with self._lock:
            if (reason, exit_code) in self.heard:
                return
            # Of torchrun's processes one that ends with code 0 would be waited for by the others.
            alone = exit_code or not dist.is_torchelastic_launched()
            if self.nothing_to_save is not None and alone:
                self._abandon(f"🛑 Exit requested. {self.nothing_to_save}", exit_code)
            if not self.heard:
                # Said before the main thread can know, whose next line must come after this one.
                self._screen.say("🛑 Exit requested! Finishing current batch gracefully...")
            self.heard.append((reason, exit_code))
        self.wake()

    def wake(self) -> None:
        """Ends the main thread's waiting in interruptible(), after a request."""
        if self.heard and self._interruptible:
            signal.pthread_kill(threading.main_thread().ident or 0, self.WAKE)

    def withdraw(self) -> None:
        """Takes the first request back, for a save that failed; one that came after it stays."""
        with self._lock:
            request = self.requests.pop(0)
            if request in self.heard:
                self.heard.remove(request)

    def hear(self, signum: int) -> None:
        """Turns a signal into a request; the second SIGINT ends the process."""
        self.signals_heard += 1
        if signum not in EXIT_SIGNALS:
            return
        self._children.tell(signum, time.monotonic())
        if signum == SIGINT:
            now, last = time.monotonic(), self._last_interrupt
            self._last_interrupt = now
            # Within half a second it is the same one: wrappers such as timeout deliver it twice.
            if last > -math.inf and now - last > 0.5:
                text = "🛑 Second Ctrl-C: leaving without saving. Earlier checkpoints are whole."
                self._abandon(text, 128 + SIGINT)
            if last == -math.inf and self.heard:
                self._screen.say("Leaving already. Ctrl-C once more leaves without saving.")
        self.request(f"signal_{signal.Signals(signum).name}", 128 + signum)

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

    @allowed_in_background()
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
            if self._stdin in ready and not typed_at_us(self._stdin):
                # fg sends no signal to a running job: look again.
                pause = 0.5
            elif self._stdin in ready and select.select([self._stdin], [], [], 0)[0]:
                self._read_keyboard()

    def _read_keyboard(self) -> None:
        self._save_terminal()
        try:
            data = os.read(self._stdin, 65536)
        except BlockingIOError:
            return
        except OSError:
            # EIO: the terminal has gone, or was given to another job this very moment.
            data = b""
        # An end of input that leaves a terminal is only Ctrl-D on an empty line.
        self._listening = bool(data) or os.isatty(self._stdin)
        *lines, typed = (self._typed + data).split(b"\n")
        # What is longer is no command.
        self._typed = typed[:4096] if data else b""
        commands = [line.strip().lower() for line in lines]
        if any(command in (b"q", b"quit", b"exit") for command in commands):
            self.request(USER_REQUEST, 0)
        elif b"s" in commands:
            self.save_requested = True
            self._screen.say("💾 Saving a checkpoint after this batch...")
        elif commands and not self.heard and os.isatty(self._stdin):
            # torchrun passes on no second Ctrl-C.
            alone = not dist.is_torchelastic_launched()
            self._screen.say(self.KEYS + ", a second Ctrl-C leaves without saving." * alone)
            if b"?" in commands and self.describe is not None:
                self._screen.say(self.describe())

    def _abandon(self, text: str, exit_code: int) -> NoReturn:
        """Ends the process here and now: the main thread may be inside a call of minutes."""
        self._screen.say(text)
        self._restore_terminal()
        end_children()
        os._exit(exit_code)

    def _save_terminal(self) -> None:
        # In the background it is in the shell's editing mode: that is not ours to remember.
        ours = self._listening and os.isatty(self._stdin) and in_foreground(self._stdin)
        if self._terminal_settings is None and ours:
            self._terminal_settings = termios.tcgetattr(self._stdin)

    @allowed_in_background()
    def _restore_terminal(self) -> None:
        if self._terminal_settings is None or not in_foreground(self._stdin):
            return
        # An error: hung up, no terminal is left to restore.
        with contextlib.suppress(termios.error):
            # TCSANOW: waiting for output to drain would hang on a terminal stopped with Ctrl-S.
            termios.tcsetattr(self._stdin, termios.TCSANOW, self._terminal_settings)
            # A q typed too many is not for the shell.
            termios.tcflush(self._stdin, termios.TCIFLUSH)


def open_keyboard(fd: int) -> int:
    """Of a terminal a descriptor that does not wait: around fg, the shell may read the line first.

    O_NONBLOCK on the descriptor that the shell has too would be the shell's trouble.
    """
    if os.isatty(fd):
        with contextlib.suppress(OSError):
            return os.open(os.ttyname(fd), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return os.dup(fd)


class SignalsOfChildren:
    """What signals do in the children of a process that an ExitMonitor watches.

    A terminal or a scheduler signals the whole group. A child leaves to its parent what the parent
    has heard too, within a second; else it does what it would without a monitor, so that
    terminate() ends it. Its handlers are Python's, which a program that it executes does not
    inherit (as it would an ignored or a blocked signal). What multiprocessing starts, in any of its
    ways, has them even if it is older than the monitor.
    """

    def __init__(self, heard: Any = None) -> None:
        # Whose it is; the parent's is not for a monitor in a child.
        self.pid = os.getpid() if heard is None else 0
        # The handlers whose place a monitor has taken, or this.
        self.before: dict[int, Any] = {}
        # When the parent last heard each signal, by number; at 0 stands how many monitors it has.
        self.heard = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("d") if heard is None else heard
        # The same for those that are not forked, in a file: made with the first of them.
        self._filed = heard

    def tell(self, number: int, value: float) -> None:
        for times in filter(None, (self.heard, self._filed)):
            times[number] = value

    def file(self) -> None:
        """Before a child is started that will not be forked."""
        if self._filed is None:
            # An error: there is no place for a file.
            with contextlib.suppress(OSError):
                self._filed = multiprocessing.sharedctypes.RawArray("d", signal.NSIG)
                self._filed[:] = self.heard[: signal.NSIG].tolist()

    def __reduce__(self) -> tuple:
        """In a child that was not forked its signals begin with this."""
        return begin_child, (self._filed,)

    @contextlib.contextmanager
    def watched(self, before: dict[int, Any]) -> Iterator[None]:
        """While a monitor has taken the place of these handlers."""
        outer, self.before = self.before, before
        self.tell(0, self.heard[0] + 1)
        try:
            yield
        finally:
            self.tell(0, self.heard[0] - 1)
            self.before = outer

    def in_child(self) -> None:
        for signum in EXIT_SIGNALS:
            handler = signal.getsignal(signum)
            if handler not in (None, signal.SIG_IGN):
                self.before.setdefault(signum, handler)
                signal.signal(signum, self._in_child)

    def _in_child(self, signum: int, frame: object) -> None:
        deadline = time.monotonic() + 0.5
        while self.heard[0] and time.monotonic() < deadline:
            if time.monotonic() - self.heard[signum] < 1:
                return
            # The parent's monitor may not have come to it yet, and nothing will tell.
            time.sleep(0.005)
        signal.signal(signum, self.before[signum])
        signal.raise_signal(signum)


# Made where first there may be something to tell.
signals_of_children: SignalsOfChildren | None = None
_forking = threading.local()


def before_fork() -> None:
    """Until a child's handlers are there, its signals wait."""
    if signals_of_children and signals_of_children.heard[0]:
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_SIGNALS)


def after_fork() -> None:
    if (mask := vars(_forking).pop("mask", None)) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def in_child() -> None:
    if signals_of_children and signals_of_children.heard[0]:
        # The pipe is the parent's.
        signal.set_wakeup_fd(-1)
        signals_of_children.in_child()
    after_fork()


def in_forked_child(_: object) -> None:
    """In one that multiprocessing has forked: the parent's monitor may come yet."""
    if signals_of_children:
        signals_of_children.in_child()


def begin_child(heard: Any) -> SignalsOfChildren:
    """In one that multiprocessing has started: by a fork of its server, or anew."""
    global signals_of_children
    signals_of_children = SignalsOfChildren(heard)
    signals_of_children.in_child()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_SIGNALS)
    return signals_of_children


def hand_signals_on(process: Any, workers: Any) -> None:
    """Makes multiprocessing's children, and PyTorch's among them, do as SignalsOfChildren says."""
    start, terminate = process.start, process.terminate
    set_handlers = workers._set_worker_signal_handlers

    def quiet_start(child: Any) -> None:
        global signals_of_children
        signals_of_children = child._signals = signals_of_children or SignalsOfChildren()
        if (child._start_method or multiprocessing.get_start_method()) == "fork":
            return start(child)
        signals_of_children.file()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_SIGNALS)
        try:
            # Starting it unblocks two of them.
            multiprocessing.resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_SIGNALS)
            # It begins without a handler, as does the server that forks it.
            return start(child)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def terminate_one(child: Any) -> None:
        # This one is meant for the child.
        if signals_of_children:
            signals_of_children.tell(SIGTERM, 0.0)
        terminate(child)

    def set_other_handlers() -> None:
        # PyTorch's handler for SIGTERM ends a worker whoever has sent it.
        handler = signal.getsignal(SIGTERM)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (SIGTERM,))
        set_handlers()
        if signals_of_children and callable(handler):
            signal.signal(SIGTERM, handler)
            # As PyTorch's does with what the parent has sent, at the end of a program say.
            signals_of_children.before[SIGTERM] = lambda *_: os._exit(0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    process.start, process.terminate = quiet_start, terminate_one
    workers._set_worker_signal_handlers = set_other_handlers


os.register_at_fork(before=before_fork, after_in_parent=after_fork, after_in_child=in_child)
multiprocessing.util.register_after_fork(in_forked_child, in_forked_child)
hand_signals_on(multiprocessing.process.BaseProcess, torch.utils.data._utils.signal_handling)


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
PLAIN_TYPES = {bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size}
# What the pickle of a tensor or a plain value refers to: nothing that grows.
PLAIN_GLOBALS = re.compile(
    r"__builtin__\.(complex|set)|collections\.(Counter|OrderedDict)|torch\.(Size|device|\w+Storage)"
    r"|torch\._utils\._rebuild_(parameter|tensor_v[23])|torch\.storage\.UntypedStorage"
)


class Record(NamedTuple):
    """A storage's bytes within a checkpoint: where they start, and where their CRC-32 stands."""

    start: int
    size: int
    crc: int
    crc_at: int


class Part(NamedTuple):
    """Some consecutive bytes of a record, by its number; data is uint8, 1-D, on any device."""

    record: int
    start: int
    data: Tensor


class Rows(NamedTuple):
    """What one of many processes has of a tensor: consecutive rows. In a checkpoint it is whole."""

    local: Tensor
    first: int
    shape: torch.Size


class OneWriter:
    """Who writes one checkpoint: this process. With StoreWriters many do, each with its Rows."""

    rank = 0
    on_several_machines = False

    def lead(self, function: Callable, *arguments: object) -> Any:
        """Calls function on rank 0; what it returns, or one of SAVE_ERRORS, is for all."""
        return function(*arguments)

    def each(self, function: Callable, *arguments: object) -> list:
        """Calls function on every rank; one of SAVE_ERRORS is for all, the results for rank 0."""
        return [function(*arguments)]


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
    write_checkpoint(*laid_out(state), Path(path), OneWriter())


def write_checkpoint(
    shown: dict, parts: Sequence[Part] | Exception, path: Path, writers: OneWriter
) -> None:
    """Writes what laid_out() has returned, or raises what it has raised in one of the writers.

    Raises one of SAVE_ERRORS, the same in all of them.
    """
    # Of this save alone: others may write the same path at the same time.
    token = writers.lead(lambda: uuid.uuid4().hex[:8])
    temporary = path.with_name(f".{path.stem}.{token}{path.suffix}.tmp")
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, f"{path} is a directory, pipe or device, no checkpoint")
    try:
        writers.lead(write_without_data, shown, temporary)
        shared = writers.on_several_machines
        checksums = writers.each(write_parts, parts, temporary, shared)
        writers.lead(publish, temporary, checksums, path, shared)
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

    def shown(value: Any) -> object:
        if isinstance(value, Rows):
            local, first, shape = value
            key = local.untyped_storage()._cdata
            start = first * math.prod(shape[1:]) * local.element_size()
            data = local.contiguous().flatten().view(torch.uint8)
            parts.setdefault(key, Part(len(parts), start, data))
            if key not in stand_ins:
                stand_ins[key] = stand_in(shape, local.dtype)
            return stand_ins[key]
        value = savable(value)
        if not isinstance(value, Tensor):
            return value
        key, data = value.untyped_storage()._cdata, storage_bytes(value)
        parts.setdefault(key, Part(len(parts), 0, data if rank == 0 else data[:0]))
        if value.is_cpu:
            return value
        if key not in stand_ins:
            stand_ins[key] = stand_in([len(data) // value.element_size()], value.dtype)
        return stand_ins[key].as_strided(value.shape, value.stride(), value.storage_offset())

    try:
        return mapped(state, shown), list(parts.values())
    except TypeError as error:
        raise TypeError(f"state{error}") from None
    except RecursionError:
        raise TypeError("state contains itself, or is nested too deeply") from None


def stand_in(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor that torch.save takes for one on the CPU, though it has no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype)


def storage_bytes(tensor: Tensor) -> Tensor:
    """All bytes of the memory that a tensor is a view of; uint8, 1-D."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def savable(value: Any) -> Any:
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


def mapped(state: Any, change: Callable[[Any], Any]) -> Any:
    """Nested dicts, lists and tuples with change(leaf) in the place of every leaf.

    What is there twice is changed once. Raises what change raises, a TypeError with the place in
    front of it ("['model'][0] is a ...").
    """
    known: dict[int, tuple[object, object]] = {}

    def visit(value: Any) -> Any:
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


def read_records(file: BinaryIO) -> list[Record]:
    """The storages of a checkpoint, by number. Raises ValueError or BadZipFile where it is none."""
    with zipfile.ZipFile(file) as archive:
        found, entry = {}, archive.start_dir
        for info in archive.infolist():
            if number := re.fullmatch("[^/]+/data/([0-9]+)", info.filename):
                header = os.pread(file.fileno(), 30, info.header_offset).ljust(30, b"\0")
                start = info.header_offset + 30 + sum(struct.unpack("<26x2H", header))
                found[int(number[1])] = Record(start, info.file_size, info.CRC, entry + 16)
            elif info.filename.endswith("/data.pkl") and info.file_size > PICKLE_BYTES:
                limit = f"{PICKLE_BYTES / 2**20:.0f} MiB"
                raise ValueError(f"more than {limit} of values beside its tensors")
            entry += 46 + len(info.orig_filename.encode()) + len(info.extra) + len(info.comment)
    return [found[number] for number in sorted(found)]


def write_parts(parts: Sequence[Part] | Exception, path: Path, shared: bool = False) -> list[int]:
    """Writes parts of records to their places and flushes them; returns what moved() returns.

    shared: other machines write theirs into the file at the same time.
    """
    if isinstance(parts, Exception):
        raise parts
    # Else a client of NFS may write a whole page, with what it has seen there of another machine's.
    synchronous = os.O_DSYNC if shared else 0
    with open(os.open(path, os.O_RDWR | synchronous), "r+b", buffering=0) as file:
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
            # On Linux this starts the write to the disk without waiting for it.
            drop_cached(file.fileno(), start, len(data))
            return crc

        checksums = moved(parts, write, records)
        flush_to_disk(file.fileno())
    return checksums


def drop_cached(fd: int, start: int, length: int) -> None:
    """Bytes of a file need not stay in memory; a length of 0 is all that follow."""
    with contextlib.suppress(AttributeError, OSError):
        os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)


def publish(
    temporary: Path, checksums: Sequence[list[int]], path: Path, shared: bool = False
) -> None:
    """Puts the checksums, of which each process knows its share, into the file; then its name."""
    with open(temporary, "r+b", buffering=0) as file:
        for record, shares in zip(read_records(file), zip(*checksums)):
            crc = functools.reduce(operator.xor, shares).to_bytes(4, "little")
            os.pwrite(file.fileno(), crc, record.crc_at)
            if record.size:
                # Behind the bytes torch has written a signature and, again, the checksum.
                os.pwrite(file.fileno(), crc, record.start + record.size + 4)
        flush_to_disk(file.fileno())
        if shared:
            # A client may keep what it has read before the other machines wrote.
            drop_cached(file.fileno(), 0, 0)
    os.replace(temporary, path)
    flush_names(path.parent)


def moved(
    parts: Sequence[Part], move: Callable[[Part], int], records: Sequence[Record]
) -> list[int]:
    """Reads or writes parts piece by piece, in threads; move(piece) returns its CRC-32.

    Returns what each record's CRC-32 owes to these parts: XORed over all of them, it is its own.
    """
    # What one thread takes at a time: many small pieces, or a part of a large one.
    tasks: dict[int, list[Part]] = {}
    done = 0
    for record, start, data in parts:
        for first in range(0, len(data), PIECE_BYTES):
            piece = Part(record, start + first, data[first : first + PIECE_BYTES])
            tasks.setdefault(done // PIECE_BYTES, []).append(piece)
            done += len(piece.data)
    checksums = [0] * len(records)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        # After an error those that have not begun are dropped.
        run = threads.map if len(tasks) > 1 else map
        for task in run(lambda pieces: [(piece, move(piece)) for piece in pieces], tasks.values()):
            for piece, crc in task:
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
    """Makes the names in folders as durable as the files."""
    for folder in folders:
        # One that takes files may still not be opened.
        with contextlib.suppress(PermissionError):
            fd = os.open(folder, os.O_RDONLY)
            try:
                flush_to_disk(fd)
            finally:
                os.close(fd)


def flush_to_disk(fd: int) -> None:
    """fsync, where the file system knows how to; on macOS the call that goes beyond the cache."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        # A file system without it still has fsync.
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


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


def check_records(file: BinaryIO) -> None:
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
        # An attribute that calls a record a folder makes torch return memory it never filled.
        strange = any(record.compress_type or record.external_attr for record in records)
        if not (folder.strip(".") and well_named and unique) or strange:
            raise ValueError("its records are not torch.save's")
        if sum(record.file_size for record in records) > os.fstat(file.fileno()).st_size:
            raise ValueError("its records lie upon each other")
        read_records(file)
        for record in records:
            if "/data/" not in record.filename:
                # Raises where its checksum is wrong.
                archive.read(record)
        for opcode, argument, _ in pickletools.genops(archive.read(f"{folder}/data.pkl")):
            if opcode.name == "GLOBAL":
                name = str(argument).replace(" ", ".")
                dtype = isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)
                if not dtype and not PLAIN_GLOBALS.fullmatch(name):
                    raise ValueError(f"it refers to {name}")


class CheckpointReader:
    """An open checkpoint: `state`, with tensors on the meta device, which have no bytes yet.

    whole() and rows() return tensors that read() fills, all at once and in several threads.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.records = file, read_records(file)
        self._numbers = {record.start: number for number, record in enumerate(self.records)}
        self._parts: list[Part] = []
        self._storages: dict[int, torch.UntypedStorage] = {}
        file.seek(0)
        self.state = torch.load(file, map_location="meta", weights_only=True)
        if not isinstance(self.state, dict):
            raise ValueError(f"holds a {type(self.state).__name__}")
        mapped(
            self.state,
            lambda leaf: self._number(leaf) if isinstance(leaf, Tensor) else savable(leaf),
        )

    def _number(self, tensor: Tensor) -> int:
        """Of a tensor's record. Raises ValueError where the tensor claims more than is there."""
        storage: Any = tensor.untyped_storage()
        number = self._numbers.get(storage._checkpoint_offset)
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
    for number, (record, shares) in enumerate(zip(records, zip(*checksums))):
        if functools.reduce(operator.xor, shares) != record.crc:
            raise CheckpointError(f"{path}: damaged checkpoint (record data/{number})")


def host_copy(parts: Sequence[Part], kept: dict[int, Tensor]) -> list[Part]:
    """Parts with their data copied to host memory, which kept holds for the next copy."""
    copies = []
    for number, part in enumerate(parts):
        size, pinned = len(part.data), part.data.is_cuda
        if number not in kept or len(kept[number]) != size:
            kept[number] = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        copies.append(part._replace(data=kept[number].copy_(part.data)))
    return copies


# ---- The checkpoint directory -----------------------------------------------------------------


class Found(NamedTuple):
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
            run_id, saved_at = str(state["run_id"]), str(state["saved_at"])
            session, step = int(state["metrics"]["sessions"]), int(state["step"])
        except CheckpointError as error:
            report(f"⚠️ Skipped {error}")
        except (LookupError, TypeError, ValueError):
            report(f"⚠️ Skipped {path}: not a checkpoint of this program")
        else:
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
    read: Callable[[Path], Any],
    report: Callable[[str], None],
    paths: Sequence[Path] | None = None,
) -> tuple[Path, Any]:
    """The first of paths (by find_checkpoints) that read takes, and what it returns."""
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

    def __init__(self, save: Callable[..., Path], report: Callable[[str], None]) -> None:
        self._save, self._report = save, report
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._pending: Future | None = None
        self._kept: dict[int, Tensor] = {}
        # The best state, if it could not be saved: the copy that is kept is still of it.
        self._missed: tuple | None = None

    def submit(self, lay_out: Callable[[], tuple[dict, Any]], targets: dict[str, str]) -> None:
        """Saves the state as it is now to every target {exit_reason: name}; failures are reported.

        lay_out() is laid_out() of the state.
        """
        self.wait()
        shown: dict = {}
        try:
            shown, parts = lay_out()
            parts = host_copy(parts, self._kept)
        except SAVE_ERRORS as error:
            # Its memory is not worth keeping either. With many writers all hear of it.
            parts, self._kept = error, {}
        self._pending = self._thread.submit(self._write, shown, parts, targets)

    def _write(self, shown: dict, parts: Sequence[Part], targets: dict[str, str]) -> None:
        for reason, name in targets.items():
            try:
                path = self._save({**shown, "exit_reason": reason}, parts, name)
                if reason == "user_requested_save":
                    self._report(f"✅ Checkpoint saved: {path}")
            except SAVE_ERRORS as error:
                self._report(f"⚠️ {name} not saved: {one_line(error)}. Training goes on.")
                if reason == "best" and not isinstance(parts, Exception):
                    self._missed = shown, parts, {reason: name}

    def wait(self) -> None:
        """Returns when nothing is being written any more. What is best gets another chance."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
        if missed := self._missed:
            self._missed = None
            self._write(*missed)

    def close(self) -> None:
        self._thread.shutdown()


class RunDirectory:
    """One run's hold on a checkpoint directory: the lock, and the names that are free for it.

    The lock (fcntl.lockf, which no child inherits) is held until the process is gone; where the
    file system has none, report says so. Raises OSError where the directory cannot be written, or
    belongs to a run that is alive.
    """

    def __init__(self, path: Path, run_id: str, report: Callable[[str], None]) -> None:
        self.path, self.run_id = path, run_id
        self._own: set[Path] = set()
        self._report, self._lock_file = report, -1
        self.hold()
        for leftover in (*path.glob(".*.tmp"), *path.glob("emergency_exit/.*.tmp")):
            # Of a killed run; in the way of nothing.
            with contextlib.suppress(OSError):
                leftover.unlink()
        steps = {file: re.fullmatch(r"step_(\d+)(_\d+)?\.pt", file.name) for file in path.iterdir()}
        own = sorted((int(m[1]), file) for file, m in steps.items() if m and self._is_own(file))
        self._periodic = [file for _, file in own]

    def hold(self) -> None:
        """Makes the directory and takes its lock: at first, and where somebody has deleted it."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._lock_file), os.stat(self.path / "run.lock")):
                return
        self.path.mkdir(parents=True, exist_ok=True)
        lock_file = os.open(self.path / "run.lock", os.O_RDWR | os.O_CREAT, 0o666)
        self._lock(lock_file)
        self._lock_file = lock_file
        self.write_outcome("")

    def _lock(self, lock_file: int) -> None:
        try:
            fcntl.lockf(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                text = f"no locks there ({error.strerror}); see to it that no other run uses it"
                self._report(f"⚠️ {self.path}: {text}")
                return
            words = os.pread(lock_file, 256, 0).decode(errors="replace").split()
            pid, host = (words + ["unknown", "unknown"])[:2]
            os.close(lock_file)
            text = f"in use by another run (pid {pid} on {host}): stop it, or give this one another"
            raise OSError(errno.EBUSY, text) from None

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
                break
            path = first.with_name(f"{first.stem}_{number}{first.suffix}")
        self._own.add(path)
        return path

    def prune(self, newest: Path, keep: int) -> None:
        """Deletes this run's oldest periodic checkpoints beyond keep; newest is on the disk."""
        self._periodic = [path for path in self._periodic if path != newest] + [newest]
        for path in self._periodic[:-keep]:
            # What cannot be deleted now is tried again after the next save.
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                self._periodic.remove(path)

    def _is_own(self, path: Path) -> bool:
        # A pipe would be waited for.
        if not path.is_file():
            return False
        with contextlib.suppress(OSError), open(path, "rb") as file:
            # It comes early: this stays cheap with many files.
            return self.run_id.encode() in file.read(4096)
        return False

    def close(self) -> None:
        os.close(self._lock_file)


class Metrics:
    """metrics.csv: a row every --log-every batches, the run's id in its last column.

    Another run's file is left alone: metrics_2.csv, say, is this one's. When a run goes on, rows
    after `step` are left out, for they come again; those of a run from elsewhere come along. A
    row that cannot be written (a full disk, say) waits for the next one.
    """

    def __init__(self, directory: Path, run_id: str, step: int, old_directory: Path) -> None:
        self.run_id = run_id
        self.columns: list[str] = []
        self._lock = threading.Lock()
        self._waiting: list[dict] = []
        # The file is to be written as a whole: a new one, or one with a new column.
        self._anew = False
        for number in itertools.count(1):
            self.path = directory / ("metrics.csv" if number == 1 else f"metrics_{number}.csv")
            rows = self._rows(self.path)
            if rows or not self.path.exists():
                break
        if not rows:
            elsewhere = map(self._rows, sorted(old_directory.glob("metrics*.csv")))
            rows = next(filter(None, elsewhere), [])
        if rows:
            self.columns, self._anew = list(rows[0]), True
            self._waiting = [row for row in rows if int(row["step"]) <= step]
            self._write()

    def _rows(self, path: Path) -> list[dict]:
        """The rows of this run; none where the file is another's, or was made so by a person."""
        try:
            # A pipe would be waited for; -sig: a spreadsheet leaves a mark at the beginning.
            name = path if path.is_file() else os.devnull
            with open(name, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
                # Python 3.10 would stumble over a NUL.
                rows = list(csv.DictReader(line.replace("\0", "") for line in file))
        except (OSError, csv.Error):
            return []
        mine = [row for row in rows if row.get("run") == self.run_id and None not in row]
        return [row for row in mine if re.fullmatch("[0-9]{1,18}", row.get("step") or "")]

    def row(self, values: dict[str, object]) -> None:
        """Adds a row. A value that comes late gets a column, empty in the rows before."""
        with self._lock:
            if late := [name for name in values if name not in self.columns]:
                self.columns = [*self.columns[:-1], *late, "run"]
                if not self._anew:
                    self._waiting, self._anew = [*self._rows(self.path), *self._waiting], True
            self._waiting.append({**values, "run": self.run_id})
            # It waits.
            with contextlib.suppress(OSError):
                self._write()

    def _write(self) -> None:
        """Writes the rows that wait, all or none. Raises OSError."""
        anew = self._anew or not self.path.exists()
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore", lineterminator="\n")
        if anew:
            writer.writeheader()
        writer.writerows(self._waiting)
        encoded = text.getvalue().encode(errors="surrogateescape")
        path = self.path.with_name(f".{self.path.name}.tmp") if anew else self.path
        with open(path, "wb" if anew else "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if file.write(encoded) < len(encoded):
                file.truncate(size)
                raise OSError(errno.ENOSPC, "no room for the rows of metrics.csv")
        if anew:
            os.replace(path, self.path)
        self._waiting, self._anew = [], False

    def flush(self) -> None:
        """To the disk. Raises OSError where it refuses: no checkpoint is ahead of its rows."""
        with self._lock:
            if self._waiting:
                self._write()
            if self.path.exists():
                with open(self.path, "rb") as file:
                    flush_to_disk(file.fileno())


# ---- The order of the data --------------------------------------------------------------------


def seed_generators(*what: object, device: str = "cpu", own: Sequence = ()) -> None:
    """Seeds torch, random, numpy and own generators with what follows from what alone."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1
    # With the devices' generators torch takes a hundred times as long.
    (torch.default_generator if device == "cpu" else torch).manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    for number, one in enumerate(own, seed + 1):
        if isinstance(one, np.random.Generator):
            one.bit_generator.state = type(one.bit_generator)(number).state
        else:
            getattr(one, "manual_seed", one.seed)(number & 0xFFFFFFFF)


def generators_in(*roots: object) -> list:
    """The random generators that datasets, and what they consist of, have of their own."""
    kinds = random.Random, np.random.RandomState, np.random.Generator, torch.Generator
    found, seen, left = [], dict[int, object](), list(roots)
    # Large collections are data.
    while left and len(seen) < 10_000:
        value = left.pop()
        if id(value) in seen or isinstance(value, (type, types.ModuleType)):
            continue
        seen[id(value)] = value
        if isinstance(value, kinds):
            found.append(value)
        elif isinstance(value, (list, tuple, dict)) and len(value) <= 1000:
            left += value.values() if isinstance(value, dict) else value
        elif type(value).__dictoffset__ and not isinstance(value, Tensor):
            left += vars(value).values()
    return found


def shuffled(indices: np.ndarray, n: int, key: bytes) -> np.ndarray:
    """The images of indices under a permutation of range(n) that depends on key alone.

    They are found without listing the permutation, by four rounds of a generalized Feistel network
    on the pairs of numbers below a and b, a * b >= n, walked until it is back below n (Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). The rounds mix as SplitMix64 does
    (Steele, Lea and Flood, 2014).
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    left, right = np.divmod(indices.astype(np.uint64), np.uint64(b))
    keys = np.frombuffer(hashlib.blake2b(key, digest_size=32).digest(), "<u8")
    for round_key, size in zip(keys, np.array([a, b, a, b], np.uint64)):
        mixed = (right ^ round_key) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ mixed >> np.uint64(32)) * np.uint64(0x94D049BB133111EB)
        left, right = right, (left + (mixed ^ mixed >> np.uint64(32)) % size) % size
    images = left * np.uint64(b) + right
    outside = images >= n
    if outside.any():
        images[outside] = shuffled(images[outside], n, key)
    return images


class Batches(Dataset):
    """The batches of a run, of which this process has every world_size-th sample.

    Item ("training", step) is the batch after so many; it is a function of seed and step alone, so
    nothing has to be replayed to go on at any of them. Item ("validation", n) is batch n of an
    evaluation. An item is (its key, the collated samples, how many of them count).
    """

    def __init__(
        self, training, validation, collate, batch_size, options, rank, world_size
    ) -> None:
        self.training, self.validation = training, validation
        self.collate = collate or default_collate
        self.batch_size, self.seed = batch_size, options.seed
        self.rank, self.world_size = rank, world_size
        self.per_epoch = len(training) // batch_size
        self.generators = generators_in(training, validation, collate)
        self.validated = len(validation) if validation is not None else 0
        if options.eval_batches is not None:
            self.validated = min(self.validated, options.eval_batches * batch_size)
        self.per_evaluation = -(-self.validated // batch_size)

    def __getitem__(self, key: tuple[str, int]) -> tuple[tuple[str, int], Any, int]:
        split, number = key
        if split == "training":
            data, (epoch, number) = self.training, divmod(number, self.per_epoch)
            places = self._places(number, len(data))
            indices = shuffled(places, len(data), b"%d %d" % (self.seed, epoch)).tolist()
        else:
            data, epoch = self.validation, -1
            # Evenly spread. Without a sample of its own a rank computes one all the same: every
            # rank makes as many forward passes.
            places = self._places(number, self.validated)
            indices = (places * len(data) // self.validated).tolist()
        samples = []
        for index in indices or [0]:
            seed_generators(self.seed, epoch, index, own=self.generators)
            samples.append(data[index])
        seed_generators(self.seed, "collate", key, self.rank, own=self.generators)
        return key, self.collate(samples), len(indices)

    def _places(self, number: int, end: int) -> np.ndarray:
        """Where this rank's samples of batch number stand among so many."""
        first = number * self.batch_size
        return np.arange(first + self.rank, min(first + self.batch_size, end), self.world_size)


def begin_worker(number: int) -> None:
    """In a worker."""
    # For the thread that hands tensors over: leaving may interrupt the parent in the middle of one.
    sys.excepthook = lambda *error: None
    if multiprocessing.get_start_method() == "fork":
        return

    def end_with_parent() -> None:
        # Its parent is the forkserver, for torch; this is the process that trains.
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


class Loader:
    """One loader for a whole run, evaluations included: its workers start once.

    It draws training batches ahead; those that come before a validation batch that was asked for
    wait until it is their turn.
    """

    # Without a batch for so many seconds, the workers that have died or stand still are named.
    PATIENCE = 30.0

    def __init__(
        self, batches: Batches, workers: int, step: int, pin: bool, report: Callable[[str], None]
    ) -> None:
        self._next = step
        self._wanted: collections.deque[int] = collections.deque()
        self._early: collections.deque = collections.deque()
        self._report = report
        self._waiting_since = math.inf
        self._closed = threading.Event()
        loader = DataLoader(
            batches,
            batch_size=None,
            sampler=self._keys(),
            num_workers=workers,
            pin_memory=pin,
            # They are collated already: an item is a tuple.
            collate_fn=tuple,
            worker_init_fn=begin_worker,
            # Its own: the default one is the loop's.
            generator=torch.Generator(),
        )
        others, on_child = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
        if workers:
            # Made here, it is the workers' too, and is removed however they end.
            multiprocessing.util.get_temp_dir()
        self._items = iter(loader)
        # torch's handler raises wherever the main thread is when a worker dies, in the middle of
        # an optimizer step too; without it the loader says so at the next batch.
        signal.signal(signal.SIGCHLD, on_child)
        self._workers = [one for one in multiprocessing.active_children() if one not in others]
        threading.Thread(target=self._watch, name="loader-watch", daemon=True).start()

    def _keys(self) -> Iterator[tuple[str, int]]:
        while True:
            if self._wanted:
                yield "validation", self._wanted.popleft()
            else:
                yield "training", self._next
                self._next += 1

    def training(self) -> Any:
        """The next training batch."""
        return (self._early.popleft() if self._early else self._get("training"))[1]

    def validation(self, number: int, count: int) -> tuple[Any, int]:
        """Batch number of an evaluation of count batches, and how many of its samples count."""
        if number == 0:
            self._wanted.extend(range(count))
        return self._get("validation")[1:]

    def _get(self, split: str) -> Any:
        self._waiting_since = time.monotonic()
        try:
            while (item := next(self._items))[0][0] != split:
                self._early.append(item)
            return item
        finally:
            self._waiting_since = math.inf

    def _watch(self) -> None:
        named, pause = math.inf, self.PATIENCE
        while not self._closed.wait(pause):
            since, pause = self._waiting_since, self.PATIENCE
            if since != named and since < math.inf:
                left = since + self.PATIENCE - time.monotonic()
                if left > 0:
                    pause = left
                else:
                    named = since
                    self._report(f"⚠️ No batch for {pause:.0f} s: {self._state_of_workers()}.")

    def _state_of_workers(self) -> str:
        states = [
            f"worker {worker.pid} stands still or is slow"
            if worker.is_alive()
            else f"worker {worker.pid} has died (exit code {worker.exitcode})"
            for worker in self._workers
        ]
        return ", ".join(states) or "the dataset is slow or stands still"

    def close(self) -> None:
        self._closed.set()
        for worker in self._workers:
            worker.kill()
            worker.join()


def difference(saved: list, own: list) -> str | None:
    """What tells two datasets, [length, fingerprint()], apart; None for the same data."""
    (length, there), (here_length, here) = saved, own
    if isinstance(there, dict) and isinstance(here, dict):
        # Files by name: the same ones may lie elsewhere.
        if list(there.values()) == list(here.values()):
            return None
        changes = {
            "added": sorted(here.keys() - there.keys()),
            "removed": sorted(there.keys() - here.keys()),
            "changed": [name for name in there if name in here and there[name] != here[name]],
        }
        some = [
            f"{word}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
            for word, names in changes.items()
            if names
        ]
        return "; ".join(some) or "in another order"
    if length != here_length:
        return f"{length:,} samples then, {here_length:,} now"
    return None if there == here else "their fingerprints differ"


# ---- The run ----------------------------------------------------------------------------------


class Progress(NamedTuple):
    """What follows from the batches so far; a checkpoint holds it. Nothing changes in place."""

    step: int = 0
    best: dict = {"value": None, "step": 0, "of": None}
    evaluation: dict = {"values": {}, "step": -1}
    # `sums` and `counts` are of what was logged since the last row of metrics.csv; what was due up
    # to `done_step` (an evaluation, a save) is done.
    metrics: dict = dict(sums={}, counts={}, smooth_loss=None, seconds=0.0, sessions=0, done_step=0)


class Boundary(NamedTuple):
    """The last point at which all of the state was of one step."""

    progress: Progress
    # Each buffer of the models, and a copy.
    buffers: list[tuple[Tensor, Tensor]]
    # Schedulers and GradScalers, which an exception may leave one step ahead.
    small: list[tuple[Any, dict]]


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

    def __init__(
        self,
        options: argparse.Namespace,
        processes: Processes,
        screen: Screen,
        resumed: tuple[Path, dict] | None,
    ) -> None:
        self.options, self.processes, self.screen = options, processes, screen
        self.monitor = processes.monitor
        self.rank, self.world_size = processes.rank, processes.world_size
        self.device = choose_device(options.device)
        self.resumed: Path | None = resumed[0] if resumed else None
        # The options of the checkpoint that are not the defaults of today.
        self.differs = ""
        self._state: dict = resumed[1] if resumed else {}
        self.run_id = self._state.get("run_id", uuid.uuid4().hex[:12])
        self.progress = Progress(*(self._state[key] for key in Progress._fields if resumed))
        self._boundary = Boundary(self.progress, [], [])
        config = self._state.get("config", {})
        # The same run with another length.
        lengths = (config.get(k) != vars(options)[k] for k in ("steps", "epochs"))
        self._stretched = resumed is not None and any(lengths)
        self.completed = self._state.get("exit_reason") == "completed"
        self.exit_code = 0
        # What the summary calls the last save, and where it is.
        self.saved: tuple[str, Path] | None = None
        self._models: dict[str, tuple[nn.Module, nn.Module]] = {}
        kinds = "scheduler_state_dicts", "state_dicts", "optimizer_state_dicts"
        self._kept: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
        self._batches: Batches | None = None
        self._loader: Loader | None = None
        self._writer: CheckpointWriter | None = None
        # The loop has begun; it trains; a batch is complete; its body has a batch, has stepped.
        self._began = self.trains = self.trained = self._in_body = self._stepped = False
        # Of the batch at hand.
        self._steppers: set[Optimizer] = set()
        # {name: (sum, count)} of what the batch at hand has logged.
        self._logged: dict[str, tuple[float, int]] = {}
        self._last_save: tuple[str, float] | None = None
        self._undo = contextlib.ExitStack()
        if self.device.type == "cuda":
            # Bit for bit needs kernels that add in a fixed order.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        self._seed("start")

    def _seed(self, *what: object) -> None:
        seed_generators(self.options.seed, *what, device=self.device.type)

    # What train(run) uses before the loop.

    def data(
        self,
        training: Any,
        validation: Any = None,
        collate: Callable[[list], Any] | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Sets the datasets: lists, or map-style torch Datasets with a length.

        `collate` makes a batch of a list of samples; batch_size is that of all processes (default
        --batch-size). Raises UserError for data that cannot be resumed bit for bit or is too
        short, and on resume for other data.
        """
        size = batch_size or self.options.batch_size
        for dataset in (training, validation):
            indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
            if dataset is not None and (isinstance(dataset, IterableDataset) or not indexed):
                raise UserError(
                    f"run.data: {type(dataset).__name__} is no map-style dataset. A stream cannot"
                    " be resumed at any batch: give it __getitem__(index) and __len__()"
                )
        if size % self.world_size:
            text = f"{size} cannot be shared out equally among {self.world_size} processes"
            raise UserError(f"--batch-size {text}")
        if len(training) < size:
            text = f"{len(training)} training samples are less than a batch of {size}"
            raise UserError(f"run.data: {text}")
        if validation is not None and not len(validation):
            raise UserError("run.data: the validation dataset is empty")
        ranks = self.rank, self.world_size
        self._batches = Batches(training, validation, collate, size, self.options, *ranks)
        self._fingerprint = {}
        for split, dataset in (("training", training), ("validation", validation)):
            mark = getattr(dataset, "fingerprint", lambda: None)()
            here = self._fingerprint[split] = [0 if dataset is None else len(dataset), mark]
            if self.resumed is None:
                continue
            with fitting(self.resumed, "its data"):
                change = difference(self._state["data_fingerprint"][split], here)
            if change:
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
            saved = {**self._state["state_dicts"], "model": self._state["model_state_dict"]}
            if name not in saved:
                raise CheckpointError(f"{self.resumed} does not fit this run: it has no {name}")
            self._load(module, saved[name], module.state_dict(), name)
        if self.options.compile:
            module.compile()
        self._models[name] = (module, wrapped)
        return wrapped

    @property
    def module(self) -> nn.Module:
        """The bare model, without what makes it one of many processes."""
        return next(iter(self._models.values()))[0]

    def keep(self, **objects: Any) -> Any:
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
        return self.progress.best["value"]

    @property
    def best_step(self) -> int:
        return self.progress.best["step"]

    @property
    def evaluation(self) -> dict[str, float] | None:
        """{name: mean} in the body of the first batch after an evaluation, else None."""
        last = self.progress.evaluation
        return dict(last["values"]) if last["step"] == self.step else None

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context that --dtype asks for, for the body and for evaluate."""
        wanted = self.options.dtype
        bfloat16 = wanted == "bfloat16" or wanted == "auto" and self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16)

    def clip_gradients(self, max_norm: float, parameters: Any = None) -> Tensor:
        """Scales the gradient to a norm of at most max_norm; returns the norm that it had.

        Raises FloatingPointError, before anything is updated, where it is not finite; not with a
        kept GradScaler that is enabled, which then skips the step itself.
        """
        if parameters is None:
            modules = [module for module, _ in self._models.values()]
            parameters = itertools.chain.from_iterable(one.parameters() for one in modules)
        norm = whole(nn.utils.clip_grad_norm_(list(dict.fromkeys(parameters)), max_norm))
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
            if name in ("step", "epoch", "seconds", "samples_per_second", "run"):
                raise UserError(f"run.log({name}=...): metrics.csv has a column of that name")
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
        if not self._ready_batches().validated and evaluate is not None:
            text = "there is no validation data; run.data(training, validation)"
            raise UserError(f"run.batches(evaluate): {text}")
        if not self._models:
            raise UserError("call run.model(module) before the loop")
        if (before := self.progress.best["of"]) not in (best, None):
            text = f'"{best}" does not fit the checkpoint, whose run has "{before}"'
            raise UserError(f"run.batches(best=...): {text}")
        self._best_of = best
        self._evaluate, self._better = evaluate, operator.gt if direction == "max" else operator.lt
        return self._loop()

    def _loop(self) -> Iterator:
        self._begin()
        if self.completed:
            text = f"Nothing left to do: step {self.step} of {self.total_steps}."
            further = self._further()
            self.screen.say(f"✅ {text}" + (f" Train further with{further}." if further else ""))
            return
        if self.progress.metrics["done_step"] < self.step:
            # A request cut an evaluation short.
            self._at_boundary()
        while self.step < self.total_steps:
            batch = self._next_batch()
            self._seed("step", self.step, self.rank)
            self._in_body, self._logged = True, {}
            self._steppers.clear()
            yield batch
            self._complete()
        while self.progress.metrics["done_step"] < self.step:
            self._leave()
            self._at_boundary()
        self._save_last("completed")
        self.monitor.nothing_to_save = "Everything is saved already."

    # The beginning of the loop.

    def _begin(self) -> None:
        before_step = self._step_hook()
        if self.resumed is not None:
            self._restore()
        self._began = True
        left = self.total_steps - self.step
        self.completed = left < 0 or self.completed and not (left and self._stretched)
        if self.completed:
            return
        self._rates_before = self._rates()
        # Where rank 0 may not save, none begins.
        self.processes.first(self._open_directory)
        if self.processes.sharded or self.rank == 0:
            self._writer = CheckpointWriter(self._save, self.screen.say)
        self._note(sessions=self.progress.metrics["sessions"] + 1)
        self._undo.callback(register_optimizer_step_pre_hook(before_step).remove)
        self._mark_boundary()
        self.monitor.describe, self.monitor.nothing_to_save = self._describe, None
        self._clock = self._row_clock = self._start_clock = time.monotonic()
        self._status_clock, self._first_step, self._row_step = 0.0, self.step, self.step
        self._introduce()
        self.trains = True
        self.processes.exchange({})
        if self._evaluate is not None:
            # A mistake in evaluate shows now. (After a request the loop will leave at once.)
            with contextlib.suppress(Interrupted), self._evaluating():
                batch, count = self._fetched(Loader.validation, 0, 1)
                self._values(batch, count, 0)

    def _parameter_names(self) -> dict[Tensor, str]:
        names: dict[Tensor, str] = {}
        for name, (module, _) in self._models.items():
            names |= {parameter: f"{name}.{key}" for key, parameter in module.named_parameters()}
        return names

    def _step_hook(self) -> Callable:
        """Raises UserError for a kept optimizer of something else; returns what runs before steps.

        A batch in which a kept optimizer has stepped is a boundary; no other may step.
        """
        own = set(self._parameter_names())
        optimizers = self._kept["optimizer_state_dicts"]
        for name, optimizer in optimizers.items():
            if not own.issuperset(parameters_of(optimizer)):
                raise UserError(
                    f"run.keep({name}=...): the optimizer has parameters that no run.model(...)"
                    " has. Call run.model first, and give the optimizer its parameters"
                )
            others = self._kept["scheduler_state_dicts"] or self._kept["state_dicts"]
            if hasattr(optimizer.step, "_wrapped_by_lr_sched") and not others:
                raise UserError(f"{name} has a scheduler that is not kept: run.keep(scheduler=...)")
        kept = {*optimizers.values(), *optimizers_in(self._kept["state_dicts"].values())}
        # At the end of the batch before.
        self._gradients: dict[Optimizer, list] = {optimizer: [] for optimizer in kept}
        strangers = weakref.WeakKeyDictionary[Optimizer, int]()

        def before_step(optimizer: Optimizer, *arguments: object) -> None:
            if optimizer in kept:
                self._stepped = True
                self._steppers.add(optimizer)
                return
            # One that lives for a batch (an attack's, say) leaves nothing to keep.
            lasts = strangers.setdefault(optimizer, self.step) != self.step
            if lasts or not own.isdisjoint(parameters_of(optimizer)):
                word = type(optimizer).__name__
                hint = f"run.keep(name={word}(...)), and its module is for run.model"
                raise UserError(f"{word} steps in the loop but is not kept: {hint}")

        return before_step

    def _open_directory(self) -> None:
        path = Path(self.options.checkpoint_dir)
        try:
            self.directory = RunDirectory(path, self.run_id, self.screen.say)
            old = home_of(self.resumed) if self.resumed else path
            done = self.progress.metrics["done_step"]
            self.metrics = Metrics(path, self.run_id, done, old)
        except FileExistsError:
            raise UserError(f"--checkpoint-dir {path}: a file, not a directory") from None
        except OSError as error:
            raise UserError(f"--checkpoint-dir {path}: {error.strerror}") from error
        self._tensorboard = None
        if self.options.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard needs pip install tensorboard") from None
            # What a run that died has written of later steps will come again.
            self._tensorboard = SummaryWriter(path / "tensorboard", purge_step=done + 1)
            self._undo.callback(self._tensorboard.close)

    def _restore(self) -> None:
        """What is kept, the optimizers last: a scheduler's constructor changes their rates."""
        own, saved, path = self.state_dict(""), self._state, self.resumed
        for kind, parts in self._kept.items():
            for name in sorted(own[kind].keys() ^ saved[kind].keys(), key=str):
                here = "kept by this run, but not in the checkpoint"
                where = here if name in own[kind] else "in the checkpoint, but not kept by this run"
                text = f"{name} is {where}. Is it another script's?"
                raise CheckpointError(f"{path} does not fit this run: {text}")
            for name, part in parts.items():
                like_own = own[kind][name]
                if kind != "state_dicts":
                    with fitting(path, name):
                        check_same_kind(saved[kind][name], like_own)
                if isinstance(part, Optimizer):
                    like_own = {"state": dict(enumerate(parameters_of(part)))}
                self._load(part, saved[kind][name], like_own, name)
        # Its tensors are not needed any more.
        self._state = {}

    def _load(self, part: Any, saved: dict, own: dict, name: str) -> None:
        with fitting(self.resumed, name):
            part.load_state_dict(self.processes.restored(self.resumed, saved, own))

    def _introduce(self) -> None:
        batches, say = self._ready_batches(), self.screen.say
        count = sum(parameter.numel() for parameter in self._parameter_names())
        # fully_shard has made a class of its own of it.
        kinds = (type(module).__name__.removeprefix("FSDP") for module, _ in self._models.values())
        many = "" if self.world_size == 1 else f"{self.world_size} x "
        say(
            f"🧠 {' and '.join(kinds)}, {count:,} parameters, on {many}{self.device}:"
            f" {len(batches.training):,} samples, {batches.per_epoch:,} batches an epoch;"
            f" saves in {self.options.checkpoint_dir}"
        )
        if self.resumed is not None:
            where = f"step {self.step} of {self.total_steps} from {self.resumed}"
            say(f"📂 Resumed at {where}{self.differs}")
        if self.rank == 0 and self.metrics.path.name != "metrics.csv":
            say(f"📂 Another run has saved here before; this one logs to {self.metrics.path.name}")
        how = "Press 'q' + Enter" if self.monitor.keyboard else "Send it SIGTERM"
        say(f"🔄 Training started. {how} to exit gracefully...")

    # Between two batches.

    def _next_batch(self) -> Any:
        while True:
            # In the middle of an accumulation a request waits for its end.
            if self.monitor.exit_requested and self.step == self._boundary.progress.step:
                self._leave()
            try:
                return self._fetched(Loader.training)
            except Interrupted:
                self._leave()

    def _fetched(self, get: Callable, *arguments: object) -> Any:
        """What the loader gives, on the device. Waiting for it, one process is at a boundary.

        Raises Interrupted where somebody asks to leave meanwhile, whatever the loader does. Of
        several processes the others are in a collective: there a request waits for the loader.
        """
        waiting: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.world_size == 1:
            waiting = self.monitor.interruptible(self.step == self._boundary.progress.step)
        try:
            with waiting:
                if self._loader is None:
                    pin, workers = self.device.type == "cuda", self.options.workers
                    batches = self._ready_batches()
                    self._loader = Loader(batches, workers, self.step, pin, self._without_batch)
                return tree_map(self._to_device, get(self._loader, *arguments))
        except Interrupted:
            self._close_loader()
            raise

    def _without_batch(self, text: str) -> None:
        self.screen.say(text)
        # Nobody has to wait for the end of an accumulation that does not come.
        self.monitor.wake()

    def _to_device(self, value: Any) -> Any:
        return value.to(self.device, non_blocking=True) if hasattr(value, "to") else value

    def _close_loader(self) -> None:
        if self._loader is not None:
            self._loader.close()
        self._loader = None
        # Those that were interrupted while they started.
        end_children()

    def _complete(self) -> None:
        """Counts the batch that the body has had, and does what is due."""
        failure = None
        try:
            logged = self.processes.exchange(self._logged)
        except RuntimeError as error:
            # Another rank has died; this one's part of the batch is complete.
            logged, failure = self._logged, error
        self._add(logged)
        self._in_body = False
        waited = self.step - self._boundary.progress.step >= self.LONGEST_ACCUMULATION
        last = self.step >= self.total_steps
        ends = self._stepped and not self._accumulates()
        ends = ends or waited or last or not self._kept["optimizer_state_dicts"]
        if ends:
            self._mark_boundary()
        if failure is not None:
            raise failure
        if ends:
            if not self.trained:
                self._after_first_step()
            self._at_boundary()

    def _accumulates(self) -> bool:
        """Whether an optimizer that has not stepped in this batch has got gradients in it."""
        if len(self._gradients) < 2:
            return False
        before = self._gradients
        # A gradient is another one, or has been added to.
        self._gradients = {
            optimizer: [
                (id(p.grad), local(p.grad)._version)
                for p in parameters_of(optimizer)
                if p.grad is not None
            ]
            for optimizer in before
        }
        waiting = before.keys() - self._steppers
        return any(before[one] != self._gradients[one] for one in waiting if self._gradients[one])

    def _add(self, logged: dict[str, tuple[float, int]]) -> None:
        """Counts a batch, and adds what all ranks have logged in it to the next row."""
        last, now = self.progress.metrics, time.monotonic()
        sums, counts, smooth = dict(last["sums"]), dict(last["counts"]), last["smooth_loss"]
        for name, (total, count) in logged.items():
            sums[name] = sums.get(name, 0.0) + total
            counts[name] = counts.get(name, 0) + count
            if name == "loss":
                mean = total / count
                smooth = mean if smooth is None else 0.9 * smooth + 0.1 * mean
        if not math.isfinite(sums.get("loss", 0.0)):
            raise FloatingPointError("the loss is NaN or infinite; nothing of it is saved")
        seconds, self._clock = last["seconds"] + now - self._clock, now
        self._note(sums=sums, counts=counts, smooth_loss=smooth, seconds=seconds)
        self.progress = self.progress._replace(step=self.step + 1)

    def _note(self, **metrics: Any) -> None:
        self.progress = self.progress._replace(metrics={**self.progress.metrics, **metrics})

    def _mark_boundary(self) -> None:
        self._stepped = False
        buffers = [buffer for module, _ in self._models.values() for buffer in module.buffers()]
        # All of them: BatchNorm changes its own without a new version.
        copies = [(buffer, buffer.detach().clone()) for buffer in buffers]
        parts = (*self._kept["scheduler_state_dicts"].values(), *self._kept["state_dicts"].values())
        kinds = (LRScheduler, ReduceLROnPlateau, torch.amp.GradScaler)
        small = [(part, dict(part.state_dict())) for part in parts if isinstance(part, kinds)]
        self._boundary = Boundary(self.progress, copies, small)

    @torch.no_grad()
    def _settle(self) -> None:
        """Makes what is there a boundary.

        Undoes what batches have changed since the last one, unless an optimizer has stepped.
        """
        if self._stepped:
            self._mark_boundary()
            return
        for buffer, saved in self._boundary.buffers:
            buffer.copy_(saved)
        for part, state in self._boundary.small:
            part.load_state_dict(state)
        self.progress = self._boundary.progress

    def _after_first_step(self) -> None:
        """What cannot be saved is said now, and what saving needs is imported now."""
        try:
            self._laid_out("")
        except TypeError as error:
            # Nor is there anything to save on leaving.
            self._writer = None
            raise UserError(f"this run could not be saved: {error}") from None
        self.trained = True
        rates = zip(self._rates_before, self._rates()) if self._stretched else ()
        if any(abs(now - before) > 0.1 * before for before, now in rates):
            before, now = self._rates_before[0], self._rates()[0]
            text = f"goes on at {now:.2e}, after {before:.2e}: {self.total_steps} steps are another"
            self.screen.say(f"📈 The learning rate {text} schedule.")

    def _due(self, every: int) -> bool:
        return self.step // every > self.progress.metrics["done_step"] // every

    def _at_boundary(self) -> None:
        """Evaluates, logs and saves what is due since the last time.

        A request to leave cuts an evaluation short; all of this is then done on resume.
        """
        targets = {}
        last = self.step >= self.total_steps
        evaluated = self._evaluate is not None and (self._due(self.options.eval_every) or last)
        if evaluated:
            if not self._evaluated():
                return
            if self.best_step == self.step:
                targets["best"] = "best.pt"
        logged = evaluated or last or self._due(self.options.log_every)
        if logged:
            self._log_row(evaluated)
        if self.processes.save_requested or self._due(self.options.save_every):
            reason = "user_requested_save" if self.processes.save_requested else "periodic"
            self.processes.save_requested = False
            targets[reason] = f"step_{self.step}.pt"
        # What an evaluation has found is part of the state of this step.
        self._note(done_step=self.step)
        self._boundary = self._boundary._replace(progress=self.progress)
        if targets and self._writer is not None:
            self._writer.submit(lambda: self._laid_out(""), targets)
        self._show(logged)

    # Evaluation.

    def _evaluated(self) -> bool:
        """Finds the mean of each value over all samples; False where a request cut it short."""
        totals: dict[str, tuple[float, int]] = {}
        count = self._ready_batches().per_evaluation
        try:
            with self._evaluating():
                for number in range(count):
                    if self.monitor.exit_requested:
                        raise Interrupted
                    batch, counted = self._fetched(Loader.validation, number, count)
                    for name, value in self._values(batch, counted, number).items():
                        total, samples = totals.get(name, (0.0, 0))
                        totals[name] = total + value, samples + counted
                    self.processes.exchange({})
        except Interrupted:
            self._close_loader()
            return False
        totals = self.processes.exchange(totals)
        means = {name: total / samples for name, (total, samples) in totals.items()}
        value, best = means[self._best_name], self.progress.best
        if value == value and (self.best is None or self._better(value, self.best)):
            best = {"value": value, "step": self.step, "of": self._best_of}
        found = {"values": means, "step": self.step}
        self.progress = self.progress._replace(evaluation=found, best=best)
        return True

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Modules in eval mode; afterwards each submodule is as it was. Buffers are rank 0's."""
        others = self._kept["state_dicts"].values()
        roots = [wrapped for _, wrapped in self._models.values()]
        roots += [part for part in others if isinstance(part, nn.Module)]
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

    def _values(self, batch: Any, count: int, number: int) -> dict[str, float]:
        """What evaluate returns for a batch, summed up. Raises UserError for anything else."""
        self._seed("evaluation", number)
        values = self._evaluate(batch) if self._evaluate else {}
        if not isinstance(values, dict) or self._best_name not in values:
            got = list(values) if isinstance(values, dict) else type(values).__name__
            wanted = f"{{name: a value for each sample}}, {self._best_name} among them"
            raise UserError(f"evaluate returned {got}; it has to return {wanted} (see best=...)")
        sums = {}
        for name, value in values.items():
            try:
                value = whole(torch.as_tensor(value).detach())
                got = f"of shape {tuple(value.shape)}"
            except (TypeError, ValueError, RuntimeError):
                got, value = f"as {type(value).__name__}", torch.empty(())
            if value.shape != (max(count, 1),):
                raise UserError(
                    f'evaluate returned "{name}" {got} for a batch of {max(count, 1)} samples: one'
                    ' value for each is wanted (as reduction="none" gives it), whose mean is taken'
                )
            sums[name] = value[:count].to("cpu", torch.float64).sum().item()
        return sums

    # What people see.

    def _rates(self) -> list[float]:
        optimizers = self._kept["optimizer_state_dicts"].values()
        return [float(optimizer.param_groups[0]["lr"]) for optimizer in optimizers]

    def _log_row(self, evaluated: bool) -> None:
        metrics, now = self.progress.metrics, time.monotonic()
        samples = (self.step - self._row_step) * self._ready_batches().batch_size
        found = self.progress.evaluation["values"] if evaluated else {}
        values: dict[str, Any] = {"step": self.step, "epoch": self.epoch}
        values |= {name: sum_ / metrics["counts"][name] for name, sum_ in metrics["sums"].items()}
        values |= {f"val_{name}": value for name, value in found.items()}
        values |= zip((f"lr_{name}" for name in self._kept["optimizer_state_dicts"]), self._rates())
        values["samples_per_second"] = round(samples / max(1e-9, now - self._row_clock), 1)
        values["seconds"] = round(metrics["seconds"], 3)
        self._note(sums={}, counts={})
        self._row_clock, self._row_step = now, self.step
        if self.rank == 0:
            self.metrics.row(values)
            if self._tensorboard is not None:
                for name, value in list(values.items())[1:]:
                    self._tensorboard.add_scalar(name.replace("_", "/", 1), value, self.step)

    def _show(self, logged: bool) -> None:
        """The status line on a terminal; elsewhere a plain line for every row of metrics.csv."""
        now, terminal = time.monotonic(), self.screen.is_terminal
        if not (now - self._status_clock > 0.1 if terminal else logged):
            return
        self._status_clock, smooth = now, self.progress.metrics["smooth_loss"]
        seconds = max(1e-9, now - self._start_clock) / max(1, self.step - self._first_step)
        left = min(round(seconds * (self.total_steps - self.step)), 10**9)
        parts = [f"step {self.step}/{self.total_steps}"]
        if smooth is not None:
            parts.append(f"loss {smooth:.4f}")
        parts.append(f"{datetime.timedelta(seconds=left)} left")
        if self.best is not None:
            last = self.progress.evaluation["values"][self._best_name]
            parts.append(f"val {self._best_name} {last:.4f} (best {self.best:.4f})")
        parts.append(f"epoch {self.epoch}")
        parts.append(f"{self._ready_batches().batch_size / seconds:,.0f} samples/s")
        parts += [f"lr {rate:.2e}" for rate in self._rates()[-1:]]
        if terminal:
            self.screen.status(parts)
        else:
            self.screen.say(" | ".join(parts))

    def _describe(self) -> str:
        if self._last_save is None:
            return f"No checkpoint yet since {'the one resumed' if self.resumed else 'this start'}."
        name, when = self._last_save
        age = datetime.timedelta(seconds=round(time.monotonic() - when))
        return f"Last checkpoint: {name}, {age} ago."

    def summary(self) -> str:
        """What is read last: how far it came, what was saved, and the command that goes on."""
        best = "none yet" if self.best is None else f"{self.best:.4f}"
        label, path = self.saved or ("Checkpoint", "none yet")
        lines = [
            "📊 Training Summary:",
            f"   Completed Steps: {self.step}",
            f"   Epoch: {self.epoch}",
            f"   Best {self._best_name.replace('_', ' ').title()}: {best}",
            f"   {label}: {path}",
        ]
        word, further = ("Train further", self._further()) if self.completed else ("Resume", "")
        if self.saved and (further or not self.completed):
            command = f"{own_command()} --resume {shlex.quote(str(path))}{further}"
            lines.append(f"▶️ {word} with: {command}")
        return "\n".join(lines)

    def _further(self) -> str:
        """The options with which a run whose steps are done trains as long again, if it can."""
        steps, epochs, twice = self.options.steps, self.options.epochs, 2 * self.step
        schedulers = self._kept["scheduler_state_dicts"].values()
        # The script has ended it, or OneCycleLR, say, cannot be made longer.
        fixed = any(hasattr(one, "total_steps") for one in schedulers)
        if fixed or self.step < self.total_steps:
            return ""
        # The limits that are in the way.
        text = f" --steps {twice}" if steps and steps < twice else ""
        if epochs and epochs < twice / self._ready_batches().per_epoch:
            text += f" --epochs {2 * epochs}"
        return text

    # Saving and leaving.

    def state_dict(self, exit_reason: str) -> dict:
        """The checkpoint as of the last boundary. Its tensors are the live ones, not copies."""
        models = {name: module.state_dict() for name, (module, _) in self._models.items()}
        kept = {
            kind: {name: part.state_dict() for name, part in parts.items()}
            for kind, parts in self._kept.items()
        }
        names = self._parameter_names()
        # PyTorch takes the state of any scheduler, and optimizer that has as many parameters.
        for kind in ("scheduler_state_dicts", "optimizer_state_dicts"):
            for name, part in self._kept[kind].items():
                kept[kind][name] = {**kept[kind][name], "class": type(part).__qualname__}
        for name, optimizer in self._kept["optimizer_state_dicts"].items():
            groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
            kept["optimizer_state_dicts"][name] |= {"param_names": groups}
        return {
            "format_version": self.FORMAT_VERSION,
            # Early in the file, for RunDirectory.
            "run_id": self.run_id,
            "model_state_dict": models.pop("model", {}),
            **kept,
            "state_dicts": {**models, **kept["state_dicts"]},
            **self._boundary.progress._asdict(),
            "config": dict(vars(self.options)),
            "data_fingerprint": self._fingerprint,
            "exit_reason": exit_reason,
            "torch_version": str(torch.__version__),
            "saved_at": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        }

    def _laid_out(self, exit_reason: str) -> tuple[dict, list[Part]]:
        return laid_out(self.processes.rows(self.state_dict(exit_reason)), self.rank)

    def _save(self, shown: dict, parts: Sequence[Part], name: str, fallback: bool = False) -> Path:
        """Where it has saved."""
        writers = self.processes.writers()
        path = Path(writers.lead(self._fallback_path if fallback else self._path_to_save, name))
        write_checkpoint(shown, parts, path, writers)
        if self.rank == 0:
            self._last_save = name, time.monotonic()
            if name.startswith("step_"):
                self.directory.prune(path, self.options.keep)
        return path

    def _path_to_save(self, name: str) -> str:
        # Somebody may have deleted it; without it the rows that wait could not be written.
        self.directory.hold()
        self.metrics.flush()
        if self._tensorboard is not None:
            self._tensorboard.flush()
        return str(self.directory.path_for(name))

    def _fallback_path(self, name: str) -> str:
        folder = fallback_directory(self.options.checkpoint_dir)
        folder.mkdir(mode=0o700, exist_ok=True)
        return str(folder / f"{Path(name).stem}_{self.run_id}.pt")

    def _leave(self) -> None:
        """Saves and raises SystemExit. Returns only where a save after q has failed.

        A person can make room then and type q again; after a signal the exit code is 1.
        """
        # Of torchrun's only process, what has interrupted its waiting may be new to it.
        self.processes.exchange({})
        if self.step > self._boundary.progress.step:
            self._settle()
        while self.monitor.exit_requested:
            reason = self.monitor.reason or ""
            self.exit_code = self.monitor.exit_code
            if self._save_last(reason) or reason != USER_REQUEST:
                raise Leaving(self.exit_code)
            self.monitor.withdraw()

    def _save_last(self, reason: str, together: bool = True) -> bool:
        """Saves the last boundary on leaving; False where that failed, and the exit code is 1.

        Where the directory takes no save, the temporary one is tried, but not after q. Together:
        all ranks call this, and those that do not write learn where it is.
        """
        if reason != "completed":
            self.screen.say("📝 Saving emergency checkpoint...")
        if together and not self.processes.sharded:
            self.saved = self.processes.first(self._write_last, reason)
        else:
            self.saved = self._write_last(reason)
        if self.saved is None:
            if reason != USER_REQUEST:
                self.exit_code = 1
                self.name_newest()
            return False
        self.completed = reason == "completed"
        self.screen.say("✅ {} saved: {}".format(*self.saved))
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()
            self.screen.say(f"🧹 {self.device.type.upper()} cache cleared")
        return True

    def _write_last(self, reason: str) -> tuple[str, Path] | None:
        """What the summary calls it, and its path; None where nothing could be saved."""
        label, name = "Emergency checkpoint", f"emergency_exit/emergency_step_{self.step}.pt"
        if reason == "completed":
            label, name = "Final checkpoint", "final.pt"
        if self._writer is not None:
            self._writer.wait()
        hints = ["Trying the temporary directory...", "TMPDIR names another place."]
        if reason == USER_REQUEST:
            hints = ["Training goes on: make room, then press 'q' + Enter again."]
        for attempts, hint in enumerate(hints):
            try:
                return label, self._save(*self._laid_out(reason), name, fallback=attempts > 0)
            except SAVE_ERRORS as error:
                self.screen.say(f"❌ {label} not saved: {one_line(error)}. {hint}")
        return None

    def name_newest(self) -> None:
        """For a summary after which nothing new is on the disk."""
        if self.processes.local_rank == 0:
            # Where there is none, the summary names none.
            with contextlib.suppress(CheckpointError, OSError):
                newest = latest_checkpoint(self.options.checkpoint_dir, self.screen.say)
                self.saved = "Newest whole checkpoint", newest

    def end(self) -> None:
        """After train() has returned: a loop that was left by break or return is completed."""
        if not self._began or self.completed or self.exit_code:
            return
        if self._in_body and self._stepped:
            self._complete()
        self._settle()
        self._save_last("completed")

    def leave_after_exception(self, error: BaseException) -> None:
        """Saves the state of the last boundary, unless an optimizer has stepped since."""
        rank, name = self.processes.first_failure(type(error).__name__)
        if self._writer is None:
            return
        self.processes.break_off()
        self._writer.wait()
        if rank != self.rank:
            self.screen.say(f"❌ {name} in rank {rank}.")
        step = None if self._stepped else self._boundary.progress.step
        writers = self.processes.writers()
        try:
            writers.lead(check_same_step, writers.each(lambda: step))
        except SAVE_ERRORS as incomplete:
            self.name_newest()
            self.screen.say(f"❌ {one_line(incomplete)}: nothing half-updated is saved.")
            return
        self._settle()
        self._save_last(f"exception_{name}", together=False)

    def close(self) -> None:
        if self._loader is not None:
            self._close_loader()
        if self._writer is not None:
            self._writer.close()
        self._undo.close()


class Leaving(SystemExit):
    """Raised by the loop where all is saved and somebody has asked to leave."""


@contextlib.contextmanager
def fitting(path: Path | None, name: str) -> Iterator[None]:
    """Whatever goes wrong with a part of a checkpoint is a CheckpointError."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{path} does not fit {name} ({one_line(error)})") from error


def check_same_kind(saved: dict, own: dict) -> None:
    """Raises ValueError for an optimizer or scheduler of another class, or for other parameters."""
    # A scheduler would keep it as an attribute.
    if (theirs := saved.pop("class")) != own["class"]:
        raise ValueError(f"{theirs} there, {own['class']} here")
    if saved.get("total_steps") != own.get("total_steps"):
        lengths = f"for {saved['total_steps']} steps there, for {own['total_steps']} here"
        raise ValueError(f"{theirs} {lengths}: another length needs a new start")
    if saved.get("param_names") != own.get("param_names"):
        pairs = zip(itertools.chain(*saved["param_names"]), itertools.chain(*own["param_names"]))
        other = next((f"{a} there, {b} here" for a, b in pairs if a != b), "in other groups")
        raise ValueError(f"over other parameters: {other}")


def check_same_step(steps: list[int | None]) -> None:
    if None in steps or len(set(steps)) > 1:
        raise RuntimeError("The exception came after a step of an optimizer")


def whole(tensor: Any) -> Tensor:
    """Of a tensor that is spread over processes all of it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def is_sharded(tensor: object) -> bool:
    """True for a DTensor. (Importing its class takes time that most runs need not spend.)"""
    return hasattr(tensor, "full_tensor")


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    return itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)


def optimizers_in(parts: Iterable) -> Iterator[Optimizer]:
    """The optimizers that kept objects, controllers for instance, save and restore themselves."""
    for part in parts:
        for value in getattr(part, "__dict__", {}).values():
            several = value.values() if isinstance(value, dict) else [value]
            yield from (one for one in several if isinstance(one, Optimizer))


def own_command() -> str:
    """This program as the person would type it here."""
    script, here = Path(os.path.abspath(sys.argv[0])), Path(__file__).resolve()
    paths = sys.executable, str(script)
    # Elsewhere a relative path would be of no use tomorrow.
    if script.parent == Path.cwd():
        paths = paths[0].removeprefix(f"{script.parent}/"), script.name
    python, name = shlex.quote(paths[0]), shlex.quote(paths[1])
    if shutil.which("python") == sys.executable:
        # What uv, or pipx by it, has made for this run is not on the PATH tomorrow.
        uv = os.environ.get("UV", "")
        python = f"{'uv' if shutil.which('uv') else shlex.quote(uv)} run" if uv else "python"
    if dist.is_torchelastic_launched():
        count, wrapper = os.environ["LOCAL_WORLD_SIZE"], here.parent / "scripts/train_torchrun.sh"
        variables = "" if script == here else f"SCRIPT={name} "
        python += f" -m torch.distributed.run --nproc-per-node={count}"
        if (nodes := os.environ["GROUP_WORLD_SIZE"]) != "1":
            store = "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)
            meeting = shlex.quote(os.environ.get("RENDEZVOUS") or store)
            variables = f"NNODES={nodes} RENDEZVOUS={meeting} {variables}"
            python += f" --nnodes={nodes} --rdzv-backend=c10d --rdzv-endpoint={meeting}"
        if wrapper.exists():
            return f"{variables}{shlex.quote(str(wrapper))} {count}"
    if not (script.parent / here.name).exists():
        # Started by one of the scripts, which have said where to import this file from.
        python = f"PYTHONPATH={shlex.quote(str(here.parent))} {python}"
    return f"{python} {name}"


# ---- Processes --------------------------------------------------------------------------------


class Processes:
    """The processes that train one model together: torchrun's, or this one alone.

    Each rank has the whole model, DistributedDataParallel averages the gradients, and rank 0
    saves. If `sharded`, each has rows of every parameter, gradient and optimizer state
    (fully_shard, PyTorch's FSDP2) and saves those. Rank 0 alone prints and hears the keys.
    """

    def __init__(self, monitor: ExitMonitor) -> None:
        self.monitor, self.save_requested = monitor, False
        self.rank, self.local_rank, self.world_size, self.sharded = 0, 0, 1, False
        self.many = dist.is_torchelastic_launched()
        self._mesh: Any = None
        if not self.many:
            return
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        backend, self.local_rank = "gloo", int(os.environ["LOCAL_RANK"])
        if torch.cuda.is_available():
            here = os.environ["LOCAL_WORLD_SIZE"]
            if int(here) > torch.cuda.device_count():
                text = f"processes, but only {torch.cuda.device_count()} GPUs here"
                raise UserError(f"{here} {text}")
            torch.cuda.set_device(self.local_rank)
            backend = "cpu:gloo,cuda:nccl"
        self._store = torchruns_store()
        size = self.world_size
        dist.init_process_group(backend, store=self._store, rank=self.rank, world_size=size)
        # Who leaves for a mistake now leaves no other alone in the middle of connecting.
        self._gather(None)
        give_up_silent_peers()
        self._saves = itertools.count()
        # The signals heard before a failure, after which torchrun signals that one has died.
        self._signals_before: int | None = None
        self._torchrun = os.getppid()
        # From here on a request is for all, when the loop begins.
        monitor.requests, monitor.nothing_to_save = [], None

    def wrap(self, module: nn.Module, device: torch.device) -> tuple[nn.Module, nn.Module]:
        """The module on the device, and what the loop calls."""
        module = module.to(device)
        if self.sharded:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.detach(), src=0)
            self._shard(module, device)
        elif self.many and any(parameter.requires_grad for parameter in module.parameters()):
            # Found anew in each batch, the parameters that take no part in it may differ (a GAN in
            # one module); and its buckets keep their order: a resumed run adds up in the same one.
            return module, nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
        return module, module

    def _shard(self, module: nn.Module, device: torch.device) -> None:
        """Raises UserError for what cannot be shared out."""
        from torch.distributed.fsdp import fully_shard

        if self._mesh is None:
            self._mesh = dist.device_mesh.init_device_mesh(device.type, (self.world_size,))
        lists = [one for one in module.modules() if isinstance(one, nn.ModuleList)]
        found = (unit for one in reversed(lists) for unit in one if list(unit.parameters()))
        units = list(dict.fromkeys(found))
        modules = dict(module.named_modules(remove_duplicate=False))
        owners: dict[Tensor, tuple[str, nn.Module]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
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

    def read(self, path: Path) -> dict:
        """A verified checkpoint, of which each of many ranks verifies its share of every record.

        Their tensors are on the meta device: restored() comes after it.
        """
        if not self.many:
            return load_checkpoint(path)
        readers: list[CheckpointReader] = []

        def share() -> list[int]:
            with opened_checkpoint(path) as checkpoint:
                readers.append(checkpoint)
                checkpoint.share(self.rank, self.world_size)
                return checkpoint.read()

        checksums = [answered(*answer) for answer in self._gather(attempt(share))]
        check_checksums(path, readers[0].records, checksums)
        return readers[0].state

    def _gather(self, value: object) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def restored(self, path: Path | None, saved: dict, own: dict) -> dict:
        """Part of what read() returned, with the tensors that this process loads into own."""
        if not self.many or path is None:
            return saved
        with opened_checkpoint(path) as checkpoint:

            def asked(value: Any, own: Any) -> Any:
                if isinstance(value, dict):
                    made = copy.copy(value)
                    for key, item in value.items():
                        made[key] = asked(item, own.get(key) if isinstance(own, dict) else own)
                    return made
                if is_sharded(own) and isinstance(value, Tensor) and value.shape == own.shape:
                    first, last = self._share_of(len(own))
                    return Rows(checkpoint.rows(value, first, last), first, value.shape)
                return mapped(value, checkpoint.whole)

            state = asked(saved, own)
            checkpoint.read()
        return mapped(state, self._from_rows)

    def _from_rows(self, value: Any) -> Any:
        if not isinstance(value, Rows):
            return value
        from torch.distributed.tensor import DTensor, Shard

        local = value.local.contiguous().to(self._mesh.device_type)
        stride = torch.empty(value.shape, device="meta").stride()
        layout: dict[str, Any] = {"run_check": False, "shape": value.shape, "stride": stride}
        return DTensor.from_local(local, self._mesh, [Shard(0)], **layout)

    def _share_of(self, rows: int) -> tuple[int, int]:
        """First row of this rank, and of the next, as PyTorch shards a tensor."""
        share = -(-rows // self.world_size)
        return min(self.rank * share, rows), min((self.rank + 1) * share, rows)

    def rows(self, state: dict) -> dict:
        """A state to be saved, with Rows in the place of tensors that are spread over processes."""

        def own(value: Any) -> Any:
            if not is_sharded(value):
                return value
            if not value.dim() or not value.placements[0].is_shard(0):
                raise TypeError(" is a tensor that is spread over processes, but not by its rows")
            return Rows(value.to_local().detach(), self._share_of(len(value))[0], value.shape)

        return mapped(state, own) if self.sharded else state

    def average(self, mean: Tensor) -> Tensor:
        total = mean.clone()
        if self.many:
            dist.all_reduce(total)
        return total / self.world_size

    def exchange(self, own: dict[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
        """Between two batches: what one process has heard becomes the request of all.

        Returns the sum of what all have brought along: {name: (sum, count)}, not all the same
        names. Raises RuntimeError where a rank has died.
        """
        monitor = self.monitor
        mine = own, monitor.heard, monitor.save_requested
        self.save_requested |= monitor.save_requested
        monitor.save_requested = False
        if not self.many:
            return own
        if os.getppid() != self._torchrun:
            # Nobody is left who could end us.
            monitor.request("torchrun_died", 1)
        total: dict[str, tuple[float, int]] = {}
        for values, requests, save in self._gather(mine):
            self.save_requested |= save
            for request in requests:
                if request not in monitor.requests:
                    monitor.requests.append(request)
                # Whoever heard it, rank 0 says so.
                monitor.request(*request)
            for name, (part, count) in values.items():
                before = total.get(name, (0.0, 0))
                total[name] = before[0] + part, before[1] + count
        return total

    def first(self, function: Callable, *arguments: object) -> Any:
        """A collective: what function returns or raises on rank 0 is for all."""
        if not self.many:
            return function(*arguments)
        answer: Any = attempt(function, *arguments) if self.rank == 0 else None
        try:
            answer = self._gather(answer)[0]
        except RuntimeError:
            # That a rank has died is not rank 0's fault: the next batch will tell.
            if self.rank:
                raise
        return answered(*answer)

    def share_buffers(self, roots: Sequence[nn.Module]) -> None:
        """Rank 0's buffers are those of all."""
        for buffer in itertools.chain.from_iterable(root.buffers() for root in roots):
            if self.many:
                dist.broadcast(buffer, src=0)

    def writers(self) -> OneWriter:
        """Who takes part in the save that begins now."""
        if not self.sharded:
            return OneWriter()
        store = dist.PrefixStore(f"save_{next(self._saves)}", self._store)
        return StoreWriters(store, self.rank, self.world_size, self._others_may_live)

    def _others_may_live(self) -> bool:
        """False after a failure, once torchrun has signalled that a rank has died."""
        before = self._signals_before
        return before is None or self.monitor.signals_heard == before

    def first_failure(self, name: str) -> tuple[int, str]:
        """Rank and name of the exception that came first, of which others may be consequences."""
        answer = f"{self.rank} {name}"
        # An error: the store has died with torchrun.
        with contextlib.suppress(RuntimeError):
            if self.many:
                answer = self._store.compare_set("failure", "", answer).decode()
        rank, _, name = answer.partition(" ")
        return int(rank), name

    def break_off(self) -> None:
        """After a failure: who waits for us in the middle of a batch gets an exception instead."""
        if not self.many:
            return
        # A device may be waiting for ranks that will not come.
        group: Any = dist.group.WORLD
        group.abort()
        if not self.sharded:
            return
        self._signals_before = self.monitor.signals_heard
        # gloo's connections, which abort() does not close.
        for connection in tcp_connections():
            # An error: the other end has gone.
            with contextlib.suppress(OSError):
                ports = connection.getpeername()[1:2], connection.getsockname()[1:2]
                if (int(os.environ["MASTER_PORT"]),) not in ports:
                    connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Of a run that has left gracefully."""
        if self.many:
            dist.destroy_process_group()


class StoreWriters(OneWriter):
    """All ranks write one checkpoint, each its part.

    What they tell each other goes through torchrun's store: beside training, and after a failure,
    when no process group is of use.
    """

    # What a rank waits for another that may have died.
    ANSWER_SECONDS = 30

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, others_may_live: Callable[[], bool]
    ) -> None:
        self._store, self.rank, self.world_size = store, rank, world_size
        self.on_several_machines = os.environ["GROUP_WORLD_SIZE"] != "1"
        self._others_may_live = others_may_live
        self._exchanges, self._began = itertools.count(), time.monotonic()

    def lead(self, function: Callable, *arguments: object) -> Any:
        key = f"{next(self._exchanges)}"
        if self.rank == 0:
            self._store.set(key, json.dumps(attempt(function, *arguments), default=str))
        return self._answer(key, 0)

    def each(self, function: Callable, *arguments: object) -> list:
        key, results = f"{next(self._exchanges)} of ", []
        self._store.set(f"{key}{self.rank}", json.dumps(attempt(function, *arguments)))

        def gather() -> None:
            for rank in range(self.world_size):
                results.append(self._answer(f"{key}{rank}", rank))
                self._store.delete_key(f"{key}{rank}")

        self.lead(gather)
        return results

    def _answer(self, key: str, rank: int) -> Any:
        """What attempt() has returned on a rank.

        Raises RuntimeError where none comes: a rank is waited for much longer than this one itself
        has taken for its part, but not if it has died.
        """
        began = time.monotonic()
        patience = self.ANSWER_SECONDS + 10 * (began - self._began)
        while not self._store.check([key]):
            waited = time.monotonic() - began
            if waited > patience or not self._others_may_live():
                raise RuntimeError(f"Rank {rank}, which has a part of the model, does not answer")
            # Waiting in the store would hear no signal, and print warnings.
            time.sleep(min(0.1, 0.001 + waited / 8))
        return answered(*json.loads(self._store.get(key)))


def tcp_connections() -> Iterator[socket.socket]:
    """Those of this process, each open until the next."""
    for fd in map(int, os.listdir("/dev/fd")):
        # An error: it has been closed, or is not connected.
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                with socket.socket(fileno=os.dup(fd)) as connection:
                    stream = connection.type == socket.SOCK_STREAM
                    if stream and connection.family != socket.AF_UNIX and connection.getpeername():
                        yield connection


def give_up_silent_peers() -> None:
    """Makes it an error that the system of a connected process answers nothing for SILENCE seconds.

    The default is 60. A process that merely stands still has a system that answers. Raises
    UserError for other words.
    """
    text = os.environ.get("SILENCE", "60")
    if not text.isdecimal() or int(text) < 4:
        raise UserError(f"SILENCE={text} is no number of seconds from 4 on")
    seconds = int(text)
    limits = {"KEEPIDLE": seconds // 4, "KEEPINTVL": seconds // 4, "USER_TIMEOUT": 1000 * seconds}
    for connection in tcp_connections():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in limits.items():
            # Linux has them all.
            if hasattr(socket, f"TCP_{name}"):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)


def torchruns_store() -> dist.Store:
    """What torchrun's processes share before anything else."""
    store, _, _ = next(dist.rendezvous("env://"))
    # torchrun keeps it over a restart, with what those that have died have said. Machines count
    # alike where scripts/torchrun.py has started them.
    attempt = os.environ.get("RENDEZVOUS_ROUND", os.environ["TORCHELASTIC_RESTART_COUNT"])
    return dist.PrefixStore(f"attempt_{attempt}", store)


def attempt(function: Callable, *arguments: object) -> tuple[Any, tuple | None]:
    """(result, error), one of them None, for another process."""
    try:
        return function(*arguments), None
    except UserError as error:
        return None, ("user", str(error))
    except SAVE_ERRORS as error:
        return None, (getattr(error, "errno", None), one_line(error))


def answered(result: Any, error: tuple | None) -> Any:
    """The result of an attempt() elsewhere. Raises its UserError, or one of SAVE_ERRORS."""
    if error is None:
        return result
    kind, text = error
    if kind == "user":
        raise UserError(text)
    raise OSError(kind, text) if kind else RuntimeError(text)


# ---- main -------------------------------------------------------------------------------------


def main(train: Callable[[Run], None], argv: Sequence[str] | None = None, **options: Any) -> int:
    """Parses the command line, calls train(run), and ends the process with the run's exit code.

    Keyword arguments become options, or change the default of a common one; option(...) says more
    about one. With argv, in a notebook for instance, it returns the exit code instead.
    """
    try:
        code = trained(train, declared(options), argv)
    except SystemExit as end:
        # Of --help.
        code = end.code if isinstance(end.code, int) else 0
    except UserError as error:
        complain_for_all(error)
        code = 2
    if argv is None:
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
        monitor = ExitMonitor(screen, is_first_rank() and given.pop("keyboard", True))
        monitor.nothing_to_save = "Training has not begun: there is nothing to save."
        stack.enter_context(monitor)
        processes = Processes(monitor)
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
    default = os.path.abspath(options["checkpoint_dir"].default)
    directory = given.get("checkpoint_dir", default)
    resumed = checkpoint_to_resume(given.pop("resume", None), directory, processes, screen.say)
    path, state = resumed or (None, {})
    if path is not None:
        default, before = str(home_of(path)), str(state["config"].get("checkpoint_dir"))
        if default == str(fallback_directory(before).resolve()):
            default = before
    given.setdefault("checkpoint_dir", default)
    stored = state.get("config", {})
    config = configuration(options, given, stored, path)
    if config.shard and not processes.many:
        if "shard" in given or resumed is None:
            raise UserError("--shard needs processes: scripts/train_torchrun.sh 2 --shard")
        # The checkpoint of a sharded run is one like any other.
        config.shard = False
    processes.sharded = config.shard
    with fitting(path, "this program"):
        run = Run(config, processes, screen, resumed)
    # As texts: a tensor, say, has no one answer.
    own = {name: f"{stored[name]}" for name in sorted(stored.keys() - given.keys())}
    changed = (name for name, text in own.items() if text != f"{options[name].default}")
    run.differs = "".join(f", {flag(name)} {own[name]}" for name in changed)
    return run


def checkpoint_to_resume(
    name: str | None, directory: str, processes: Processes, report: Callable[[str], None]
) -> tuple[Path, dict] | None:
    """The checkpoint that --resume names, verified; None for a fresh start. Raises UserError."""

    def read(path: Path) -> dict:
        state = processes.read(path)
        if wrong := wrong_entries(state):
            text = f"not a checkpoint of this program and edition ({', '.join(wrong)})"
            raise CheckpointError(f"{path}: {text}")
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
        text = "No such file or directory; the newest is --resume latest"
        raise CheckpointError(f"{path}: {text}")
    if path.is_dir() and (found := find_checkpoints(path, lambda text: None)):
        newest = os.path.relpath(found[0].path)
        raise CheckpointError(f"{path} is a directory of checkpoints; its latest is {newest}")
    return path, read(path)


def wrong_entries(state: dict) -> list[str]:
    """What a state has not, or not as this edition saves it."""
    progress = Progress()._asdict().items()
    keys = {name: part.keys() for name, part in progress if isinstance(part, dict)}
    wrong = [name for name, kind in Run.ENTRIES.items() if not isinstance(state.get(name), kind)]
    wrong = wrong or [name for name in keys if state[name].keys() != keys[name]]
    if not wrong and not re.fullmatch("[0-9a-f]{12}", state["run_id"]):
        wrong = ["run_id"]
    return wrong or ["format_version"] * (state["format_version"] != Run.FORMAT_VERSION)


def outcome(train: Callable[[Run], None], run: Run) -> BaseException | None:
    """Trains; returns the exception that ended it, if one has, once the state is safe."""
    try:
        train(run)
        run.end()
        return None
    except Leaving:
        return None
    except (Exception, KeyboardInterrupt) as error:
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


def optimizer_in(error: BaseException) -> str | None:
    """The class in torch.optim, of an optimizer or an average, in whose code an error came up."""
    folder = os.path.dirname(torch.optim.__file__)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename.startswith(folder) and "self" in frame.f_locals:
            no_room = isinstance(error, (MemoryError, torch.OutOfMemoryError))
            return None if no_room else type(frame.f_locals["self"]).__name__
    return None


def last_words(run: Run, error: BaseException | None) -> int:
    """Prints how it ended, and leaves that in the lock file for stop.sh; returns the exit code."""
    screen = run.screen
    if isinstance(error, UserError) and not run.trained:
        raise error
    if error is None:
        if run.saved is not None and run.exit_code != 1:
            done = "All steps done!" if run.step >= run.total_steps else "The loop has ended."
            screen.say(f"🎉 {done}" if run.completed else "✨ Graceful exit completed!")
    elif run.processes.first_failure(type(error).__name__)[0] == run.rank:
        # No other rank can say more.
        if isinstance(error, UserError):
            complain_of(error)
        elif not isinstance(error, SystemExit):
            complain("".join(traceback.format_exception(error)))
    if run.trains:
        # The first machine may be gone.
        alone = error is not None and run.rank and run.processes.local_rank == 0
        if alone:
            run.name_newest()
        summary = run.summary()
        screen.say(summary)
        if alone:
            complain(f"{summary}\n")
        if run.rank == 0:
            # On a full disk scripts/stop.sh will know less.
            with contextlib.suppress(OSError):
                run.directory.write_outcome(f"{run.exit_code}\n{summary}\n")
    # A terminal that was stopped with Ctrl-S may take the last lines yet.
    screen.clear(wait=2.0)
    if error is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        # torchrun would start again what was asked to leave.
        return 0
    return run.exit_code


def complain_of(mistake: UserError) -> None:
    complain(f"error: {' '.join(str(mistake).splitlines())}\n")


def complain_for_all(mistake: UserError) -> None:
    """Of one process: torchrun ends all of them with the first that leaves."""
    if not dist.is_torchelastic_launched():
        return complain_of(mistake)
    key, store = "mistake", torchruns_store()
    if not is_first_rank():
        # The first makes the same one, as a rule.
        with contextlib.suppress(RuntimeError):
            return store.wait([key], datetime.timedelta(seconds=10))
    complain_of(mistake)
    store.set(key, "")


def choose_device(name: str) -> torch.device:
    """Raises UserError where the device is not there, or torch.distributed cannot use it."""
    present = torch.accelerator.current_accelerator(check_available=True)
    usable = ("cuda",) if dist.is_torchelastic_launched() else ("cuda", "mps")
    if name == "auto":
        return present if present is not None and present.type in usable else torch.device("cpu")
    if name == "mps" and name not in usable:
        raise UserError("--device mps: torchrun's processes cannot use it; --device cpu")
    if name != "cpu" and (present is None or present.type != name):
        found = present.type if present else "only the CPU"
        raise UserError(f"--device {name}: there is none here (found {found})")
    return torch.device(name)


def leave_process(code: int) -> NoReturn:
    """Ends the process. All is saved and said: a signal in the last moments changes nothing.

    Taking torch's modules apart would keep the accelerator's memory, and leave what is typed to
    the shell, for most of a second more.
    """
    for signum in EXIT_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    atexit._run_exitfuncs()
    buffered = io.TextIOWrapper, io.BufferedWriter
    # What the program has written to files that are still open is not lost either.
    opened = (one for one in gc.get_objects() if issubclass(type(one), buffered))
    for stream in filter(None, (sys.stdout, sys.stderr, *opened)):
        # Gone with the terminal, or closed. Who reads another pipe may have stopped.
        with contextlib.suppress(OSError, ValueError):
            if stream in (sys.stdout, sys.stderr) or stat.S_ISREG(
                os.fstat(stream.fileno()).st_mode
            ):
                stream.flush()
    os._exit(code)


# ---- The built-in program: text ---------------------------------------------------------------


def data_files(paths: Sequence[str], left_out: Path) -> dict[str, tuple[Path, int]]:
    """{name: (file, size in bytes)} of every non-empty file in paths, folders in sorted order.

    Without paths, of Python's own source, but for installed packages and tests, which some
    distributions omit. Hidden files and what is below left_out are not data. Raises UserError for
    a path without any.
    """
    library, own = sysconfig.get_path("stdlib"), not paths
    no_source = {"site-packages", "dist-packages", "test", "tests", "idle_test"}

    def wanted(name: str) -> bool:
        return name[0] != "." and not (own and name in no_source)

    found: dict[str, tuple[Path, int]] = {}
    for top in map(Path, paths or [library]):
        files, before = [top], len(found)
        if top.is_dir():
            files = []
            for folder, subfolders, names in os.walk(top):
                subfolders[:] = filter(wanted, subfolders)
                some = (name for name in filter(wanted, names) if not own or name[-3:] == ".py")
                files += [Path(folder, name) for name in some]
        for file in sorted(file for file in files if left_out not in file.parents):
            try:
                status = file.stat()
                if stat.S_ISREG(status.st_mode) and status.st_size:
                    with open(file, "rb"):
                        name = file.name if file == top else str(file.relative_to(top))
                        found[name if name not in found else str(file)] = file, status.st_size
            except OSError as error:
                raise UserError(f"--data {file}: {error.strerror}") from error
        if len(found) == before:
            text = "no text there (hidden files and the checkpoint directory are left out)"
            raise UserError(f"--data {top}: {text}")
    return found


class Corpus:
    """Files laid end to end, memory-mapped where they are read."""

    # Of a larger one, a fingerprint holds samples.
    SMALL_BYTES = 64 * 2**20

    def __init__(self, files: dict[str, tuple[Path, int]]) -> None:
        self.names, self.files = list(files), list(files.values())
        self.starts = list(itertools.accumulate((size for _, size in self.files), initial=0))

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, start: int, length: int) -> Tensor:
        """Bytes start to start + length, across the ends of files; uint8 of shape (length,)."""
        pieces = []
        number = bisect.bisect_right(self.starts, start) - 1
        while length:
            offset = start - self.starts[number]
            pieces.append(self._mapped(number)[offset : offset + length])
            start, length = start + len(pieces[-1]), length - len(pieces[-1])
            number += 1
        return torch.cat(pieces)

    def _mapped(self, number: int) -> Tensor:
        # Not kept: a mapping costs 20 us, and a kept one counts all that was read as our memory.
        path, size = self.files[number]
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)

    def fingerprint(self) -> dict[str, str]:
        """{name: a digest of its content}; of more than 1,000 files a digest for each folder."""
        digests: dict[str, Any] = {}
        for number, (name, (_, size)) in enumerate(zip(self.names, self.files)):
            label = name if len(self.names) <= 1000 else os.path.dirname(name) or "."
            digest = digests.setdefault(label, hashlib.blake2b(digest_size=8))
            digest.update(b"%d" % size)
            text, starts, length = self._mapped(number), [0], size
            if len(self) > self.SMALL_BYTES:
                starts, length = [part * max(0, size - 4096) // 7 for part in range(8)], 4096
            for start in starts:
                digest.update(text[start : start + length].numpy())
        return {label: digest.hexdigest() for label, digest in digests.items()}


class ByteDataset(Dataset):
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


def text_datasets(paths: Sequence[str], context: int, left_out: Path) -> list[ByteDataset]:
    """Training and validation data: the first 95 % of the files in paths, and the rest."""
    corpus = Corpus(data_files(paths, left_out))
    split = len(corpus) - len(corpus) // 20
    training = ByteDataset(corpus, 0, split, context)
    validation = ByteDataset(corpus, split, len(corpus), context)
    if not len(training) or not len(validation):
        text = f"{len(corpus):,} bytes are too few for --context {context}"
        raise UserError(f"--data {' '.join(paths) or '(the standard library)'}: {text}")
    return [training, validation]


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

    def forward(self, x: Tensor) -> Tensor:
        """(batch, context, dim) to the same shape."""
        gates = self.router(x).softmax(dim=-1)
        w_in = torch.stack(list(self.w_in))
        if self.theta is not None:
            self.gates, self.rotated_by = gates, MAX_ANGLE * self.theta.tanh()
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

    def __init__(self, context, layers, heads, dim, experts, dropout, rotations) -> None:
        super().__init__()
        block = dim, heads, experts, dropout, rotations
        self.token = nn.Embedding(256, dim)
        self.position = nn.Embedding(context, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(*block) for _ in range(layers))
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


def forward_backward(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    batch: Any,
    grad_accum: int = 1,
    regularization: Callable[[], Tensor | float] = lambda: 0.0,
) -> Tensor:
    """Adds the gradient of loss(batch) + regularization() to .grad; returns the mean of loss.

    A batch that is a tensor is taken in grad_accum forward passes; loss is a mean over samples.
    """
    parts = [batch] if grad_accum == 1 else batch.chunk(grad_accum)
    losses = []
    for part in parts:
        # Of many processes, the gradients meet in the last pass.
        apart: Any = getattr(model, "no_sync", None) if part is not parts[-1] else None
        with apart() if apart else contextlib.nullcontext():
            value = loss(part)
            ((value + regularization()) / len(parts)).backward()
            losses.append(value.detach())
    return torch.stack(losses).mean()


def cosine(progress: float) -> float:
    """Half a cosine, from 1 down to a tenth."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    """From 1 straight down to 0 (Bergsma et al., "Straight to Zero", 2025)."""
    return 1 - progress


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
    and rotation_lr, or their defaults in the built-in program.
    """

    def __init__(self, run: Run, model: nn.Module, loss: Callable[[Any], Tensor]) -> None:
        self.run, self.model, self.loss = run, model, loss
        defaults = {name: one.default for name, one in declared(OPTIONS).items()}
        self.options = argparse.Namespace(**{**defaults, **vars(run.options)})
        self.optimizers: dict[str, Optimizer] = {}
        self.schedulers: dict[str, LRScheduler] = {}

    def regularization(self) -> Tensor | float:
        """What is added to the loss of the last forward pass."""
        return 0.0

    def training_step(self, batch: Any) -> Tensor:
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

    def __init__(self, run: Run, model: nn.Module, loss: Callable[[Any], Tensor]) -> None:
        super().__init__(run, model, loss)
        o, parameters = self.options, model.parameters()
        optimizer = torch.optim.AdamW(parameters, o.lr, weight_decay=o.weight_decay, fused=True)
        scheduler = warmup_decay(optimizer, o.warmup_steps, run.total_steps, cosine)
        self.optimizers, self.schedulers = {"adamw": optimizer}, {"adamw": scheduler}


def orthogonalize(matrices: Tensor, group: dict) -> Tensor:
    """The nearest (semi-)orthogonal matrix, roughly, to each of matrices (count, rows, columns).

    A quintic Newton-Schulz iteration whose singular values end near 1, not at it (Jordan et al.,
    "Muon", 2024), with the settings of a group of torch.optim.Muon. In bfloat16, or in float32 on a
    CPU without bfloat16 arithmetic, which would emulate it at a fraction of the speed.
    """
    a, b, c = group["ns_coefficients"]
    emulated = matrices.is_cpu and not torch.cpu.get_capabilities().get("avx512_bf16")
    x = matrices.to(torch.float32 if emulated else torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
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
        if is_sharded(parameters[0]):
            newton_schulz = functools.partial(orthogonalize, group=group)
            update = on_whole_matrices(newton_schulz, update, parameters[0])
        else:
            update = orthogonalize(update, group)
        weights = [local(parameter) for parameter in parameters]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(update), alpha=-lr)


def local(tensor: Any) -> Tensor:
    """Of a sharded tensor this process's part, in the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def on_whole_matrices(function: Callable[[Tensor], Tensor], rows: Tensor, parameter: Any) -> Tensor:
    """function of whole matrices for a rank that has some rows of each, as of parameter.

    Every rank computes all of it. rows (count, local rows, columns), and so the result.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, shape = parameter.device_mesh, torch.Size((len(rows), *parameter.shape))
    stride = torch.empty(shape, device="meta").stride()
    spread = DTensor.from_local(rows, mesh, [Shard(1)], run_check=False, shape=shape, stride=stride)
    updated = function(spread.full_tensor())
    result = DTensor.from_local(updated, mesh, [Replicate()], run_check=False)
    return result.redistribute(placements=[Shard(1)]).to_local()


class GeometricTrainingController(TrainingController):
    """Geometric constrained learning: rotated experts, and an optimizer for each kind of parameter.

    loss = task + 0.01 orthogonality + 0.001 rotation_efficiency + 0.01 specialization, each
    averaged over the Experts of the model. `rotation`: Adam on their angles. `expert`: Muon (Jordan
    et al., 2024) on the 2-D matrices inside them or an nn.ModuleList. `embedding`: AdamW on the
    rest, the routers among it. Muon is what lowers the loss: W (R x) = (W R) x, so a rotation adds
    nothing to experts with matrices of their own. Raises UserError for a model without tg.Experts
    that have rotations.
    """

    # Muon's learning rate relative to --lr, which is AdamW's.
    MUON_LR_FACTOR = 8.0

    def __init__(self, run: Run, model: nn.Module, loss: Callable[[Any], Tensor]) -> None:
        super().__init__(run, model, loss)
        experts = (module for module in model.modules() if isinstance(module, Experts))
        self.experts = [one for one in experts if one.theta is not None]
        if not self.experts:
            text = "the model has no tg.Experts(dim, experts)"
            raise UserError(f"GeometricTrainingController: {text}")
        o, factor = self.options, self.MUON_LR_FACTOR
        # A step decays the weights by lr * weight_decay: as much as AdamW's does. Four iterations
        # instead of five: a fifth of Muon's time, and the loss falls as fast.
        muon = {"lr": factor * o.lr, "weight_decay": o.weight_decay / factor, "ns_steps": 4}
        rotation, expert, embedding = self._groups()
        adamw = torch.optim.AdamW(embedding, o.lr, weight_decay=o.weight_decay, fused=True)
        self.optimizers = {
            "rotation": torch.optim.Adam(rotation, o.rotation_lr, fused=True),
            "expert": BatchedMuon(expert, **muon),
            "embedding": adamw,
        }
        self.schedulers = {
            name: warmup_decay(optimizer, o.warmup_steps, run.total_steps, linear)
            for name, optimizer in self.optimizers.items()
        }

    def _groups(self) -> tuple[list, list, list]:
        modules = list(self.model.modules())
        lists = [one for one in modules if isinstance(one, (nn.ModuleList, Experts))]
        inside = {p for one in lists for p in one.parameters() if p.dim() == 2}
        angles = {id(one.theta) for one in self.experts}
        # What looks things up or chooses is no hidden layer.
        inside -= {one.weight for one in modules if isinstance(one, nn.Embedding)}
        inside -= {one.router.weight for one in modules if isinstance(one, Experts)}
        rotation = [p for p in self.model.parameters() if id(p) in angles]
        others = [p for p in self.model.parameters() if id(p) not in angles]
        return rotation, [p for p in others if p in inside], [p for p in others if p not in inside]

    def regularization(self) -> Tensor:
        """The three geometric losses, weighted, averaged over the model's Experts."""
        # Some may have had no part in this forward pass.
        experts = [one for one in self.experts if one.gates is not None]
        if not experts:
            return torch.zeros(())
        passes: list[Any] = [(one.gates, one.rotated_by) for one in experts]
        loads = torch.cat([gates.float().flatten(0, -2).mean(dim=0) for gates, _ in passes])
        # The value is that of all processes, the slope this one's, as for the rest of the loss.
        loads = loads + (self.run.average(loads.detach()) - loads.detach())
        each = loads.split([gates.shape[-1] for gates, _ in passes])
        total = torch.zeros((), device=loads.device)
        for one, (gates, angles), load in zip(experts, passes, each):
            one.gates = one.rotated_by = None
            total = total + 0.01 * orthogonality_loss(angles)
            total = total + 0.001 * rotation_efficiency_loss(angles)
            total = total + 0.01 * specialization_loss(gates, load)
        return total / len(passes)


# ---- The built-in program: loops --------------------------------------------------------------


def standard_training_loop(
    run: Run,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    loss: Callable[[Any], Tensor],
    evaluate: Callable[[Any], dict],
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
    run: Run, controller: TrainingController, evaluate: Callable[[Any], dict]
) -> None:
    """The same for any controller, which decides what an optimizer step on a batch is."""
    for batch in run.batches(evaluate):
        run.log(loss=controller.training_step(batch))


def train(run: Run) -> None:
    """Trains a byte-level language model on text."""
    o = run.options
    geometric = o.mode == "geometric"
    if geometric and o.loop == "standard":
        text = "the standard loop has one optimizer"
        raise UserError(f"--mode geometric needs --loop controller: {text}")
    check_model(o, run.resumed)
    training, validation = text_datasets(o.data, o.context, Path(o.checkpoint_dir).resolve())
    run.data(training, validation, batch_size=o.batch_size * o.grad_accum)
    sizes = o.context, o.layers, o.heads, o.dim, o.experts, o.dropout
    try:
        module = ByteLM(*sizes, rotations=geometric)
    except (RuntimeError, MemoryError) as error:
        raise UserError(f"no memory for a model of this size ({one_line(error)})") from error
    model = run.model(module)

    def losses(windows: Tensor) -> Tensor:
        """Nats a byte, (batch, context)."""
        windows = windows.long()
        with run.autocast():
            logits = model(windows[:, :-1])
        return F.cross_entropy(logits.float().mT, windows[:, 1:], reduction="none")

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
        raise UserError(f"--experts {o.experts} is more than --dim {o.dim} has units (4 x)")
    # A forged one must not take memory before its weights are compared with the model's.
    at_least = o.dim * (512 + o.context + o.layers * (4 * o.dim + o.experts))
    if resumed is not None and 4 * at_least > resumed.stat().st_size:
        raise CheckpointError(f"{resumed}: of another program, or too small for its sizes")


MODES, LOOPS = ("standard", "geometric"), ("standard", "controller")
OPTIONS = {
    "mode": option("standard", "one AdamW, or rotated experts and three optimizers", MODES),
    "loop": option(None, "for --mode standard (default standard)", LOOPS),
    "data": option((), "text (default Python's own source)", fixed=False, kind=os.path.abspath),
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
