#!/usr/bin/env python3
"""Train a PyTorch model and leave at any moment without losing anything.

    python train_graceful.py                        train on Python's own source text
    python train_graceful.py --mode geometric       geometric controller: rotated experts, three optimizers
    python train_graceful.py --resume latest        go on: the same run, bit for bit
    scripts/checkpoints.py list                     the checkpoints that are there

While it trains:  q + Enter  leave    s + Enter  save now    ? + Enter  the state    Ctrl-C  leave, twice without saving

Every way out (the keys, SIGINT, SIGTERM, SIGHUP, SIGUSR1, an exception) finishes or drops the batch at hand, saves a
whole checkpoint, frees the accelerator, gives the terminal back and leaves no process behind.
"""

from __future__ import annotations

import os
import signal

EXIT_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
_early_signals: list[int] = []

if __name__ == "__main__":
    # Importing torch takes seconds. A signal in that time must not kill the run with a traceback: main() hands it on.
    for _signum in EXIT_SIGNALS:
        if not (_signum == signal.SIGHUP and signal.getsignal(_signum) is signal.SIG_IGN):  # nohup's promise
            signal.signal(_signum, lambda signum, frame: _early_signals.append(signum))

import argparse
import atexit
import bisect
import collections
import contextlib
import copy
import dataclasses
import datetime
import difflib
import errno
import fcntl
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import mmap
import multiprocessing
import multiprocessing.util
import operator
import pickletools
import re
import reprlib
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
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

__all__ = [
    "ByteDataset", "ByteLM", "CheckpointError", "CheckpointWriter", "Config", "ExitMonitor", "GeometricTrainingController",
    "StandardTrainingController", "TrainingController", "UserError", "controller_training_loop", "latest_checkpoint",
    "load_checkpoint", "save_checkpoint", "standard_training_loop",
]

FORMAT_VERSION = 1
BACKGROUND_PAUSE_SECONDS = 0.5  # how long unread typing is left to the foreground program before we look again
STATUS_SECONDS = 0.1  # the status line is redrawn at most this often
TYPING_COLUMNS = 6  # right of the status line, for a space, what is typed, and the last one, where a terminal would wrap
OUTPUT_GRACE_SECONDS = 2.0  # how long the last lines wait for a terminal that was stopped with Ctrl-S
BACKLOG_BYTES = 64 * 1024  # messages kept for a terminal or pipe that takes none right now
EMERGENCY, FINAL = "Emergency checkpoint", "Final checkpoint"  # what the summary calls the last save
USER_REQUEST, USER_SAVE = "user_requested_graceful_exit", "user_requested_save"
KEYS = "Keys: q + Enter saves and leaves, s + Enter saves and goes on, Ctrl-C twice leaves without saving."
TORCHRUN_KEYS = "Keys: q + Enter saves and leaves, s + Enter saves and goes on."  # a second Ctrl-C does not reach us
HEAD_BYTES = 4096  # of a checkpoint: enough to hold the record's header and the first keys
READ_BYTES = 65536
SAME_CTRL_C_SECONDS = 0.5  # two within this time are one
PARENT_SECONDS = 0.5  # for which a child waits for its parent to hear a signal too
LINE_BYTES = 4096  # a typed line longer than this is no command
SAVE_ERRORS = (OSError, RuntimeError, MemoryError)  # what a save may fail with: disk, device (in torch's words) or memory
PIECE_BYTES = 4 * 2**20  # of a checkpoint that one thread reads or writes at a time
CACHED_BYTES = 2**18  # what a processor's cache still holds when their checksum is computed
THREADS = min(4, os.cpu_count() or 1)  # that read or write a checkpoint
PICKLE_OPCODES = 2**21  # a real checkpoint has about 30 a tensor; an empty list is one byte in the file and 64 in memory
PLAIN_TYPES = {bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size}
PLAIN_GLOBALS = set("collections.OrderedDict collections.Counter torch.Size torch.device __builtin__.complex __builtin__.set "
                    "torch.storage.UntypedStorage torch._utils._rebuild_tensor_v2 torch._utils._rebuild_tensor_v3 "
                    "torch._utils._rebuild_parameter".split())
VALIDATION_FRACTION = 0.05
VALIDATION_BATCHES = 16
FULL_FINGERPRINT_BYTES = 64 * 2**20  # larger corpora are fingerprinted by samples
FINGERPRINT_SAMPLES, FINGERPRINT_SAMPLE_BYTES = 1024, 4096
SOCKET_FOLDER_BYTES = 71  # a socket's path has at most 103 bytes on macOS, 107 on Linux; 32 are multiprocessing's own
MAX_ANGLE = math.pi / 4  # radians, of one Givens rotation
MUON_LR_FACTOR = 8.0  # Muon's learning rate relative to --lr, which is AdamW's


class UserError(Exception):
    """A mistake the user can mend: main() prints it as one line on stderr and exits with code 2."""


class CheckpointError(UserError):
    """The file is not a checkpoint, is damaged, or does not fit this run."""


# ---- Config ----------------------------------------------------------------------------------------------------------


def number(kind: Callable[[str], float], low: float, below: float = 1e15) -> Callable[[str], float]:
    """An argparse type: a number of that kind with low <= number < below; 1e3 is a whole number too."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float(text)
            if not value.is_integer():
                raise
        if value != value:
            raise ValueError
        if value >= below:
            raise argparse.ArgumentTypeError(f"{text} is too large, it must be below {below:g}")
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} is too small, it must be {low:g} or more")
        return kind(value)

    parse.__name__ = kind.__name__  # what argparse calls a text that is no number
    return parse


def nonempty_path(text: str) -> str:
    """An argparse type: an empty path is a shell variable that was never set."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return text


def option(default, help: str, fixed: bool = True, **argparse_arguments):
    """A Config field that is also a command line option; `fixed` ones cannot change when a run is resumed."""
    return dataclasses.field(default=default, metadata={"fixed": fixed, "argparse": {"help": help, **argparse_arguments}})


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run: the command line options are made from it and the checkpoint stores it."""

    mode: str = option("standard", "standard: one AdamW; geometric: rotated experts and three optimizers",
                       choices=("standard", "geometric"))
    loop: str | None = option(None, "the loop that drives --mode standard (default standard; geometric has its own)",
                              choices=("standard", "controller"))
    data: tuple[str, ...] = option((), "text files or folders to train on (default Python's standard library)",
                                   nargs="+", metavar="PATH", type=nonempty_path)
    checkpoint_dir: str = option("checkpoints", "where checkpoints and metrics.csv go", fixed=False, metavar="DIR", type=nonempty_path)
    steps: int = option(2000, "optimizer steps in the whole run, resumes included", fixed=False, type=number(int, 1))
    epochs: int | None = option(None, "end after this many passes over the data, if that comes before --steps",
                                fixed=False, type=number(int, 1))
    batch_size: int = option(16, "windows of text in one forward pass", type=number(int, 1))
    grad_accum: int = option(1, "forward passes whose gradients make one optimizer step", type=number(int, 1))
    context: int = option(128, "bytes the model sees at once", type=number(int, 1))
    layers: int = option(4, "Transformer blocks", type=number(int, 1))
    heads: int = option(4, "attention heads", type=number(int, 1))
    dim: int = option(128, "width of the model", type=number(int, 1))
    experts: int = option(4, "experts in each block", type=number(int, 1))
    dropout: float = option(0.0, "dropout probability", type=number(float, 0.0, 1.0), metavar="P")
    lr: float = option(3e-3, "peak learning rate of AdamW", type=number(float, 1e-12))
    rotation_lr: float = option(1e-2, "peak learning rate of the rotations", type=number(float, 1e-12))
    warmup_steps: int = option(50, "steps over which the learning rate rises", type=number(int, 0))
    grad_clip: float = option(1.0, "largest norm of the gradient (1e9 never clips)", type=number(float, 1e-12))
    weight_decay: float = option(0.1, "decoupled weight decay", type=number(float, 0.0, 1.0))
    eval_every: int = option(100, "steps between evaluations on the validation data", fixed=False, type=number(int, 1))
    save_every: int = option(500, "steps between periodic checkpoints", fixed=False, type=number(int, 1))
    log_every: int = option(10, "steps between rows of metrics.csv", fixed=False, type=number(int, 1))
    keep: int = option(3, "periodic checkpoints kept", fixed=False, type=number(int, 1))
    seed: int = option(0, "seed of the weights, the data order and the dropout", type=number(int, 0, 2**63))
    device: str = option("auto", "where to train", fixed=False, choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = option("auto", "autocast type; auto is bfloat16 on CUDA, float32 elsewhere", fixed=False,
                        choices=("auto", "float32", "bfloat16"))
    compile: bool = option(False, "run the model through torch.compile", fixed=False, action="store_true")
    tensorboard: bool = option(False, "also write event files for TensorBoard", fixed=False, action="store_true")
    workers: int = option(0, "DataLoader worker processes", fixed=False, type=number(int, 0, 1025))
    shard: bool = option(False, "spread the model over torchrun's processes", fixed=False, action=argparse.BooleanOptionalAction)

    @classmethod
    def from_options(cls, explicit: dict[str, object], stored: dict[str, object] | None = None) -> Config:
        """Defaults, overlaid with a checkpoint's configuration, overlaid with the options given on the command line.

        Raises UserError for values that do not go together or that would change what a resumed run is.
        """
        if stored is not None:
            for field in dataclasses.fields(cls):
                given, kept = explicit.get(field.name), stored[field.name]
                if field.name in explicit and field.metadata["fixed"] and field.name != "data" and given != kept:
                    flag = "--" + field.name.replace("_", "-")
                    raise UserError(f"{flag} {given} does not fit the checkpoint, whose run has {flag} {kept}")
        values = {**(stored or {}), **explicit}
        if values.get("loop") is None:
            values["loop"] = "controller" if values.get("mode") == "geometric" else "standard"
        values["checkpoint_dir"] = os.path.abspath(values.get("checkpoint_dir", cls.checkpoint_dir))
        values["data"] = tuple(os.path.abspath(path) for path in values.get("data", ()))
        config = cls(**values)
        if config.mode == "geometric" and config.loop == "standard":
            raise UserError("--mode geometric needs --loop controller: the standard loop has a single optimizer")
        if config.dim % config.heads:
            raise UserError(f"--dim {config.dim} is not divisible by --heads {config.heads}")
        if config.mode == "geometric" and config.dim < 2:
            raise UserError(f"--mode geometric needs --dim 2 or more to rotate, not {config.dim}")
        if 4 * config.dim < config.experts:
            raise UserError(f"--experts {config.experts} is more than the {4 * config.dim} hidden units that --dim {config.dim} makes")
        return config


# ---- Terminal output and the exit monitor ----------------------------------------------------------------------------


def in_foreground(fd: int) -> bool:
    """False only where fd is our controlling terminal and the shell has given it to another job."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:  # not a terminal, or not our controlling one: job control does not apply
        return True


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first_rank() -> bool:
    """Only rank 0 of many processes speaks."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


def typed_at_us(terminal: int) -> bool:
    """False where a shell has given the terminal to another job, so that what is typed there is not ours to read."""
    try:
        os.tcgetpgrp(terminal)
    except OSError:
        if started_by_torchrun() and os.isatty(terminal) and shutil.which("ps"):
            # It gave us a session of our own; only torchrun itself is one of the shell's jobs. + means the foreground.
            answer = subprocess.run(["ps", "-o", "stat=", "-p", str(os.getppid())], capture_output=True, text=True)
            return "+" in answer.stdout
    return in_foreground(terminal)


def from_the_background(function: Callable) -> Callable:
    """A decorator: reading, writing or setting the terminal from the background is just an error, and does not stop the process.

    The signals are blocked for this thread alone. Ignored, they would be so in every program that is executed, too.
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
    with contextlib.suppress(OSError):
        print(text, end="", file=sys.stderr, flush=True)


def descriptor(stream: typing.TextIO | None) -> int | None:
    """None for a stream that was closed by the parent or is no file, as in a notebook."""
    try:
        return None if stream is None else stream.fileno()
    except (OSError, ValueError):
        return None


def short_time(seconds: float) -> str:
    """In its largest unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


class Screen:
    """Lines for people on standard output; a failed or refused write never raises and never blocks training.

    It writes with os.write because text left in Python's own buffer by a failed flush turns exit code 0 into 120.
    """

    def __init__(self, shown: bool = True) -> None:
        self._lock = threading.Lock()
        self._shown = shown  # by one of many processes
        self._fd = descriptor(sys.stdout) if shown else None
        self._encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        # Python answers LANG=C with UTF-8; the person who set it has a terminal that shows no symbols.
        locale = os.environ.get("LC_ALL") or os.environ.get("LANG")
        if locale in ("C", "POSIX") and not {"PYTHONUTF8", "PYTHONIOENCODING"} & os.environ.keys():
            self._encoding = "ascii"
        self.is_terminal = self._fd is not None and os.isatty(self._fd)
        self._status_width = 0  # columns that the status line now on the screen takes
        self._backlog = b""

    def say(self, text: str) -> None:
        """Prints text and a newline, below whatever the status line showed last."""
        with self._lock:
            self._write(self._erase_status() + text + "\n")

    def status(self, parts: Sequence[str], fraction: float | None = None) -> None:
        """Redraws the status line in place: as many of parts, the most important first, as fit, and how far it is, if known.

        Draws nothing unless stdout is a terminal and ours.
        """
        if not self.is_terminal or not in_foreground(self._fd):
            return
        with self._lock:
            try:
                columns = os.get_terminal_size(self._fd).columns or 80
            except OSError:  # the terminal has just gone
                return
            width, least = min(20, columns // 10), min(2, len(parts))
            bar = "" if fraction is None else f"[{'#' * round(width * fraction):-<{width}}] "
            lines = [bar + " | ".join(parts[:count]) for count in range(len(parts), least - 1, -1)]
            lines += [" | ".join(parts[:least]), parts[0]]
            room = max(1, columns - TYPING_COLUMNS)
            text = next((line for line in lines if len(line) <= room), parts[0][:room]) + " "
            if not self._backlog:  # a line that is redrawn anyway is not worth keeping for later
                self._write("\r" + text.ljust(min(self._status_width, columns - 1)), keep=False)
                self._status_width = len(text)

    def clear(self, wait: float = 0.0) -> None:
        """Leaves no status line behind; for so many seconds a stopped terminal may take what it has not shown yet."""
        with self._lock:
            self._write(self._erase_status(), wait=wait)

    def _erase_status(self) -> str:
        erase = "\r" + " " * self._status_width + "\r" if self._status_width else ""
        self._status_width = 0
        return erase

    @from_the_background
    def _write(self, text: str, keep: bool = True, wait: float = 0.0) -> None:
        if self._fd is None:
            if self._shown and sys.stdout is not None:  # a notebook's
                sys.stdout.write(text)
            return
        self._backlog = (self._backlog + text.encode(self._encoding, "replace"))[-BACKLOG_BYTES:]
        try:
            while self._backlog and select.select([], [self._fd], [], wait)[1]:
                self._backlog = self._backlog[os.write(self._fd, self._backlog[:select.PIPE_BUF]) :]
        except OSError:  # terminal hung up, pipe closed, disk full: nobody to tell, and training matters more
            self._backlog = b""
        if not keep:
            self._backlog = b""


class ExitMonitor:
    """Watches keyboard and signals in one background thread while the main thread trains.

    Use it as a context manager in the main thread and read `exit_requested`, a plain attribute, once per batch:

        with ExitMonitor() as monitor:
            for batch in batches:
                train_on(batch)
                if monitor.exit_requested:
                    break

    `reason` and `exit_code` describe the first request; `save_requested` is set when `s` was typed. The thread sleeps
    in select() on stdin, on the pipe to which the interpreter's C signal handler writes (signal.set_wakeup_fd), and on
    its own stop pipe, so it hears a request while the main thread is inside a long torch operation. A second SIGINT,
    half a second or more after the first, ends the process at once with code 130. On leaving the block, terminal and
    signal handlers are as before.

    Child processes never reach it: a signal to the whole group is left to the parent by those that it has forked,
    DataLoader workers among them (see SignalsOfChildren).

    The terminal's mode is never changed, only put back where something else changed it. Raises ValueError when entered
    outside the main thread.
    """

    def __init__(self, screen: Screen | None = None, keyboard: bool = True) -> None:
        self.exit_requested = False
        self.reason: str | None = None
        self.exit_code = 0
        self.save_requested = False
        self.describe: Callable[[], str] | None = None  # what ? + Enter shows below the keys
        self._screen = screen or Screen()
        self._use_keyboard = keyboard
        self._requests: list[tuple[str, int]] = []  # (reason, exit code), oldest first
        self._lock = threading.Lock()
        self.signals_heard, self._interrupted = 0, -math.inf  # how many; when SIGINT was last heard
        self._stdin: int | None = None
        self._listening = False  # until the end of input
        self._typed = b""  # the beginning of a line whose end has not come yet
        self._terminal_settings: list | None = None

    def __enter__(self) -> ExitMonitor:
        with contextlib.ExitStack() as self._undo:
            self._signal_pipe, wakeup = self._pipe()
            self._stop_pipe, self._stop = self._pipe()
            os.set_blocking(wakeup, False)
            self._undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False))
            self._pid, self._wakeup = os.getpid(), wakeup
            before = {signum: signal.getsignal(signum) or signal.SIG_DFL for signum in EXIT_SIGNALS}
            if before[signal.SIGHUP] is signal.SIG_IGN:  # nohup's promise
                del before[signal.SIGHUP]
            self._children = self._undo.enter_context(SignalsOfChildren(before))
            for signum in before:
                self._handle(signum, self._handler)
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
        if os.getpid() != self._pid:  # a forked child that leaves the block: all of this is its parent's
            return
        os.write(self._stop, b"x")
        self._thread.join()
        self._restore_terminal()
        self._undo.close()

    def request(self, reason: str, exit_code: int) -> None:
        """Asks for a graceful exit and says so on the screen; the same reason counts once."""
        with self._lock:
            if any(reason == known for known, _ in self._requests):
                return
            if not self._requests:  # said before the main thread can know, whose next line must come after this one
                self._screen.say("🛑 Exit requested! Finishing current batch gracefully...")
            self._requests.append((reason, exit_code))
            self._publish()

    def hear(self, signum: int) -> None:
        """Turns a signal into a request; the second SIGINT ends the process.

        Wrappers such as timeout deliver a Ctrl-C twice: those within half a second are one.
        """
        self.signals_heard += 1
        if signum not in EXIT_SIGNALS:
            return
        self._children.parent_heard(signum)
        if signum == signal.SIGINT:
            now, last = time.monotonic(), self._interrupted
            self._interrupted = now
            if last != -math.inf and now - last > SAME_CTRL_C_SECONDS:
                self._abandon()
            if last == -math.inf and self.exit_requested:
                self._screen.say("Leaving already. Ctrl-C once more leaves without saving.")
        self.request(f"signal_{signal.Signals(signum).name}", 128 + signum)

    def _handler(self, signum: int, frame: object) -> None:
        """In the main thread, when it comes to it. The byte in the pipe is what counts, unless another has taken its place.

        An asyncio loop with signal handlers takes the wake-up descriptor, and puts none back when it is closed.
        """
        other = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        if other != self._wakeup:
            os.write(self._wakeup, bytes([signum]))
            if other != -1:
                signal.set_wakeup_fd(other, warn_on_full_buffer=False)

    def withdraw(self, reason: str) -> None:
        """Takes a request back, for a save that failed; one that came after it stays."""
        with self._lock:
            self._requests = [request for request in self._requests if request[0] != reason]
            self._publish()

    def _publish(self) -> None:
        self.reason, self.exit_code = self._requests[0] if self._requests else (None, 0)
        self.exit_requested = bool(self._requests)

    def _pipe(self) -> tuple[int, int]:
        ends = os.pipe()
        for fd in ends:
            self._undo.callback(os.close, fd)
        return ends

    @staticmethod
    def _open_keyboard(fd: int) -> int:
        """A descriptor of our own, so that nobody closes it under select().

        Of a terminal one that does not wait: around fg, the shell may read the line that select() has announced to us, and
        O_NONBLOCK on the descriptor that we share with the shell would be its trouble.
        """
        if os.isatty(fd):
            with contextlib.suppress(OSError):  # no name for it here, or not ours to open
                return os.open(os.ttyname(fd), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        return os.dup(fd)

    def _handle(self, signum: int, handler) -> None:
        previous = signal.signal(signum, handler)
        self._undo.callback(signal.signal, signum, signal.SIG_DFL if previous is None else previous)

    @from_the_background
    def _watch(self) -> None:
        pause = None
        while True:
            keyboard = [self._stdin] if self._listening and pause is None else []
            ready, _, _ = select.select([self._signal_pipe, self._stop_pipe, *keyboard], [], [], pause)
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
                else:  # typed at somebody else, and not ours to read. fg sends no signal to a running job: look again
                    pause = BACKGROUND_PAUSE_SECONDS

    def _read_keyboard(self) -> None:
        """Hears what was typed."""
        self._save_terminal()
        try:
            data = os.read(self._stdin, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:  # EIO: the terminal has gone, or was given to another job this very moment
            data = b""
        if not data:
            self._typed = b""
            try:
                termios.tcgetattr(self._stdin)  # a terminal that is still there: only Ctrl-D on an empty line
            except termios.error:
                self._listening = False
            return
        *lines, self._typed = (self._typed + data).split(b"\n")
        self._typed = self._typed[:LINE_BYTES]
        commands = [line.strip().lower() for line in lines]
        if any(command in (b"q", b"quit", b"exit") for command in commands):
            self.request(USER_REQUEST, 0)
        elif b"s" in commands:
            self.save_requested = True
            self._screen.say("💾 Saving a checkpoint after this batch...")
        elif commands and not self.exit_requested and os.isatty(self._stdin):
            self._screen.say(TORCHRUN_KEYS if started_by_torchrun() else KEYS)
            if b"?" in commands and self.describe is not None:
                self._screen.say(self.describe())

    def _abandon(self) -> typing.NoReturn:
        """Ends the process here and now: the main thread may be inside a write or a kernel that takes minutes."""
        self._screen.say("🛑 Second Ctrl-C: leaving without saving. Earlier checkpoints are whole.")
        self._restore_terminal()
        end_children()
        os._exit(128 + signal.SIGINT)

    def _save_terminal(self) -> None:
        # Only ours to remember while we are in the foreground: in the background it is in the shell's editing mode.
        if self._terminal_settings is None and os.isatty(self._stdin) and in_foreground(self._stdin):
            self._terminal_settings = termios.tcgetattr(self._stdin)

    @from_the_background
    def _restore_terminal(self) -> None:
        if self._terminal_settings is None or not in_foreground(self._stdin):
            return
        try:
            # TCSANOW: waiting for output to drain would hang on a terminal stopped with Ctrl-S.
            termios.tcsetattr(self._stdin, termios.TCSANOW, self._terminal_settings)
            termios.tcflush(self._stdin, termios.TCIFLUSH)  # a q typed too many is not for the shell
        except termios.error:  # hung up: no terminal left to restore
            pass


class SignalsOfChildren:
    """What signals do in the children of a process that an ExitMonitor watches; a context manager.

    A terminal or a scheduler signals the whole group. A child leaves to its parent what the parent has heard too, within
    a second; else it does what it would without a monitor, so that terminate() ends it. Its handlers are Python's, which
    a program that it executes does not inherit (as it would an ignored or a blocked signal).
    """

    active: SignalsOfChildren | None = None

    def __init__(self, before: dict[int, typing.Any]) -> None:
        self._before = before  # the handlers of the time without a monitor, by signal
        self._heard = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("d")  # shared: when the parent last heard each signal

    def __enter__(self) -> SignalsOfChildren:
        self._outer, SignalsOfChildren.active = SignalsOfChildren.active, self
        self._terminate = multiprocessing.process.BaseProcess.terminate

        def terminate(process: multiprocessing.process.BaseProcess) -> None:
            self._heard[signal.SIGTERM] = 0.0  # this one is meant for the child
            self._terminate(process)

        multiprocessing.process.BaseProcess.terminate = terminate
        return self

    def __exit__(self, *exc_info) -> None:
        multiprocessing.process.BaseProcess.terminate = self._terminate
        SignalsOfChildren.active = self._outer

    def parent_heard(self, signum: int) -> None:
        self._heard[signum] = time.monotonic()

    def in_child(self) -> None:
        signal.set_wakeup_fd(-1)  # the parent's pipe
        for signum in self._before:
            signal.signal(signum, self._in_child)
        if workers := sys.modules.get("torch.utils.data._utils.signal_handling"):
            # A DataLoader worker takes a handler for SIGTERM that ends it whoever has sent it. Ours comes after that.
            set_handlers = workers._set_worker_signal_handlers

            def set_our_handler_too() -> None:
                set_handlers()
                signal.signal(signal.SIGTERM, self._in_child)

            workers._set_worker_signal_handlers = set_our_handler_too

    def _in_child(self, signum: int, frame: object) -> None:
        deadline = time.monotonic() + PARENT_SECONDS
        while time.monotonic() < deadline:
            if time.monotonic() - self._heard[signum] < 1:
                return
            time.sleep(0.005)  # the parent's monitor may not have come to it yet, and nothing will tell
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


os.register_at_fork(before=before_fork, after_in_parent=after_fork, after_in_child=after_fork_in_child)


def end_children() -> None:
    """Kills and reaps the DataLoader workers that are still there; they hold nothing worth saving."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join()


# ---- Checkpoints -----------------------------------------------------------------------------------------------------
#
# A checkpoint is what torch.save writes: a zip file with a pickle (data.pkl), which holds everything but the bytes of
# the tensors, and a record for each storage (data/0, data/1, ...), in the order in which the pickle first meets them.
# torch writes the file without those bytes; they are then put in their places by several threads, or several processes.


class Record(typing.NamedTuple):
    """A storage's bytes within a checkpoint."""

    name: str
    start: int  # in the file
    size: int
    crc: int  # CRC-32 as the zip file's directory has it
    crc_at: int  # where it stands there


class Part(typing.NamedTuple):
    """Some consecutive bytes of a record."""

    record: int  # its number
    start: int  # in the record
    data: Tensor  # uint8, 1-D, on any device

    def divided(self) -> Iterator[Part]:
        """In pieces that one thread reads or writes at a time, small enough for every system call."""
        for first in range(0, len(self.data), PIECE_BYTES):
            yield Part(self.record, self.start + first, self.data[first : first + PIECE_BYTES])


@dataclasses.dataclass(frozen=True)
class Rows:
    """What one of many processes has of a tensor: consecutive rows. In a checkpoint the tensor is whole."""

    local: Tensor  # (some rows, ...)
    first: int  # row
    shape: torch.Size  # of the whole


def save_checkpoint(state: dict, path: Path | str) -> None:
    """Writes state, as torch.save does, so that path is, at every instant, old or whole.

    State is nested dicts, lists and tuples of dense tensors, numbers (numpy's scalars become Python's), texts, None, and
    what else torch.load(weights_only=True) takes and cannot grow: dtypes, devices, sizes, sets. The file is written beside
    its target, flushed to the disk, renamed, and the directory flushed. Raises TypeError, with the place, for anything
    else in state; OSError, or what torch raises where memory or a device fails it (SAVE_ERRORS). Whatever is raised, the
    file that was at path before is untouched.
    """
    if not isinstance(state, dict):
        raise TypeError(f"state is a {type(state).__qualname__}, not a dict")
    write_checkpoint(state, Path(path), Processes(None))


def write_checkpoint(state: dict, path: Path, processes: Processes) -> None:
    """save_checkpoint for the processes that write one file together, each the Rows that it has, the first all else.

    Raises one of SAVE_ERRORS, the same in all of them.
    """
    # Of this save alone: others may write the same path at the same time.
    token = processes.lead(lambda: uuid.uuid4().hex[:8])
    temporary = path.with_name(f".{path.stem}.{token}{path.suffix}.tmp")
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, f"{path} is a directory, pipe or device, which a checkpoint must not replace")
    shown, parts = laid_out(state, processes.rank)
    try:
        processes.lead(write_without_data, shown, temporary)
        checksums = processes.each(write_parts, parts, temporary)
        processes.lead(publish, temporary, checksums, path)
    except BaseException:
        if processes.rank == 0:
            with contextlib.suppress(OSError):  # a file system that takes no change: the next start clears up
                temporary.unlink(missing_ok=True)
        raise


def laid_out(state: dict, rank: int) -> tuple[dict, list[Part]]:
    """State as torch.save is to see it, and this process's part of each record, in the order of the records.

    Raises TypeError for what load_checkpoint would refuse, and names its place.
    """
    parts: dict[int, Part] = {}  # by the identity of the storage
    stand_ins: dict[int, Tensor] = {}
    mode = functools.cache(memory_free_mode)

    def add(tensor: Tensor, start: int, data: Callable[[], Tensor]) -> int:
        storage = tensor.untyped_storage()._cdata
        if storage not in parts:
            parts[storage] = Part(len(parts), start, data())
        return storage

    def shown(value: object) -> object:
        if isinstance(value, Rows):
            row = math.prod(value.shape[1:]) * value.local.element_size()
            storage = add(value.local, value.first * row, lambda: value.local.contiguous().flatten().view(torch.uint8))
            if storage not in stand_ins:
                with mode():
                    stand_ins[storage] = torch.empty(value.shape, dtype=value.local.dtype)
            return stand_ins[storage]
        value = savable(value)
        if isinstance(value, Tensor):
            storage = add(value, 0, lambda: storage_bytes(value)[: None if rank == 0 else 0])
            if not value.is_cpu:
                if storage not in stand_ins:
                    with mode():
                        stand_ins[storage] = torch.empty(len(storage_bytes(value)) // value.element_size(), dtype=value.dtype)
                return stand_ins[storage].as_strided(value.shape, value.stride(), value.storage_offset())
        return value

    try:
        return mapped(state, shown), list(parts.values())
    except TypeError as error:
        raise TypeError(f"state{error}") from None


def storage_bytes(tensor: Tensor) -> Tensor:
    """All bytes of the memory that a tensor is a view of; uint8, 1-D."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def memory_free_mode() -> contextlib.AbstractContextManager:
    """In it torch makes tensors that torch.save takes for ones on the CPU, though they have no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # its first use takes most of a second

    return FakeTensorMode()


def savable(value: object) -> object:
    """A leaf of a state, numpy's scalars as Python's. Raises TypeError for what load_checkpoint would refuse."""
    if isinstance(value, np.generic):
        value = value.item()
    kind = type(value)
    if kind is int and value.bit_length() > 2000:
        raise TypeError(" is an integer that torch.load(weights_only=True) would refuse: it has more than 2,000 bits")
    if kind in PLAIN_TYPES or kind is set and all(type(item) in PLAIN_TYPES for item in value):
        return value
    what = f"{kind.__module__}.{kind.__qualname__}"
    if kind in (Tensor, nn.Parameter):
        if value.layout == torch.strided and not (value.is_meta or value.is_nested or value.is_quantized or vars(value)):
            # One that is larger than its memory (expanded) would be refused: small files must not become large states.
            return value if value.nbytes <= value.untyped_storage().nbytes() else value.contiguous()
        what += f" ({value.dtype}, {value.layout})"
    raise TypeError(f" is a {what} that load_checkpoint would refuse: only dense tensors without attributes, numbers, texts, None, and "
                    "dicts, lists and tuples of them can be saved (as float(x), x.tolist(), str(x), vars(x), sorted(x), x.state_dict() make them)")


def mapped(state: object, change: Callable[[typing.Any], object]) -> typing.Any:
    """Nested dicts, lists and tuples with change(leaf) in place of every leaf; what did not change stays the same object.

    Raises what change raises, a TypeError with the place in front of it ("['model'][0] is a ..."); also where the pickle
    would be longer than load_checkpoint reads, or lists that hold each other again and again would be if written out.
    """
    known: dict[int, tuple[typing.Any, int]] = {}  # by identity: what an object has become, and opcodes it takes at most

    def visit(value: typing.Any) -> tuple[typing.Any, int]:
        kind = type(value)
        if kind not in (dict, collections.OrderedDict, collections.Counter, list, tuple):
            return change(value), 64 if isinstance(value, (Tensor, Rows)) else 2
        if id(value) in known:
            return known[id(value)]
        is_dict, new, same, opcodes = issubclass(kind, dict), {}, True, 16
        for key in list(value) if is_dict else range(len(value)):
            try:
                place = change(key)
                new[place], more = visit(value[key])
            except TypeError as error:
                raise TypeError(f"[{key!r}]{error}") from None
            same = same and place is key and new[place] is value[key]
            opcodes += more + 2
        attributes = {}
        if kind is collections.OrderedDict and vars(value):  # _metadata, in a module's state_dict
            attributes, more = visit(vars(value))
            same, opcodes = same and attributes is vars(value), opcodes + more
        if opcodes > PICKLE_OPCODES:
            raise TypeError(f" holds more values beside its tensors than the {PICKLE_OPCODES:,} that load_checkpoint reads")
        made = value if same or is_dict else kind(new.values())
        if is_dict and not same:
            made = copy.copy(value)
            made.clear()
            made.update(new)
            if attributes:
                vars(made).update(attributes)
        return known.setdefault(id(value), (made, opcodes))

    return visit(state)[0]


def write_without_data(state: dict, path: Path) -> None:
    """torch.save, but where the bytes of the tensors belong the new file has holes, which take no place on the disk."""
    new_folders = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    checksums_wanted = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        with open(path, "xb") as file, disk_errors(), torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(state, file)
    finally:
        torch.serialization.set_crc32_options(checksums_wanted)
    flush_names(*(new.parent for new in new_folders))


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """torch's zip writer stumbles over the write that failed before it; what is raised is why that one did."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def read_records(file: typing.BinaryIO) -> list[Record]:
    """The storages of a checkpoint, by number. Raises zipfile.BadZipFile, OSError or struct.error where it is none."""
    with zipfile.ZipFile(file) as archive:
        found, entry = {}, archive.start_dir
        for info in archive.infolist():
            if number := re.fullmatch("[^/]+/data/([0-9]+)", info.filename):
                lengths = struct.unpack("<26x2H", os.pread(file.fileno(), 30, info.header_offset))
                start = info.header_offset + 30 + sum(lengths)
                found[int(number[1])] = Record(f"data/{number[1]}", start, info.file_size, info.CRC, entry + 16)
            entry += 46 + len(info.orig_filename.encode()) + len(info.extra) + len(info.comment)
    return [found[number] for number in sorted(found)]


def write_parts(parts: Sequence[Part], path: Path) -> list[int]:
    """Writes parts of records to their places and flushes them; what each record's checksum owes to them."""
    with open(path, "r+b", buffering=0) as file:
        records = read_records(file)
        if len(records) != len(parts):
            raise RuntimeError("torch.save has written other storages than those in the state")

        def write(part: Part) -> int:
            data = part.data.cpu().numpy().data
            start, done, crc = records[part.record].start + part.start, 0, 0
            while done < len(data):
                count = os.pwrite(file.fileno(), data[done : done + CACHED_BYTES], start + done)
                crc, done = zlib.crc32(data[done : done + count], crc), done + count
            if hasattr(os, "posix_fadvise"):
                # On Linux this starts the write to the disk without waiting for it; dirty pages are not dropped.
                os.posix_fadvise(file.fileno(), start, len(data), os.POSIX_FADV_DONTNEED)
            return crc

        checksums = moved(parts, write, records)
        flush_to_disk(file.fileno())
    return checksums


def publish(temporary: Path, checksums: Sequence[list[int]], path: Path) -> None:
    """Puts the records' checksums, of which each process knows its share, into a file whose bytes are there, and gives it its name."""
    with open(temporary, "r+b", buffering=0) as file:
        for record, shares in zip(read_records(file), zip(*checksums)):
            crc = functools.reduce(operator.xor, shares).to_bytes(4, "little")
            os.pwrite(file.fileno(), crc, record.crc_at)
            if record.size:  # behind it torch has written a signature and, again, the checksum
                os.pwrite(file.fileno(), crc, record.start + record.size + 4)
        flush_to_disk(file.fileno())
    os.replace(temporary, path)
    flush_names(path.parent)


def moved(parts: Sequence[Part], move: Callable[[Part], int], records: Sequence[Record]) -> list[int]:
    """Reads or writes parts, piece by piece, in several threads: move(piece) returns its CRC-32.

    Returns what each record's CRC-32 owes to these parts: XORed over all parts of a record, it is the record's.
    """
    batches: list[list[Part]] = [[]]
    room = PIECE_BYTES
    for piece in itertools.chain.from_iterable(part.divided() for part in parts):
        if len(piece.data) > room:
            batches.append([])
            room = PIECE_BYTES
        batches[-1].append(piece)
        room -= len(piece.data)
    checksums = [0] * len(records)
    with ThreadPoolExecutor(THREADS) as threads:
        run = threads.map if len(batches) > 1 else map  # after an error those that have not begun are dropped
        for batch, crcs in zip(batches, run(lambda batch: [move(piece) for piece in batch], batches)):
            for piece, crc in zip(batch, crcs):
                behind = records[piece.record].size - piece.start - len(piece.data)
                checksums[piece.record] ^= crc32_followed_by(behind, crc)
    return checksums


def crc32_followed_by(size: int, crc: int) -> int:
    """What bytes with this CRC-32 are worth with size bytes behind them: crc * x ** (8 * size), modulo the CRC's polynomial.

    As in crc32_combine of zlib 1.2.12 (Mark Adler).
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
    """a * b modulo the polynomial of CRC-32; the lowest power of x stands in the highest of 32 bits."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
    return product


def flush_names(*folders: Path) -> None:
    """Makes the names in folders as durable as the files they stand for, where the file system knows how to."""
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
        with contextlib.suppress(OSError):  # a file system without it still has fsync
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


@contextlib.contextmanager
def opened_checkpoint(path: Path | str) -> Iterator[CheckpointReader]:
    """A checkpoint for reading. Whatever goes wrong with it, here or in the block, is a CheckpointError."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise CheckpointError(f"{path}: a directory, pipe or device, not a checkpoint")
        with open(path, "rb") as file:
            check_records(file)
            yield CheckpointReader(file)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # zipfile and torch have dozens of ways to stumble over damage; all mean the same here
        raise CheckpointError(f"{path}: damaged, or not a checkpoint ({one_line(error)})") from error


def check_records(file: typing.BinaryIO) -> None:
    """Raises ValueError, or what zipfile raises, for a file that torch.save cannot have written, or whose small records are damaged.

    torch.load(weights_only=True) runs no code, but builds objects of any size (a bytearray, say): so the names that the
    pickle refers to are compared with those that tensors and plain values need.
    """
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        names = [record.orig_filename for record in records]
        folder = names[0].partition("/")[0] if names else ""
        # torch finds records without regard to case, zipfile cuts names at a NUL: no name may mean two things.
        name = re.compile(re.escape(folder) + r"/(data/[0-9]+|\.data/serialization_id|[a-z_.]+)")
        if not folder.strip(".") or len(set(names)) < len(names) or f"{folder}/data.pkl" not in names or not all(map(name.fullmatch, names)):
            raise ValueError("its records are not torch.save's")
        # An attribute that calls a record a folder makes torch return memory that it never filled.
        if any(record.compress_type != zipfile.ZIP_STORED or record.external_attr for record in records):
            raise ValueError("its records are compressed, or no files")
        if sum(record.file_size for record in records) > os.fstat(file.fileno()).st_size:
            raise ValueError("its records lie upon each other")
        for record in records:
            if "/data/" not in record.filename:
                archive.read(record)  # raises where its checksum is wrong
        for number, (opcode, argument, _) in enumerate(pickletools.genops(archive.read(f"{folder}/data.pkl"))):
            if number > PICKLE_OPCODES:
                raise ValueError(f"more than {PICKLE_OPCODES:,} values beside its tensors")
            if opcode.name == "GLOBAL" and not is_plain(*argument.split(" ")):
                raise ValueError(f"it refers to {argument.replace(' ', '.')}")


def is_plain(module: str, name: str) -> bool:
    """True for what the pickle of a tensor or a plain value refers to, and nothing that takes a size."""
    return f"{module}.{name}" in PLAIN_GLOBALS or module == "torch" and (
        name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype))


class CheckpointReader:
    """An open checkpoint: `state`, with tensors on the meta device, whose bytes are read where they are asked for.

    whole() and rows() return tensors that read() fills, all at once and by several threads.
    """

    def __init__(self, file: typing.BinaryIO) -> None:
        self.file, self.records = file, read_records(file)
        self._numbers = {record.start: number for number, record in enumerate(self.records)}
        self._parts: list[Part] = []  # yet to be read
        self._storages: dict[int, torch.UntypedStorage] = {}  # of the records asked for as a whole
        file.seek(0)
        self.state = torch.load(file, map_location="meta", weights_only=True)
        if not isinstance(self.state, dict):
            raise ValueError(f"holds a {type(self.state).__name__}")
        mapped(self.state, self._checked)

    def _checked(self, value: object) -> object:
        """A leaf of state. Raises TypeError or ValueError for what save_checkpoint does not save."""
        if not isinstance(value, Tensor):
            return savable(value)
        self._number(value)
        return value

    def _number(self, tensor: Tensor) -> int:
        """Of the record of a tensor of state. Raises ValueError where the tensor claims more than is there."""
        storage = tensor.untyped_storage()
        number = self._numbers.get(storage._checkpoint_offset)
        if number is None or storage.nbytes() != self.records[number].size or tensor.nbytes > storage.nbytes():
            raise ValueError("a tensor does not fit its record")
        return number

    def whole(self, tensor: object) -> object:
        """For a tensor of state one on the CPU; those that share memory in the checkpoint share it here. Other leaves stay."""
        if not isinstance(tensor, Tensor):
            return tensor
        number = self._number(tensor)
        if number not in self._storages:
            self._storages[number] = torch.UntypedStorage(self.records[number].size)
            self._parts.append(Part(number, 0, torch.empty(0, dtype=torch.uint8).set_(self._storages[number])))
        return like(tensor, self._storages[number], tensor.storage_offset())

    def rows(self, tensor: Tensor, first: int, last: int) -> Tensor:
        """For a tensor of state one on the CPU with its rows first ... last - 1, in memory of its own."""
        part = tensor[first:last]
        extent = part.element_size() * (1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride())))
        storage = torch.UntypedStorage(extent if part.numel() else 0)
        self._parts.append(Part(self._number(tensor), part.storage_offset() * part.element_size(), torch.empty(0, dtype=torch.uint8).set_(storage)))
        return like(part, storage, 0)

    def share(self, rank: int, world_size: int) -> None:
        """Asks for an equal share of every record, for nothing but its checksum."""
        for number, record in enumerate(self.records):
            first, last = (record.size * r // world_size for r in (rank, rank + 1))
            self._parts.append(Part(number, first, torch.empty(last - first, dtype=torch.uint8, device="meta")))

    def read(self) -> list[int]:
        """Reads what was asked for; what each record's checksum owes to it. Raises ValueError where the file has been cut."""
        parts, self._parts = self._parts, []
        return moved(parts, self._read, self.records)

    def _read(self, part: Part) -> int:
        data = torch.empty(len(part.data), dtype=torch.uint8) if part.data.is_meta else part.data
        left, start, crc = data.numpy().data, self.records[part.record].start + part.start, 0
        while left:
            count = os.preadv(self.file.fileno(), [left[:CACHED_BYTES]], start)
            if not count:
                raise ValueError("it has been cut")
            crc, left, start = zlib.crc32(left[:count], crc), left[count:], start + count
        return crc


def check_checksums(path: Path | str, records: Sequence[Record], checksums: Sequence[list[int]]) -> None:
    """Raises CheckpointError unless the records, of which each of these has read a part, are what was written."""
    for record, shares in zip(records, zip(*checksums)):
        if functools.reduce(operator.xor, shares) != record.crc:
            raise CheckpointError(f"{path}: damaged checkpoint (record {record.name})")


def like(tensor: Tensor, storage: torch.UntypedStorage, offset: int) -> Tensor:
    """A view of storage as a tensor of a checkpoint's state, which is on the meta device, is of its own."""
    new = torch.empty(0, dtype=tensor.dtype).set_(storage, offset, tensor.shape, tensor.stride())
    new = new.conj() if tensor.is_conj() else new
    new = torch._neg_view(new) if tensor.is_neg() else new
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new.requires_grad_(tensor.requires_grad)


def load_checkpoint(path: Path | str) -> dict:
    """The content of a file that save_checkpoint or torch.save wrote, tensors on the CPU. No code in it is ever run.

    Every record's checksum is compared with what has arrived in memory: torch.load alone misses a flipped bit. Raises
    CheckpointError where the file cannot be read, is damaged or holds anything but tensors and plain values.
    """
    with opened_checkpoint(path) as checkpoint:
        state = mapped(checkpoint.state, checkpoint.whole)
        check_checksums(path, checkpoint.records, [checkpoint.read()])
        return state


def one_line(error: BaseException) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__


def fallback_directory(directory: Path | str) -> Path:
    """Where the last save of a run goes whose checkpoint directory takes none; latest_checkpoint looks there too."""
    digest = hashlib.blake2b(os.fsencode(os.path.abspath(directory)), digest_size=6).hexdigest()
    return Path(tempfile.gettempdir(), f"train_graceful_{os.getuid()}_{digest}")


def checkpoints_in(directory: Path | str) -> list[Path]:
    """All checkpoints of a directory, emergency ones included, the one that was written last first; step 0 comes last."""
    folders, fallback = [Path(directory), Path(directory, "emergency_exit")], fallback_directory(directory)
    if fallback.is_dir() and fallback.stat().st_uid == os.getuid():  # anybody may make a folder of that name
        folders.append(fallback)
    untrained = re.compile(r"emergency_step_0([._].*)?")  # a fresh start that was stopped at once must not hide a trained run
    files = {file: file.stat().st_mtime_ns for folder in folders for file in folder.glob("[!.]*.pt") if file.is_file()}
    return sorted(files, reverse=True, key=lambda file: (not untrained.fullmatch(file.name), files[file]))


def home_of(path: Path) -> Path:
    """The directory of the run that saved a checkpoint, as far as one can see."""
    return path.parent.parent if path.parent.name == "emergency_exit" else path.parent


def load_latest(directory: Path | str, report: Callable[[str], None] = print) -> tuple[Path, dict]:
    """The newest checkpoint of checkpoints_in(directory) that load_checkpoint takes, and its content.

    Damaged ones that are newer are named through report and skipped. Raises CheckpointError where none is left.
    """
    return first_whole(checkpoints_in(directory), load_checkpoint, directory, report)


def first_whole(paths: Sequence[Path], read: Callable[[Path], typing.Any], directory: Path | str,
                report: Callable[[str], None]) -> tuple[Path, typing.Any]:
    """The first of a directory's checkpoints that read takes, and what it returns; load_latest says what becomes of the others."""
    for path in paths:
        try:
            return path, read(path)
        except UserError as error:
            report(f"⚠️ Skipped {error}")
    what = f"no {'whole ' if paths else ''}checkpoint there" if os.path.isdir(directory) or paths else "No such file or directory"
    raise CheckpointError(f"{directory}: {what}")


def latest_checkpoint(directory: Path | str, report: Callable[[str], None] = print) -> Path:
    """The path that load_latest finds."""
    return load_latest(directory, report)[0]


def host_copy(state: dict, kept: dict[int, Tensor]) -> dict:
    """State with all tensors copied to host memory; those that share memory share it in the copy.

    kept holds the copies' memory by number, for the next copy to write into.
    """
    copies: dict[int, Tensor] = {}  # by the identity of the storage

    def copied(value: object) -> object:
        if isinstance(value, Rows):
            return dataclasses.replace(value, local=copied(value.local))
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        if storage._cdata not in copies:
            data, number = storage_bytes(value), len(copies)
            if number not in kept or len(kept[number]) != len(data):
                kept[number] = torch.empty(len(data), dtype=torch.uint8, pin_memory=data.is_cuda)
            copies[storage._cdata] = kept[number].copy_(data)
        return like(value, copies[storage._cdata].untyped_storage(), value.storage_offset())

    return mapped(state, copied)


class CheckpointWriter:
    """Saves in a thread: training waits for one copy of the state and, if need be, for the write before.

    save(state, name) returns where it has saved; where memory did not suffice for a copy, state is the exception that says so.
    """

    def __init__(self, save: Callable[[dict | Exception, str], Path], report: Callable[[str], None]) -> None:
        self._save, self._report = save, report
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._pending: Future | None = None
        self._kept: dict[int, Tensor] = {}  # memory of the last copy
        self._unsaved_best: tuple[dict, str] | None = None

    def submit(self, state: dict, targets: dict[str, str]) -> None:
        """Saves state as it is now to every target {exit_reason: name}; a failure is reported and never ends the run."""
        self.wait()
        self.retry()
        copied: dict | Exception
        try:
            copied = host_copy(state, self._kept)
        except SAVE_ERRORS as error:
            copied, self._kept = error, {}  # whatever was there already is not worth its memory now
        self._pending = self._thread.submit(self._write, copied, targets)

    def _write(self, copied: dict | Exception, targets: dict[str, str]) -> None:
        for reason, name in targets.items():
            state = copied if isinstance(copied, Exception) else {**copied, "exit_reason": reason}
            try:
                path = self._save(state, name)
                if reason == "best":
                    self._unsaved_best = None
                if reason == USER_SAVE:
                    self._report(f"✅ Checkpoint saved: {path}")
            except SAVE_ERRORS as error:
                self._report(f"⚠️ {name} not saved: {one_line(error)}. Training goes on.")
                if reason == "best" and isinstance(state, dict):  # the next one may be worse: this copy is kept
                    self._unsaved_best, self._kept = (state, name), {}

    def retry(self) -> None:
        """Tries again to save the best weights where that has failed."""
        if self._unsaved_best is not None:
            state, name = self._unsaved_best
            with contextlib.suppress(*SAVE_ERRORS):  # reported when it failed first; the next save tries again
                path = self._save(state, name)
                self._unsaved_best = None
                self._report(f"✅ Saved after all: {path}")

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        self._thread.shutdown()


class RunDirectory:
    """One run's hold on a checkpoint directory: the lock, the names that are free for it, and its old checkpoints.

    The lock (fcntl.lockf, which no child inherits) is held until the process is gone; where the file system has none,
    report says so. Raises UserError where the directory cannot be written, is too full, or belongs to a run that is alive.
    """

    def __init__(self, path: Path, run_id: str, needed_bytes: int, report: Callable[[str], None]) -> None:
        self.path, self.run_id, self._report = path, run_id, report
        self._own: set[Path] = set()  # names known to hold this run's files
        try:
            self._take_hold()
            for folder in (path, path / "emergency_exit", fallback_directory(path)):
                for leftover in folder.glob(".*.pt.tmp"):  # of a killed run
                    with contextlib.suppress(OSError):  # in the way of nothing
                        leftover.unlink()
            with tempfile.TemporaryFile(dir=path):
                free = shutil.disk_usage(path).free
        except FileExistsError:  # mkdir's word for it
            raise UserError(f"--checkpoint-dir {path}: a file, not a directory") from None
        except OSError as error:
            raise UserError(f"--checkpoint-dir {path}: {error.strerror}") from error
        if free < needed_bytes:
            raise UserError(f"--checkpoint-dir {path}: {free / 1e6:.2f} MB free, checkpoints need {needed_bytes / 1e6:.2f}")
        oldest_first = reversed(checkpoints_in(path))
        self._periodic = [file for file in oldest_first if file.parent == path and file.name.startswith("step_") and self._is_own(file)]

    def _take_hold(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path / "run.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX, 1, 1)  # one starts at a time: who comes second reads the first one's pid
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)  # ours until the process is gone
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                pid, host, *_ = os.pread(file, 256, 0).decode(errors="replace").split() + ["unknown", "unknown"]
                os.close(file)
                raise UserError(f"{self.path} is in use by another run (pid {pid} on {host}); give this one its own --checkpoint-dir") from None
            self._report(f"⚠️ {self.path}: no locks there ({error.strerror}); see to it that no other run uses it")
        self._lock_file = file
        self.write_outcome("")
        with contextlib.suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_UN, 1, 1)

    def keep_hold(self) -> None:
        """Makes a directory that somebody has deleted anew. Raises OSError where it is another run's by now."""
        try:
            if os.path.samestat(os.stat(self.path / "run.lock"), os.fstat(self._lock_file)):
                return
        except FileNotFoundError:
            pass
        try:
            self._take_hold()
        except UserError as error:
            raise OSError(errno.EBUSY, str(error)) from error

    def write_outcome(self, outcome: str) -> None:
        """Leaves pid and host of this run, and how it ended, in the lock file for scripts/stop.sh."""
        text = f"{os.getpid()} {os.uname().nodename}\n{outcome}".encode()
        os.pwrite(self._lock_file, text, 0)  # before the cut, so that a reader always finds a pid
        os.ftruncate(self._lock_file, len(text))

    def path_for(self, name: str) -> Path:
        """Where this run may save under name: a file of another run is never overwritten but evaded with a number."""
        path, number = self.path / name, 1
        while path not in self._own and path.exists() and not self._is_own(path):
            number += 1
            path = path.with_name(f"{Path(name).stem}_{number}{path.suffix}")
        self._own.add(path)
        return path

    def prune(self, newest: Path, keep: int) -> None:
        """Notes that newest is safely on the disk and deletes this run's oldest periodic checkpoints beyond keep."""
        self._periodic = [path for path in self._periodic if path != newest] + [newest]
        for path in self._periodic[:-keep]:
            with contextlib.suppress(OSError):  # what cannot be deleted now is tried again after the next save
                path.unlink(missing_ok=True)
                self._periodic.remove(path)

    def _is_own(self, path: Path) -> bool:
        try:
            if not path.is_file():  # a pipe would be waited for
                return False
            with open(path, "rb") as file:  # run_id comes first in it: among thousands of files this stays cheap
                return self.run_id.encode() in file.read(HEAD_BYTES)
        except OSError:  # unreadable: not ours to overwrite
            return False


# ---- Data ------------------------------------------------------------------------------------------------------------


def standard_library_files() -> list[Path]:
    """Python's own source text, without installed packages and without tests, which some distributions leave out."""
    found: list[Path] = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = set(subfolders) - {"site-packages", "dist-packages", "test", "tests", "idle_test"}
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def data_files(paths: Sequence[str]) -> list[tuple[Path, int]]:
    """(file, size in bytes) of every non-empty file in paths, folders searched in sorted order, hidden files left out.

    Raises UserError for a path that is missing, unreadable or not a file or folder.
    """
    found: list[tuple[Path, int]] = []
    for path in map(Path, paths):
        file = path
        try:
            files = [path]
            if path.is_dir():
                files = sorted(file for file in path.rglob("*") if not any(
                    part.startswith(".") for part in file.relative_to(path).parts))
            for file in files or [path]:
                status = file.stat()
                if stat.S_ISREG(status.st_mode):
                    with open(file, "rb"):
                        if status.st_size:
                            found.append((file, status.st_size))
                elif file == path:
                    raise UserError(f"--data {path}: {'an empty folder' if path.is_dir() else 'not a file or folder'}")
        except OSError as error:
            raise UserError(f"--data {file}: {error.strerror}") from error
    return found


def mapped_file(path: Path, size: int) -> Tensor:
    """The bytes of a file, uint8 of shape (size,), mapped and not read; no descriptor stays open.

    Not cached: a mapping costs 20 us, and one that is kept counts all that was ever read as this process's memory.
    """
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)


def shuffled(index: int, n: int, key: bytes) -> int:
    """The image of index under a permutation of range(n) that depends on key alone, found without listing it.

    A four-round Feistel network on the smallest domain of 4**k numbers that holds n, walked until it is back inside
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    while True:
        left, right = index >> bits, index & mask
        for round in range(4):
            digest = hashlib.blake2b(b"%d %d" % (round, right), key=key, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = left << bits | right
        if index < n:
            return index


class ByteDataset(torch.utils.data.Dataset):
    """Batches of byte windows over files laid end to end; item i is batch i of the whole training, all epochs counted.

    A batch is a pure function of (seed, epoch, number in the epoch): nothing has to be replayed to start at any of
    them. It has shape (windows, context + 1), uint8: the model predicts bytes 1... from bytes ...context - 1. An epoch
    is one pass over the non-overlapping windows of the first 95 %; the rest is validation data. Of world_size processes
    each gets every world_size-th window of the same batches.
    """

    def __init__(self, config: Config, rank: int = 0, world_size: int = 1) -> None:
        files = [str(path) for path in standard_library_files()] if not config.data else config.data
        self.files = data_files(files)
        self.starts = [0]
        for _, size in self.files:
            self.starts.append(self.starts[-1] + size)
        self.context, self.seed, self.workers = config.context, config.seed, config.workers
        if self.workers and len(os.fsencode(tempfile.gettempdir())) > SOCKET_FOLDER_BYTES:
            raise UserError(f"--workers {self.workers}: the path of the temporary directory {tempfile.gettempdir()} is too long for "
                            f"the sockets of PyTorch's workers; set TMPDIR to one of at most {SOCKET_FOLDER_BYTES} bytes")
        if config.batch_size % world_size:
            raise UserError(f"--batch-size {config.batch_size} cannot be shared out equally among {world_size} processes")
        self.batch_size, self.rank, self.world_size = config.batch_size, rank, world_size
        self.windows_per_batch = config.batch_size * config.grad_accum
        total = self.starts[-1]
        self.train_bytes = total - int(total * VALIDATION_FRACTION)
        self.train_windows = max(0, self.train_bytes - 1) // self.context
        self.validation_windows = max(0, total - self.train_bytes - 1) // self.context
        self.batches_per_epoch = self.train_windows // self.windows_per_batch
        if not self.batches_per_epoch or not self.validation_windows:
            needed = max(self.windows_per_batch * self.context / (1 - VALIDATION_FRACTION), (self.context + 1) / VALIDATION_FRACTION)
            raise UserError(f"--data {' '.join(config.data) or '(the standard library)'}: {total} bytes are too few; "
                            f"a batch of {self.windows_per_batch} windows and the validation data need about {math.ceil(needed) + 2}")

    def __getitem__(self, index: int) -> Tensor:
        epoch, number = divmod(index, self.batches_per_epoch)
        key = b"%d %d" % (self.seed, epoch)
        first = number * self.windows_per_batch
        windows = (shuffled(first + i, self.train_windows, key) for i in range(self.rank, self.windows_per_batch, self.world_size))
        return torch.stack([self.read(window * self.context, self.context + 1) for window in windows])

    def batches(self, epoch: int, start: int, pin_memory: bool = False) -> Iterator[Tensor]:
        """The batches of an epoch from number start on, at the same cost for every start."""
        first = epoch * self.batches_per_epoch
        loader = torch.utils.data.DataLoader(
            self, batch_size=None, sampler=range(first + start, first + self.batches_per_epoch), num_workers=self.workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # its own: the default one is the dropout's, and resuming must not disturb it
        )
        if self.workers:
            multiprocessing.util.get_temp_dir()  # made here, it is the workers' too, and removed however they end
        on_child = signal.getsignal(signal.SIGCHLD)
        batches = iter(loader)
        # torch's handler raises wherever the main thread is when a worker dies, in the middle of an optimizer step
        # too; without it the loader says so at the next batch.
        signal.signal(signal.SIGCHLD, on_child)
        yield from batches

    def validation_batches(self) -> Iterator[Tensor]:
        """The same windows every time, spread evenly over the validation data; (batch_size or fewer, context + 1).

        Every process gets as many batches; of the last one there may be no window for it.
        """
        count = min(self.validation_windows, VALIDATION_BATCHES * self.batch_size)
        windows = [i * self.validation_windows // count for i in range(count)]
        for first in range(0, count, self.batch_size):
            mine = windows[first : first + self.batch_size][self.rank :: self.world_size]
            texts = [self.read(self.train_bytes + window * self.context, self.context + 1) for window in mine]
            yield torch.stack(texts) if texts else torch.empty(0, self.context + 1, dtype=torch.uint8)

    def read(self, start: int, length: int) -> Tensor:
        """Bytes start to start + length of the corpus, across file boundaries; uint8 of shape (length,)."""
        pieces = []
        file = bisect.bisect_right(self.starts, start) - 1
        while length:
            offset = start - self.starts[file]
            pieces.append(mapped_file(*self.files[file])[offset : offset + length])
            start, length, file = start + len(pieces[-1]), length - len(pieces[-1]), file + 1
        return torch.cat(pieces)

    def fingerprint(self) -> str:
        """Identifies the data wherever it lies: all of a corpus up to 64 MiB, file sizes and 1,024 samples of a larger one."""
        digest = hashlib.blake2b(repr(self.starts).encode(), digest_size=16)
        total = self.starts[-1]
        if total <= FULL_FINGERPRINT_BYTES:
            for path, size in self.files:
                digest.update(mapped_file(path, size).numpy())
        else:
            for i in range(FINGERPRINT_SAMPLES):
                start = i * (total - FINGERPRINT_SAMPLE_BYTES) // (FINGERPRINT_SAMPLES - 1)
                digest.update(self.read(start, FINGERPRINT_SAMPLE_BYTES).numpy())
        return digest.hexdigest()


# ---- Model -----------------------------------------------------------------------------------------------------------


Routing = tuple[Tensor, Tensor | None]  # of a block: gates (batch, context, experts); angles (experts, dim // 2), radians


class Attention(nn.Module):
    """Causal self-attention; (batch, context, dim) to the same shape."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(-2))


def rotate_columns(weight: Tensor, angle: Tensor) -> Tensor:
    """weight @ R(angle), for weight (..., hidden, dim) and angle (..., planes) in radians, planes <= dim / 2.

    R is the product of the Givens rotations of the disjoint coordinate planes (i, i + planes): it maps (x_i, x_j) to
    (x_i cos - x_j sin, x_i sin + x_j cos). Since (W R) x = W (R x), folding R into the weight rotates every input.
    """
    planes = angle.shape[-1]
    cos, sin = angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)
    first, second, rest = weight.split([planes, planes, weight.shape[-1] - 2 * planes], dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin, rest], dim=-1)


class Experts(nn.Module):
    """A softmax-routed mixture of two-layer MLPs that share the 4 * dim hidden units of a usual feed-forward layer.

    Every expert sees every token, weighted by its gate, so the mixture is two matrix products over all experts. With
    rotations, expert e sees its input through R_e with angles max_angle * tanh(theta_e), folded into its first weight:
    one fold a forward pass, at a cost that does not grow with the batch.
    """

    def __init__(self, dim: int, experts: int, rotations: bool) -> None:
        super().__init__()
        hidden = 4 * dim // experts
        self.router = nn.Linear(dim, experts, bias=False)
        # Separate 2-D weights, not one 3-D tensor: Muon orthogonalizes matrices.
        self.w_in = nn.ParameterList(torch.randn(hidden, dim) * dim**-0.5 for _ in range(experts))
        self.w_out = nn.ParameterList(torch.randn(dim, hidden) * hidden**-0.5 for _ in range(experts))
        # Not zero: where all rotations are alike, the orthogonality loss has no slope.
        self.theta = nn.Parameter(0.1 * torch.randn(experts, dim // 2)) if rotations else None

    def angles(self) -> Tensor:
        """(experts, dim // 2), radians."""
        return MAX_ANGLE * self.theta.tanh()

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """(batch, context, dim) to the same shape; the gates (batch, context, experts) and the angles, if there are any."""
        gates = self.router(x).softmax(dim=-1)
        w_in = torch.stack(list(self.w_in))
        angles = None
        if self.theta is not None:
            angles = self.angles()
            w_in = rotate_columns(w_in, angles)
        hidden = F.gelu(F.linear(x, w_in.flatten(0, 1))).unflatten(-1, (len(self.w_in), -1))
        hidden = (hidden * gates.unsqueeze(-1)).flatten(-2)
        return F.linear(hidden, torch.cat(list(self.w_out), dim=1)), (gates, angles)


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm_attention, self.norm_experts = nn.RMSNorm(config.dim), nn.RMSNorm(config.dim)
        self.attention = Attention(config.dim, config.heads, config.dropout)
        self.experts = Experts(config.dim, config.experts, rotations=config.mode == "geometric")
        self.dropout = nn.Dropout(config.dropout)
        self.recompute = config.shard

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        if self.recompute and torch.is_grad_enabled():
            # Else the backward pass would keep what is made of the weights here, of the whole model on every rank.
            return torch.utils.checkpoint.checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        x = x + self.dropout(self.attention(self.norm_attention(x)))
        y, routing = self.experts(self.norm_experts(x))
        return x + self.dropout(y), routing


class ByteLM(nn.Module):
    """A byte-level decoder-only Transformer with mixture-of-experts feed-forward layers.

    place moves a block to where it will be computed as soon as it is made, so that of a sharded model one whole block
    is there at a time.
    """

    def __init__(self, config: Config, autocast: torch.dtype = torch.float32,
                 place: Callable[[nn.Module], nn.Module] = lambda block: block) -> None:
        super().__init__()
        self.autocast = autocast
        self.token = nn.Embedding(256, config.dim)
        self.position = nn.Embedding(config.context, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(place(Block(config)) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, 256, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Routing]]:
        """tokens (batch, context) int64 to logits (batch, context, 256) float32 and every block's routing."""
        with torch.autocast(tokens.device.type, self.autocast, enabled=self.autocast != torch.float32):
            x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
            x, routings = self.dropout(x), []
            for block in self.blocks:
                x, routing = block(x)
                routings.append(routing)
            return self.head(self.norm(x)).float(), routings


def task_loss(model: ByteLM, windows: Tensor) -> tuple[Tensor, list[Routing]]:
    """Mean cross entropy, in nats a byte, of predicting each next byte of windows (batch, context + 1); and the routing."""
    windows = windows.long()
    logits, routings = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()), routings


# ---- Controllers -----------------------------------------------------------------------------------------------------


def orthogonality_loss(angles: Tensor) -> Tensor:
    """How alike the experts' rotations are: mean over pairs e < f of (<R_e, R_f> / <R_e, R_e>)**2, in [0, 1].

    <A, B> = trace(A^T B). Both are block diagonal in the same planes, so the quotient is mean_i cos(angle_ei - angle_fi).
    Zero for a single expert. angles (experts, planes), radians.
    """
    first, second = torch.triu_indices(len(angles), len(angles), offset=1, device=angles.device)
    if not len(first):
        return angles.new_zeros(())
    return (angles[first] - angles[second]).cos().mean(dim=-1).square().mean()


def rotation_efficiency_loss(angles: Tensor) -> Tensor:
    """mean((angle / max_angle)**2), in [0, 1): no more rotation than the task pays for. angles in radians."""
    return (angles / MAX_ANGLE).square().mean()


def specialization_loss(gates: Tensor, load: Tensor) -> Tensor:
    """(mean_t H(p_t) - H(load)) / log(experts), in [-1, 0]: minus the information a token has about its expert.

    H is the entropy; low when each token is routed decisively while all experts share the load (regularized
    information maximization; Krause, Perona and Gomes, 2010). gates (..., experts), each row summing to 1; load (experts,)
    is their mean over the tokens of the batch.
    """
    if gates.shape[-1] == 1:
        return gates.new_zeros(())
    entropy = torch.special.entr(gates.float()).sum(dim=-1).mean()
    return (entropy - torch.special.entr(load).sum()) / math.log(gates.shape[-1])


def no_regularization(routings: list[Routing]) -> float:
    return 0.0


def forward_backward(model: ByteLM, batch: Tensor, grad_accum: int,
                     regularization: Callable[[list[Routing]], Tensor | float] = no_regularization) -> Tensor:
    """Adds the gradient of the mean task loss, plus regularization(routings), to .grad and returns the mean task loss.

    batch (grad_accum * batch_size, context + 1) uint8 is taken in grad_accum forward passes.
    """
    device = next(model.parameters()).device
    mean = torch.zeros((), device=device)
    for number, windows in enumerate(batch.to(device, non_blocking=True).chunk(grad_accum), start=1):
        # Of many processes, the gradients meet in the last pass; those of a sharded model in each, so that none is kept whole.
        with model.no_sync() if number < grad_accum and hasattr(model, "no_sync") else contextlib.nullcontext():
            loss, routings = task_loss(model, windows)
            ((loss + regularization(routings)) / grad_accum).backward()
            mean += loss.detach() / grad_accum
    return mean


def is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor, of which this process holds a part. (Importing its class takes time that most runs need not spend.)"""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Of a sharded tensor this process's part, in the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def clip_gradients(model: nn.Module, max_norm: float) -> None:
    """Scales the gradient to at most max_norm. Raises FloatingPointError, before anything is updated, where its norm is not finite."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    norm = norm.full_tensor() if is_sharded(norm) else norm
    if not norm.isfinite():
        raise FloatingPointError("the loss or its gradient is NaN or infinite; nothing was updated. A resumed run is the same run and comes "
                                 "to it again: start a new one with a smaller --lr or another --seed")


def cosine(progress: float) -> float:
    """Half a cosine, from 1 down to a tenth."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def cubic(progress: float) -> float:
    """From 1 down to 0.03, most of it early: Muon's large steps are noise that only a lower rate averages out."""
    return 0.03 + 0.97 * (1 - progress) ** 3


def warmup_decay(optimizer: Optimizer, warmup_steps: int, total_steps: int, decay: Callable[[float], float]) -> LambdaLR:
    """Learning rate factor: a straight rise over warmup_steps, then decay(progress), progress from 0 to 1 at total_steps."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return decay(min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)))

    return LambdaLR(optimizer, factor)


class TrainingController:
    """Turns batches into optimizer steps. A subclass fills `optimizers` and `schedulers`, and may define regularization."""

    optimizers: dict[str, Optimizer]
    schedulers: dict[str, LRScheduler]

    def __init__(self, model: ByteLM, config: Config) -> None:
        self.model, self.config = model, config
        self.average: Callable[[Tensor], Tensor] = lambda mean: mean  # makes a mean over our share of a batch that over all of it

    def regularization(self, routings: list[Routing]) -> Tensor | float:
        """What is added to the task loss."""
        return no_regularization(routings)

    def training_step(self, batch: Tensor) -> Tensor:
        """One optimizer step on batch (grad_accum * batch_size, context + 1), uint8; returns the mean task loss."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss = forward_backward(self.model, batch, self.config.grad_accum, self.regularization)
        clip_gradients(self.model, self.config.grad_clip)
        for optimizer in self.optimizers.values():
            optimizer.step()
        for scheduler in self.schedulers.values():
            scheduler.step()
        return loss

    def state_dict(self) -> dict[str, dict[str, dict]]:
        return {"optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
                "schedulers": {name: scheduler.state_dict() for name, scheduler in self.schedulers.items()}}

    def load_state_dict(self, state: dict[str, dict[str, dict]]) -> None:
        """Restores every optimizer and every scheduler. Raises KeyError or ValueError where the state is another's."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        for name, scheduler in self.schedulers.items():
            scheduler.load_state_dict(state["schedulers"][name])


class StandardTrainingController(TrainingController):
    """One AdamW over all parameters, one warm-up and cosine schedule."""

    def __init__(self, model: ByteLM, config: Config, total_steps: int) -> None:
        super().__init__(model, config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self.optimizers = {"adamw": optimizer}
        self.schedulers = {"adamw": warmup_decay(optimizer, config.warmup_steps, total_steps, cosine)}


def orthogonalize(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The nearest (semi-)orthogonal matrix, roughly, to each of matrices (count, rows, columns), by Newton-Schulz.

    A quintic iteration whose singular values end near 1, not at it (Jordan et al., "Muon", 2024). In bfloat16, or in
    float32 on a CPU without bfloat16 arithmetic, which would emulate it at a fraction of the speed.
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
    """torch.optim.Muon, its options and its state, but all matrices of a shape are orthogonalized at once."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
                    if not self.state[parameter]:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            for shape, parameters in by_shape.items():
                self._update(parameters, group, group["lr"] * math.sqrt(max(1, shape[0] / shape[1])))

    def _update(self, parameters: list[nn.Parameter], group: dict, lr: float) -> None:
        buffers = [local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        momentum, gradient = torch.stack(buffers), torch.stack([local(parameter.grad) for parameter in parameters])
        momentum.lerp_(gradient, 1 - group["momentum"])
        torch._foreach_copy_(buffers, list(momentum))
        newton_schulz = functools.partial(orthogonalize, coefficients=group["ns_coefficients"], steps=group["ns_steps"], eps=group["eps"])
        update = gradient.lerp_(momentum, group["momentum"])
        update = on_whole_matrices(newton_schulz, update, parameters[0]) if is_sharded(parameters[0]) else newton_schulz(update)
        weights = [local(parameter) for parameter in parameters]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(update), alpha=-lr)


class GeometricTrainingController(TrainingController):
    """Geometric constrained learning: rotated experts, three optimizers for three kinds of parameters.

    loss = task + 0.01 orthogonality + 0.001 rotation_efficiency + 0.01 specialization, each averaged over the blocks.
    `rotation`: Adam on theta. `expert`: Muon (Jordan et al., 2024) on the hidden matrices of experts and attention.
    `embedding`: AdamW on embeddings, norms, routers and head.
    """

    ORTHOGONALITY, ROTATION_EFFICIENCY, SPECIALIZATION = 0.01, 0.001, 0.01

    def __init__(self, model: ByteLM, config: Config, total_steps: int) -> None:
        super().__init__(model, config)
        groups: dict[str, list[nn.Parameter]] = {"rotation": [], "expert": [], "embedding": []}
        for name, parameter in model.named_parameters():
            if name.endswith("theta"):
                groups["rotation"].append(parameter)
            elif any(part in name for part in (".w_in.", ".w_out.", ".attention.")):
                groups["expert"].append(parameter)
            else:
                groups["embedding"].append(parameter)
        self.optimizers = {
            "rotation": torch.optim.Adam(groups["rotation"], lr=config.rotation_lr, fused=True),
            # A step decays the weights by lr * weight_decay: as much as AdamW's does. Four iterations instead of torch's five:
            # a fifth of Muon's time, and the loss falls as fast.
            "expert": BatchedMuon(groups["expert"], lr=MUON_LR_FACTOR * config.lr, ns_steps=4,
                                  weight_decay=config.weight_decay / MUON_LR_FACTOR),
            "embedding": torch.optim.AdamW(groups["embedding"], lr=config.lr, weight_decay=config.weight_decay, fused=True),
        }
        self.schedulers = {name: warmup_decay(optimizer, config.warmup_steps, total_steps, cubic)
                           for name, optimizer in self.optimizers.items()}

    def regularization(self, routings: list[Routing]) -> Tensor:
        """The three geometric losses, weighted, averaged over the blocks."""
        total = torch.zeros((), device=routings[0][0].device)
        loads = torch.stack([gates.float().mean(dim=(0, 1)) for gates, _ in routings])
        # The value is that of all processes, the slope this one's, as for every other part of the loss.
        loads = loads + (self.average(loads.detach()) - loads.detach())
        for (gates, angles), load in zip(routings, loads):
            total = total + self.ORTHOGONALITY * orthogonality_loss(angles)
            total = total + self.ROTATION_EFFICIENCY * rotation_efficiency_loss(angles)
            total = total + self.SPECIALIZATION * specialization_loss(gates, load)
        return total / len(routings)


# ---- The run ---------------------------------------------------------------------------------------------------------


class Metrics:
    """metrics.csv, a row at a time. Rows of batches after `step` (the checkpoint's) are cut off: they will come again.

    A row that cannot be written (disk full) waits for the next one and never raises.
    """

    def __init__(self, path: Path, lr_names: Sequence[str], step: int) -> None:
        self._path, self._file = path, os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._lock = threading.Lock()  # rows come from the training loop, flushes from the thread that saves
        columns = ["step", "epoch", "loss", "val_loss", *(f"lr_{name}" for name in lr_names), "tokens_per_second", "seconds"]
        header = (",".join(columns) + "\n").encode()
        with open(path, "rb") as file:
            if not header.startswith(file.read(len(header))):
                raise ValueError("its columns are not this run's")
        self._size = 0  # bytes known to be whole rows
        self._waiting = b""
        if os.fstat(self._file).st_size < len(header):
            self._append(header)
        else:
            with mmap.mmap(self._file, 0, prot=mmap.PROT_READ) as text:
                self._size = end_of_rows(text, len(header), step)
            os.ftruncate(self._file, self._size)

    def row(self, text: str) -> None:
        self._append(f"{text}\n".encode())

    def _append(self, text: bytes) -> None:
        with self._lock:
            self._waiting += text
            try:
                written = os.pwrite(self._file, self._waiting, self._size)
                if written == len(self._waiting):
                    self._size, self._waiting = self._size + written, b""
                os.ftruncate(self._file, self._size)
            except OSError:
                pass  # the rows are kept; a person hears of a full disk from the next save

    def flush(self) -> None:
        """To the disk; where somebody has deleted the file, all its rows anew. Raises OSError where the disk refuses."""
        if not self._path.exists():
            with self._lock:
                new = self._path.with_name(f".{self._path.name}.tmp")
                new.write_bytes(os.pread(self._file, self._size, 0))
                os.replace(new, self._path)
                deleted, self._file = self._file, os.open(self._path, os.O_RDWR)
                os.close(deleted)
        self._append(b"")
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


def end_of_rows(text: mmap.mmap, start: int, step: int) -> int:
    """Where the rows up to step end. Read from the end, so that a long file takes no longer than a short one.

    Those rows were flushed before the checkpoint was; what a power cut made of later ones is cut off with them.
    """
    end = len(text)
    while end > start:
        row_start = text.rfind(b"\n", 0, end - 1) + 1
        row = re.fullmatch(rb"([0-9]{1,18}),.*\n", text[row_start:end])
        if row and int(row[1]) <= step:
            break
        end = row_start
    return end


def last_row(path: Path, step: int) -> str | None:
    """Of a metrics.csv the last row up to a step, without its times; "" where there is only the header, None where no file."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as text:
            rows = text.find(b"\n") + 1
            end = end_of_rows(text, rows, step)
            start = text.rfind(b"\n", 0, end - 1) + 1
            return ",".join(text[start:end].decode(errors="replace").split(",")[:-2]) if end > rows else ""
    except (OSError, ValueError):  # ValueError: an empty file
        return None


class Processes:
    """The processes that train one model together: this one alone. What torchrun starts is a ManyProcesses."""

    rank, world_size = 0, 1
    sharded = False  # each has a part of the model
    saves = True  # this process takes part in it

    def __init__(self, monitor: ExitMonitor | None) -> None:
        self.monitor = monitor  # what the loops look at

    def place(self, module: nn.Module, device: torch.device) -> nn.Module:
        """Moves a module, made on the CPU, to where this process computes."""
        return module.to(device)

    def parallel(self, controller: TrainingController, data: ByteDataset) -> None:
        """Makes the gradients of a controller those of all processes."""

    def average(self, mean: Tensor) -> Tensor:
        """A mean over this process's part of a batch (every part is as large) becomes that over all of it."""
        return mean

    def total(self, *values: float) -> Sequence[float]:
        """The sum of each value over all processes."""
        return values

    def agree(self) -> None:
        """Between two batches: what one process has heard becomes the request of all."""

    def together(self, function: Callable, *arguments: object) -> typing.Any:
        """Calls function, in which no process may wait for another; a UserError in one is raised in all."""
        return function(*arguments)

    def on_first(self, function: Callable, *arguments: object) -> typing.Any:
        """Calls function on rank 0 alone; what it returns, or a UserError or one of SAVE_ERRORS, is for all."""
        return function(*arguments)

    def finally_saving(self, function: Callable, *arguments: object) -> None:
        """Calls function, the last save, wherever a process takes part in it; a UserError or one of SAVE_ERRORS is for all."""
        function(*arguments)

    def lead(self, function: Callable, *arguments: object) -> typing.Any:
        """In a save: calls function on the first of the processes that take part; its result, or one of SAVE_ERRORS, is for all of them."""
        return function(*arguments)

    def each(self, function: Callable, *arguments: object) -> list:
        """In a save: calls function on each that takes part; one of SAVE_ERRORS is for all of them, the results for the first."""
        return [function(*arguments)]

    def begin_save(self) -> None:
        """Whatever became of the save before, the processes that take part now speak of the next one."""

    def rows(self, state: dict) -> dict:
        """A state to be saved, with the Rows that this process has in the place of sharded tensors."""
        return state

    def read(self, path: Path | str) -> dict:
        """What load_checkpoint returns, verified by all processes; where restore() comes after it, tensors may be on the meta device."""
        return load_checkpoint(path)

    def restore(self, state: dict, path: Path, model: nn.Module, optimizers: dict[str, Optimizer]) -> dict:
        """What read() has returned becomes what this process's model and optimizers load."""
        return state

    def first_failure(self, error: Exception) -> tuple[int, str]:
        """Rank and type of the exception that came first, of which those of other processes may be consequences."""
        return self.rank, type(error).__name__

    def break_off(self) -> None:
        """After a failure: whoever waits for us in the middle of a batch gets an exception instead."""

    def close(self) -> None:
        """Of a run that has left gracefully."""


class Run:
    """The state that a checkpoint holds beside the model and its optimizers, and what happens at batch boundaries.

    step counts optimizer steps and is the only clock; epoch and batch_in_epoch say which batch comes next.
    """

    def __init__(self, config: Config, model: ByteLM, controller: TrainingController, data: ByteDataset, total_steps: int,
                 device: torch.device, processes: Processes, screen: Screen) -> None:
        self.config, self.model, self.controller, self.data = config, model, controller, data
        self.total_steps, self.device, self.screen = total_steps, device, screen
        self.processes, self.monitor = processes, processes.monitor
        self.run_id = uuid.uuid4().hex[:12]
        self.step = self.epoch = self.batch_in_epoch = 0
        self.best_loss = math.inf
        self.loss_sum, self.loss_count = 0.0, 0  # of the batches since the last row of metrics.csv
        self.smooth_loss = math.nan  # what is shown of the training loss
        self.last_row = ""  # of metrics.csv, without the times: by it a resumed run knows its own file
        self.seconds = 0.0  # of training, all sessions
        self.metrics_name: str | None = None
        self.resumed_from: Path | None = None
        self.homes: list[Path] = []  # of a resumed run: where its checkpoint lies, and where it was saving
        self.data_fingerprint = data.fingerprint()
        self.completed = False  # before it began: a resumed run that was done
        self.exit_code = 0
        self.error: Exception | None = None
        self.saved: tuple[str, Path] | None = None  # what the summary names
        self._in_update = False
        self.tensorboard: typing.Any = None  # a SummaryWriter
        self._last_save: tuple[str, float] | None = None  # name, when
        for optimizer in controller.optimizers.values():
            optimizer.register_step_pre_hook(self._update_begins)

    # ---- state

    def state_dict(self, exit_reason: str | None) -> dict:
        """The checkpoint as of the last complete batch. Its tensors are the live ones, not copies."""
        self.seed_batch()
        controller = self.controller.state_dict()
        return {
            "format_version": FORMAT_VERSION,
            "run_id": self.run_id,  # at the front, where RunDirectory looks for it
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dicts": {name: {**optimizer.state_dict(), **self._whose(optimizer)}
                                      for name, optimizer in self.controller.optimizers.items()},
            "scheduler_state_dicts": controller["schedulers"],
            "mode": self.config.mode,
            "loop": self.config.loop,
            "step": self.step,
            "epoch": self.epoch,
            "batch_in_epoch": self.batch_in_epoch,
            "best_loss": self.best_loss,
            "metrics": {"file": self.metrics_name, "loss_sum": self.loss_sum, "loss_count": self.loss_count,
                        "smooth_loss": self.smooth_loss, "last_row": self.last_row, "seconds": self.seconds},
            "config": dataclasses.asdict(self.config),
            "rng_state": {"cpu": torch.get_rng_state()},  # of the next batch; for readers, since seed_batch makes it anew
            "data_fingerprint": self.data_fingerprint,
            "exit_reason": exit_reason,
            "torch_version": str(torch.__version__),
            "saved_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }

    def _whose(self, optimizer: Optimizer) -> dict:
        """What tells an optimizer's state from another's: PyTorch takes any that has as many parameters."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return {"class": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
                "param_names": [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]}

    def load_state_dict(self, state: dict, path: Path) -> None:
        """Restores everything that state_dict saved. Raises CheckpointError where it does not fit."""
        if isinstance(there := state.get("data_fingerprint"), str) and there != self.data_fingerprint:
            where = " ".join(self.config.data) or "Python's standard library"
            raise CheckpointError(f"--data {where} is not the data that the run of {path} was trained on")
        self._check(state, path)
        try:
            state = self.processes.restore(state, path, self.model, self.controller.optimizers)
            self.model.load_state_dict(state["model_state_dict"])
            self.controller.load_state_dict({"optimizers": state["optimizer_state_dicts"],
                                             "schedulers": state["scheduler_state_dicts"]})
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:  # PyTorch's ways to refuse
            raise CheckpointError(f"{path} does not fit this model, its optimizers or this PyTorch ({one_line(error)})") from error
        metrics = state["metrics"]
        self.loss_sum, self.loss_count, self.smooth_loss = metrics["loss_sum"], metrics["loss_count"], metrics["smooth_loss"]
        self.seconds, self.metrics_name, self.last_row = metrics["seconds"], metrics["file"], metrics["last_row"]
        self.run_id, self.best_loss = state["run_id"], state["best_loss"]
        self.step, self.epoch, self.batch_in_epoch = state["step"], state["epoch"], state["batch_in_epoch"]
        self.completed = state["exit_reason"] == "completed"
        self.resumed_from, self.homes = path, [home_of(path), Path(state["config"]["checkpoint_dir"])]

    def _check(self, state: dict, path: Path) -> None:
        """Raises CheckpointError unless state is what this run itself would have saved, as far as it knows."""
        own = self.state_dict("")
        own["metrics"]["file"] = ""
        check_same(state, own, path)
        # Both become parts of paths: a checkpoint from a stranger must not choose the folder.
        if not re.fullmatch(r"metrics(_[0-9]+)?\.csv", state["metrics"]["file"]) or not re.fullmatch("[0-9a-f]{12}", state["run_id"]):
            raise CheckpointError(f"{path}: not a checkpoint of this program (its names are others)")
        batches = state["epoch"] * self.data.batches_per_epoch + state["batch_in_epoch"]
        if (not 0 <= state["batch_in_epoch"] < self.data.batches_per_epoch or batches != state["step"] or state["step"] < 0
                or state["metrics"]["loss_count"] < 0 or not state["best_loss"] >= 0
                or (state["mode"], state["loop"]) != (self.config.mode, self.config.loop)):
            raise CheckpointError(f"{path}: not a checkpoint of this program (its counters contradict each other)")

    def _update_begins(self, *hook_arguments) -> None:
        self._in_update = True  # until batch_done: an exception in between leaves parameters of two different steps

    # ---- between batches

    def begin(self) -> None:
        """Takes hold of the checkpoint directory and opens metrics.csv. Raises UserError where it may not or cannot."""
        self.processes.on_first(self._open_directory)
        if self.processes.saves:
            self.writer = CheckpointWriter(self._save, self.screen.say)
        self.processes.parallel(self.controller, self.data)
        self.seed_batch()
        self._clock = self._row_clock = self._status_clock = time.monotonic()
        self._start = (self._clock, self.step)
        getattr(self.monitor, "own", self.monitor).describe = self._describe
        if self.resumed_from is not None:
            self.screen.say(f"📂 Resumed at step {self.step} of {self.total_steps} from {self.resumed_from}")
        elif self.metrics_name not in (None, "metrics.csv") and (there := checkpoints_in(self.directory.path)):
            self.screen.say(f"📂 {self.directory.path} holds another run, with which --resume {there[0]} goes on. "
                            f"This is a new one; its figures are in {self.metrics_name}")
        self.screen.say("🔄 Training started. Press 'q' + Enter to exit gracefully...")

    def _open_directory(self) -> None:
        self.directory = RunDirectory(Path(self.config.checkpoint_dir), self.run_id, 2 * state_bytes(self.model), self.screen.say)
        try:
            path = self._metrics_path()
            self.metrics = Metrics(path, list(self.controller.optimizers), self.step)
        except (OSError, ValueError) as error:
            path = self.directory.path / (self.metrics_name or "metrics.csv")
            raise UserError(f"{path}: cannot go on with these metrics ({one_line(error)})") from error
        self.metrics_name = path.name
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # What a run that died has written of later steps will come again.
            self.tensorboard = SummaryWriter(self.directory.path / "tensorboard", purge_step=self.step + 1)

    def _metrics_path(self) -> Path:
        """Its own file, where that is in the directory it goes on in; else a new one that begins with the old one's rows."""
        directory = self.directory.path
        # Before its first row nothing tells a run's file from another's but that it was saving there.
        own = [home / self.metrics_name for home in self.homes if self.last_row == last_row(home / self.metrics_name, self.step)
               and (self.last_row or home == self.homes[-1])]
        if own and directory / self.metrics_name in own:
            return directory / self.metrics_name
        path, number = directory / "metrics.csv", 1
        while path.exists():
            number += 1
            path = directory / f"metrics_{number}.csv"
        if own:
            shutil.copyfile(own[0], path)
        return path

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    def batch_done(self, loss: Tensor) -> None:
        """Counts a complete batch with its mean task loss (a scalar tensor) and does what is due at this step."""
        self.step += 1
        self.batch_in_epoch += 1
        if self.batch_in_epoch == self.data.batches_per_epoch:
            self.epoch, self.batch_in_epoch = self.epoch + 1, 0
        self.seed_batch()
        self._in_update = False
        now = time.monotonic()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        value = self.processes.average(loss).item()
        self.loss_sum, self.loss_count = self.loss_sum + value, self.loss_count + 1
        self.smooth_loss = 0.9 * self.smooth_loss + 0.1 * value if self.smooth_loss == self.smooth_loss else value
        # Where another rank has died this raises; by now the batch is complete.
        self.processes.agree()
        if self.step == self._start[1] + 1 and self.processes.saves:
            # What cannot be saved is said now, and what saving needs is imported now, not when somebody waits to leave.
            laid_out(self.processes.rows(self.state_dict("")), self.processes.rank)
        self.finish_step()

    def seed_batch(self) -> None:
        """The random numbers of a batch (its dropout) come from seed, step and rank alone: there is no state to restore."""
        digest = hashlib.blake2b(b"%d %d %d" % (self.config.seed, self.step, self.processes.rank), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)

    @property
    def _evaluation_due(self) -> bool:
        return self.step > 0 and (self.step % self.config.eval_every == 0 or self.finished)

    @property
    def evaluation_pending(self) -> bool:
        """True where this step's evaluation was cut short: its batches are not yet in a row of metrics.csv."""
        return self._evaluation_due and self.loss_count > 0

    def finish_step(self) -> None:
        """Evaluates, logs and saves where due. A request to leave cuts the evaluation short; all of it is then done on resume."""
        targets, validation_loss = {}, None
        logged = self._evaluation_due or self.step % self.config.log_every == 0
        saved = self.step % self.config.save_every == 0 or self.monitor.save_requested
        if self._evaluation_due:
            validation_loss = self.evaluate()
            if validation_loss is None:
                return
            if validation_loss < self.best_loss:
                self.best_loss = validation_loss
                targets["best"] = "best.pt"
        if logged:
            self._log(validation_loss)
        if saved:
            reason = USER_SAVE if self.monitor.save_requested else "periodic"
            self.monitor.save_requested = False
            targets[reason] = f"step_{self.step}.pt"
        if targets and self.processes.saves:
            self.writer.submit(self.processes.rows(self.state_dict(None)), targets)
        self._show(logged)

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Mean loss on the validation windows, in nats a byte; None where a request to leave cut it short."""
        self.model.eval()
        total, count = 0.0, 0
        try:
            for windows in self.data.validation_batches():
                if self.monitor.exit_requested:
                    return None
                # Without a window of its own a rank computes something all the same: in a sharded model all need all.
                loss, _ = task_loss(self.model, (windows if len(windows) else windows.new_zeros(1, windows.shape[1])).to(self.device))
                total, count = total + loss.item() * len(windows), count + len(windows)
                self.processes.agree()
        finally:
            self.model.train()
        total, count = self.processes.total(total, count)
        return total / count

    def _save(self, state: dict | Exception, name: str) -> Path:
        """Where it has saved. state may be the exception that this process had instead of a copy; it is then raised in all."""
        self.processes.begin_save()
        path = Path(self.processes.lead(self._begin_save, name))
        self.processes.each(raise_if_error, state)
        write_checkpoint(state, path, self.processes)
        if self.processes.rank == 0:
            self._last_save = name, time.monotonic()
            if path.name.startswith("step_"):
                self.directory.prune(path, self.config.keep)
        return path

    def _describe(self) -> str:
        """For a person who asks: the last checkpoint."""
        if self._last_save is None:
            return f"No checkpoint yet since {'the one that was resumed' if self.resumed_from else 'this start'}."
        name, when = self._last_save
        return f"Last checkpoint: {name}, {short_time(time.monotonic() - when)} ago."

    def _begin_save(self, name: str) -> Path:
        self.directory.keep_hold()
        self.metrics.flush()  # no checkpoint is ever ahead of its rows
        if self.tensorboard is not None:
            self.tensorboard.flush()
        return self.directory.path_for(name)

    def _learning_rates(self) -> list[float]:
        return [optimizer.param_groups[0]["lr"] for optimizer in self.controller.optimizers.values()]

    def _log(self, validation_loss: float | None) -> None:
        now = time.monotonic()
        tokens = self.loss_count * self.data.windows_per_batch * self.config.context
        loss = self.loss_sum / max(1, self.loss_count)
        tokens_per_second = round(tokens / max(1e-9, now - self._row_clock))
        rates = self._learning_rates()
        self.last_row = ",".join(map(str, [self.step, self.epoch, loss, "" if validation_loss is None else validation_loss, *rates]))
        if self.processes.rank == 0:
            self.metrics.row(f"{self.last_row},{tokens_per_second},{round(self.seconds, 3)}")
            if self.tensorboard is not None:
                by_name = {f"lr/{name}": rate for name, rate in zip(self.controller.optimizers, rates)}
                figures = {"loss/train": loss, "loss/validation": validation_loss, **by_name, "tokens_per_second": tokens_per_second}
                for name, value in figures.items():
                    if value is not None:
                        self.tensorboard.add_scalar(name, value, self.step)
        self.loss_sum, self.loss_count, self._row_clock = 0.0, 0, now

    def _show(self, logged: bool) -> None:
        """The status line on a terminal; elsewhere a plain line for every row of metrics.csv."""
        now = time.monotonic()
        if self.screen.is_terminal and now - self._status_clock < STATUS_SECONDS or not (self.screen.is_terminal or logged):
            return
        self._status_clock = now
        started, first_step = self._start
        seconds_per_step = max(1e-9, now - started) / max(1, self.step - first_step)
        left = datetime.timedelta(seconds=min(round(seconds_per_step * (self.total_steps - self.step)), 10**9))
        tokens_per_second = self.data.windows_per_batch * self.config.context / seconds_per_step
        best = [f"best {self.best_loss:.4f}"] if self.best_loss < math.inf else []
        parts = [f"step {self.step}/{self.total_steps}", f"loss {self.smooth_loss:.4f}", f"{left} left", *best,
                 f"epoch {self.epoch}", f"{tokens_per_second:,.0f} tokens/s", f"lr {self._learning_rates()[-1]:.2e}"]
        if self.screen.is_terminal:
            self.screen.status(parts, self.step / self.total_steps)
        else:
            self.screen.say(" | ".join(parts))

    # ---- leaving

    def leave_gracefully(self) -> bool:
        """Saves as of the last complete batch and returns True; False where the save failed and training has to go on.

        After q a person can make room and type q again. After a signal there may be no second chance: the system's
        temporary directory is tried, and exit_code is 1 if that fails too.
        """
        self.screen.say("📝 Saving emergency checkpoint...")
        while self.monitor.exit_requested:
            reason, self.exit_code = self.monitor.reason, self.monitor.exit_code
            try:
                self.processes.finally_saving(self._leave_with, EMERGENCY, f"emergency_exit/emergency_step_{self.step}.pt", reason,
                                              reason != USER_REQUEST)
                return True
            except SAVE_ERRORS as error:
                self.screen.say(f"❌ Emergency checkpoint not saved: {one_line(error)}. Training goes on: "
                                "make room, then press 'q' + Enter again.")
                self.monitor.withdraw(reason)
        if self.evaluation_pending:
            self.finish_step()
        return False

    def complete(self) -> None:
        """Ends a run whose steps are all done: final.pt, or a graceful exit where a request cut the last evaluation short."""
        while self.evaluation_pending:
            if self.monitor.exit_requested and self.leave_gracefully():
                return
            self.finish_step()
        self.processes.finally_saving(self._leave_with, FINAL, "final.pt", "completed", True)

    def leave_after_exception(self, error: Exception) -> None:
        """Saves the state as of the last complete batch, unless the exception came between two halves of an update."""
        self.error, self.exit_code = error, 1
        rank, name = self.processes.first_failure(error)
        if not self.processes.saves:  # who does has the same weights
            return
        self.processes.break_off()
        self.writer.wait()
        if rank != self.processes.rank:
            self.screen.say(f"❌ {name} in rank {rank}.")
        self.processes.begin_save()
        try:
            self.processes.lead(self._check_complete, self.processes.each(self._complete_step))
        except SAVE_ERRORS as incomplete:
            self._name_newest()
            self.screen.say(f"❌ {one_line(incomplete)}: nothing half-updated is saved.")
            return
        self.screen.say("📝 Saving emergency checkpoint...")
        self._leave_with(EMERGENCY, f"emergency_exit/emergency_step_{self.step}.pt", f"exception_{name}", fall_back=True)

    def _complete_step(self) -> int | None:
        """As of which step this process's state is whole; None in the middle of an update."""
        return None if self._in_update else self.step

    def _check_complete(self, steps: list[int | None]) -> None:
        if None in steps or len(set(steps)) > 1:
            raise RuntimeError("The exception came in the middle of an optimizer step")

    def _name_newest(self) -> None:
        """For a summary after which nothing new is on the disk."""
        if self.processes.rank != 0:
            return
        with contextlib.suppress(CheckpointError, OSError):  # there is none to be read: the summary then names no checkpoint
            self.saved = ("Newest whole checkpoint", latest_checkpoint(self.directory.path, self.screen.say))

    def _leave_with(self, label: str, name: str, reason: str, fall_back: bool) -> None:
        """The last save, and the accelerator's cache. Raises one of SAVE_ERRORS where it fails and fall_back is False."""
        self.writer.wait()
        self.writer.retry()
        state = self.processes.rows(self.state_dict(reason))
        try:
            path = self._save(state, name)
        except SAVE_ERRORS as error:
            if not fall_back:
                raise
            self.screen.say(f"⚠️ {label} not saved: {one_line(error)}. Trying the temporary directory...")
            self.processes.begin_save()
            try:
                path = Path(self.processes.lead(self._fallback_path, name))
                write_checkpoint(state, path, self.processes)
            except SAVE_ERRORS as second_error:
                self.exit_code = 1
                self.screen.say(f"❌ {label} not saved: {one_line(second_error)}.")
                with contextlib.suppress(OSError):  # what was saved there earlier stays
                    fallback_directory(self.config.checkpoint_dir).rmdir()
                self._name_newest()
                return
        self.saved = (label, path)
        self.screen.say(f"✅ {label} saved: {path}")
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()
            self.screen.say(f"🧹 {self.device.type.upper()} cache cleared")

    def _fallback_path(self, name: str) -> Path:
        folder = fallback_directory(self.config.checkpoint_dir)
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder / f"{Path(name).stem}_{self.run_id}.pt"

    def close(self) -> None:
        if self.processes.saves:
            self.writer.close()
        if self.processes.rank == 0:
            self.metrics.close()
            if self.tensorboard is not None:
                self.tensorboard.close()

    def summary(self) -> str:
        """What the person reads last: how far it came, what was saved, and the command that goes on."""
        unknown = "" if self.best_loss < math.inf else f" (step {self.config.eval_every} has the first evaluation)"
        lines = ["📊 Training Summary:", f"   Completed Steps: {self.step}", f"   Epoch: {self.epoch}",
                 f"   Best Loss: {self.best_loss:.4f}{unknown}"]
        if self.saved is not None:
            label, path = self.saved
            lines.append(f"   {label}: {path}")
            more = f" --steps {2 * self.total_steps}" if label == FINAL else ""
            more += f" --epochs {2 * self.config.epochs}" if more and self.config.epochs else ""
            lines.append(f"▶️ {'Train further' if more else 'Resume'} with: {own_command()} --resume {shlex.quote(str(path))}{more}")
        return "\n".join(lines)


def state_bytes(model: nn.Module) -> int:
    """Of a checkpoint, or somewhat more: a parameter and two moments of it."""
    return 3 * sum(parameter.nbytes for parameter in model.parameters())


def raise_if_error(state: object) -> None:
    if isinstance(state, Exception):
        raise state


def check_same(saved: dict, own: dict, path: Path) -> None:
    """Raises CheckpointError, with the first difference, unless what is saved has own's keys, types and shapes.

    Of optimizers the class and the parameters are compared; what else they and the schedulers hold is for their own
    load_state_dict.
    """
    try:
        there, here = outline(saved), outline(own)
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of this program ({one_line(error)})") from error
    for where in [*here, *there]:
        if there.get(where) != here.get(where):
            raise CheckpointError(f"{path} does not fit this run: {where} is {there.get(where, 'not there')}, "
                                  f"but here {here.get(where, 'not there')}")


def outline(state: dict) -> dict[str, str]:
    """{place in a state: what is there}."""
    found: dict[str, str] = {}

    def add(where: str, value: object) -> None:
        found[where] = type(value).__name__
        if isinstance(value, Tensor):
            found[where] = f"{tuple(value.shape)} {value.dtype}"
        elif isinstance(value, dict):
            for key, item in value.items():
                add(f"{where}[{key!r}]", item)

    for key, value in state.items():
        if key not in ("config", "optimizer_state_dicts", "scheduler_state_dicts"):
            add(str(key), value)
    for name, optimizer in state.get("optimizer_state_dicts", {}).items():
        found[f"optimizer {name}"] = optimizer["class"]
        for group, names in enumerate(optimizer["param_names"]):
            found |= {f"parameter {number} of group {group} of optimizer {name}": names[number] for number in range(len(names))}
    for name in state.get("scheduler_state_dicts", {}):
        found[f"scheduler {name}"] = "there"
    return found


def own_command() -> str:
    """This program as the person would type it here."""
    script = Path(os.path.abspath(sys.argv[0]))
    words = [sys.executable, str(script)]
    if script.parent == Path.cwd():  # elsewhere a relative path would be of no use tomorrow
        words = [word.removeprefix(f"{script.parent}/") for word in words]
    words = list(map(shlex.quote, words))
    if shutil.which("python") == sys.executable:
        words[0] = "python"
    if started_by_torchrun():
        processes = os.environ["LOCAL_WORLD_SIZE"]
        wrapper = script.parent / "scripts" / "train_torchrun.sh"
        if wrapper.exists():
            return f"{shlex.quote(str(wrapper) if words[1] == str(script) else 'scripts/train_torchrun.sh')} {processes}"
        words[1:1] = ["-m torch.distributed.run", f"--nproc-per-node={processes}"]
    return " ".join(words)


# ---- Training loops --------------------------------------------------------------------------------------------------


def standard_training_loop(run: Run, model: ByteLM, optimizer: Optimizer, scheduler: LRScheduler, data: ByteDataset,
                           monitor: ExitMonitor) -> None:
    """Trains until all steps are done or somebody asks to leave; either way everything is saved on return."""
    config = run.config
    while not run.finished:
        for batch in data.batches(run.epoch, run.batch_in_epoch, pin_memory=run.device.type == "cuda"):
            if monitor.exit_requested and run.leave_gracefully():
                return
            optimizer.zero_grad()
            loss = forward_backward(model, batch, config.grad_accum)
            clip_gradients(model, config.grad_clip)
            optimizer.step()
            scheduler.step()
            run.batch_done(loss)
            if run.finished:
                break
    run.complete()


def controller_training_loop(run: Run, controller: TrainingController, data: ByteDataset, monitor: ExitMonitor) -> None:
    """The same for any TrainingController, which decides what an optimizer step on a batch is."""
    while not run.finished:
        for batch in data.batches(run.epoch, run.batch_in_epoch, pin_memory=run.device.type == "cuda"):
            if monitor.exit_requested and run.leave_gracefully():
                return
            run.batch_done(controller.training_step(batch))
            if run.finished:
                break
    run.complete()


# ---- Many processes, which torchrun starts ---------------------------------------------------------------------------


ANSWER_SECONDS = 30  # what a rank waits for another that may have died


class AgreedMonitor:
    """In an ExitMonitor's place: a request that the monitor of any rank has heard shows on all ranks after the same batch.

    The question travels while a batch is computed, so the answer is there when it is done and costs no waiting; a request
    is honoured after the batch that follows the one it came in.
    """

    REQUESTS = [(None, 0), (USER_REQUEST, 0), ("torchrun_died", 1), *((f"signal_{signum.name}", 128 + signum) for signum in EXIT_SIGNALS)]

    def __init__(self, own: ExitMonitor) -> None:
        self.own, self._torchrun = own, os.getppid()
        self.save_requested = False
        self._ask()

    def _ask(self) -> None:
        self.exit_requested, self.reason, self.exit_code = False, None, 0
        if os.getppid() != self._torchrun:  # nobody is left who could end us
            self.own.request("torchrun_died", 1)
        save, self.own.save_requested = self.own.save_requested, False
        self._heard = torch.tensor([[reason for reason, _ in self.REQUESTS].index(self.own.reason), save])
        self._question = dist.all_reduce(self._heard, dist.ReduceOp.MAX, async_op=True)

    def agree(self) -> None:
        """Takes the answer to the last question and asks the next. Raises RuntimeError where a rank has died."""
        if self.exit_requested:
            return
        self._question.wait()
        request, save = self._heard.tolist()
        self.save_requested |= bool(save)
        if request:
            self.exit_requested, (self.reason, self.exit_code) = True, self.REQUESTS[request]
            self.own.request(self.reason, self.exit_code)  # whoever heard it, rank 0 says so
        else:
            self._ask()

    def withdraw(self, reason: str) -> None:
        self.own.withdraw(reason)
        self._ask()


class ManyProcesses(Processes):
    """This process's view of the group that torchrun made: rank 0 alone prints and listens to the keyboard.

    Every rank holds the whole model, DistributedDataParallel averages the gradients, and rank 0 saves. If sharded, each
    has a part of every parameter, gradient and optimizer state (fully_shard, PyTorch's FSDP2), a block is put together
    while it is computed, and each saves what it has. What they tell each other about a save goes through a store: beside
    training, and after a failure, when no process group is of use. Raises UserError where there are more processes than
    GPUs.
    """

    def __init__(self, monitor: ExitMonitor) -> None:
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        backend, local_rank = "gloo", int(os.environ["LOCAL_RANK"])
        if torch.cuda.is_available():
            if local_rank >= torch.cuda.device_count():
                raise UserError(f"{os.environ['LOCAL_WORLD_SIZE']} processes, but only {torch.cuda.device_count()} GPUs here")
            torch.cuda.set_device(local_rank)
            backend = "cpu:gloo,cuda:nccl"
        store, _, _ = next(dist.rendezvous("env://"))
        # torchrun may keep it over a restart, with the addresses of those that have died.
        self._store = dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(backend, store=self._store, rank=self.rank, world_size=self.world_size)
        self._mesh: dist.device_mesh.DeviceMesh | None = None
        self._save, self._exchanges, self._save_began = 0, itertools.count(), 0.0
        self._keys: tuple[list[str], list[str]] = ([], [])  # that rank 0 has seen in the save before and in this one
        self._signals_heard: int | None = None  # when the process group was broken off
        self._gave_up = False  # waiting for a rank that has died
        super().__init__(AgreedMonitor(monitor))

    def shard(self) -> None:
        """From now on each process has a part of the model."""
        self.sharded = True
        # A store of their own, which rank 0 serves: torchrun's dies with torchrun.
        if self.rank == 0:
            self._answers = dist.TCPStore(os.environ["MASTER_ADDR"], 0, is_master=True, wait_for_workers=False)
        port = self.on_first(lambda: self._answers.port)
        if self.rank != 0:
            self._answers = dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False)

    @property
    def saves(self) -> bool:
        return self.sharded or self.rank == 0

    def read(self, path: Path | str) -> dict:
        """The state with tensors on the meta device; each rank has verified its share of every record."""
        state, records, checksums = self.together(self._read_share, path)
        shares: list = [None] * self.world_size
        dist.all_gather_object(shares, checksums)
        check_checksums(path, records, shares)
        return state

    def _read_share(self, path: Path | str) -> tuple[dict, list[Record], list[int]]:
        with opened_checkpoint(path) as checkpoint:
            checkpoint.share(self.rank, self.world_size)
            return checkpoint.state, checkpoint.records, checkpoint.read()

    def restore(self, state: dict, path: Path, model: nn.Module, optimizers: dict[str, Optimizer]) -> dict:
        return self._load_rows(path, model, optimizers) if self.sharded else load_checkpoint(path)

    def _load_rows(self, path: Path, model: nn.Module, optimizers: dict[str, Optimizer]) -> dict:
        """What load_checkpoint returns, but sharded, and read, as the model's parameters are."""
        from torch.distributed.tensor import DTensor, Shard

        with opened_checkpoint(path) as checkpoint:
            def rows(value: object, parameter: Tensor) -> object:
                if not isinstance(value, Tensor) or not is_sharded(parameter) or value.shape != parameter.shape:
                    return value
                first, last = self._share_of(len(parameter))
                return Rows(checkpoint.rows(value, first, last), first, value.shape)

            def sharded(value: object) -> object:
                if not isinstance(value, Rows):
                    return value
                local = value.local.to(self._mesh.device_type)
                return DTensor.from_local(local.contiguous(), self._mesh, [Shard(0)], run_check=False, shape=value.shape,
                                          stride=torch.empty(value.shape, device="meta").stride())

            state, weights = dict(checkpoint.state), model.state_dict()
            state["model_state_dict"] = {name: rows(value, weights[name]) for name, value in state["model_state_dict"].items()}
            state["optimizer_state_dicts"] = dict(state["optimizer_state_dicts"])
            for name, optimizer in optimizers.items():
                parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
                saved = dict(state["optimizer_state_dicts"][name])
                saved["state"] = {number: {key: rows(value, parameters[number]) for key, value in values.items()}
                                  for number, values in saved["state"].items()}
                state["optimizer_state_dicts"][name] = saved
            state = mapped(state, checkpoint.whole)
            checkpoint.read()
            return mapped(state, sharded)

    def _share_of(self, rows: int) -> tuple[int, int]:
        """First row of this rank, and of the next, as PyTorch shards a tensor."""
        share = -(-rows // self.world_size)
        return min(self.rank * share, rows), min((self.rank + 1) * share, rows)

    def rows(self, state: dict) -> dict:
        def own(value: object) -> object:
            if not (isinstance(value, Tensor) and is_sharded(value)):
                return value
            return Rows(value.to_local().detach(), self._share_of(len(value))[0], value.shape)

        return mapped(state, own) if self.sharded else state

    def place(self, module: nn.Module, device: torch.device) -> nn.Module:
        if not self.sharded:
            return module.to(device)
        from torch.distributed.fsdp import fully_shard

        if self._mesh is None:
            self._mesh = dist.device_mesh.init_device_mesh(device.type, (self.world_size,))
        return fully_shard(module.to(device), mesh=self._mesh)

    def parallel(self, controller: TrainingController, data: ByteDataset) -> None:
        controller.average = self.average
        if self.sharded:
            return
        controller.model = nn.parallel.DistributedDataParallel(controller.model)
        # It orders its buckets by the first backward pass. That one comes before training, so that a resumed run adds
        # gradients up in the same order.
        windows = data[0].chunk(controller.config.grad_accum)[0]
        forward_backward(controller.model, windows, 1, controller.regularization)
        controller.model.zero_grad()

    def average(self, mean: Tensor) -> Tensor:
        total = mean.clone()
        dist.all_reduce(total)
        return total / self.world_size

    def total(self, *values: float) -> Sequence[float]:
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def agree(self) -> None:
        self.monitor.agree()

    def together(self, function: Callable, *arguments: object) -> typing.Any:
        result, mistakes = None, [None] * self.world_size
        try:
            result, mistake = function(*arguments), None
        except UserError as error:
            mistake = str(error)
        dist.all_gather_object(mistakes, mistake)
        for rank, mistake in enumerate(mistakes):
            if mistake is not None:
                raise UserError(f"{mistake} (on rank {rank})" if rank else mistake)
        return result

    def on_first(self, function: Callable, *arguments: object) -> typing.Any:
        outcome = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = function(*arguments)
            except (UserError, *SAVE_ERRORS) as error:
                outcome[1] = error
            with contextlib.suppress(RuntimeError):  # a rank that has died is not our function's fault: the next batch will tell
                dist.broadcast_object_list(outcome)
        else:
            dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def finally_saving(self, function: Callable, *arguments: object) -> None:
        function(*arguments) if self.sharded else self.on_first(function, *arguments)

    def begin_save(self) -> None:
        self._save, self._exchanges, self._save_began = self._save + 1, itertools.count(), time.monotonic()
        for key in self._keys[0]:  # of the save before the last: everybody is done with it, or has given up
            self._answers.delete_key(key)
        self._keys = self._keys[1], []

    def lead(self, function: Callable, *arguments: object) -> typing.Any:
        if not self.sharded:
            return function(*arguments)
        key = f"{self._save} {next(self._exchanges)}"
        if self.rank == 0:
            self._answers.set(key, json.dumps(attempt(function, *arguments), default=str))
        return self._answer(key, 0)

    def each(self, function: Callable, *arguments: object) -> list:
        if not self.sharded:
            return [function(*arguments)]
        key, results = f"{self._save} {next(self._exchanges)} of ", []
        self._answers.set(f"{key}{self.rank}", json.dumps(attempt(function, *arguments)))

        def gather() -> None:
            results.extend(self._answer(f"{key}{rank}", rank) for rank in range(self.world_size))

        self.lead(gather)
        return results

    def _answer(self, key: str, rank: int) -> typing.Any:
        """What attempt() has returned on a rank. Raises RuntimeError where none comes, or torchrun signals that one has died.

        A rank is waited for much longer than this one itself has taken for its part.
        """
        began = time.monotonic()
        patience = ANSWER_SECONDS + 10 * (began - self._save_began)
        while not self._answers.check([key]):
            waited = time.monotonic() - began
            if waited > patience or self._signals_heard is not None and self.monitor.own.signals_heard > self._signals_heard:
                self._gave_up = self._signals_heard is not None
                raise RuntimeError(f"Rank {rank}, which has a part of the model, does not answer")
            time.sleep(min(0.1, 0.001 + waited / 8))  # waiting in the store would hear no signal, and print warnings
        if self.rank == 0:
            self._keys[1].append(key)
        result, error = json.loads(self._answers.get(key))
        if error is not None:
            raise OSError(*error) if error[0] else RuntimeError(error[1])
        return result

    def first_failure(self, error: Exception) -> tuple[int, str]:
        own = f"{self.rank} {type(error).__name__}"
        try:
            rank, name = self._store.compare_set("failure", "", own).decode().split()
        except RuntimeError:  # the store has died with torchrun
            rank, name = own.split()
        return int(rank), name

    def break_off(self) -> None:
        dist.group.WORLD.abort()  # a device may be waiting for ranks that will not come
        if self.sharded:
            self._signals_heard = self.monitor.own.signals_heard
            self._hang_up()

    def _hang_up(self) -> None:
        """Closes the connections to the other ranks, which gloo's abort() does not. The stores' stay."""
        stores = {int(os.environ["MASTER_PORT"]), self._answers.port}
        for fd in map(int, os.listdir("/dev/fd")):
            with contextlib.suppress(OSError):  # closed by now, or not connected
                if stat.S_ISSOCK(os.fstat(fd).st_mode):
                    with socket.socket(fileno=os.dup(fd)) as connection:
                        ours = connection.family in (socket.AF_INET, socket.AF_INET6)
                        if ours and not stores & {connection.getpeername()[1], connection.getsockname()[1]}:
                            connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        dist.destroy_process_group()

    def wait_for_others(self) -> None:
        """The store that rank 0 serves ends with it: so it leaves last, if the others can be waited for."""
        with contextlib.suppress(RuntimeError):
            if self.rank != 0:
                self._answers.set(f"{self.rank} leaves", json.dumps([None, None]))
            elif not self._gave_up:
                for rank in range(1, self.world_size):
                    self._answer(f"{rank} leaves", rank)


def attempt(function: Callable, *arguments: object) -> tuple[typing.Any, tuple[int | None, str] | None]:
    """Result and error, one of them None, for another process."""
    try:
        return function(*arguments), None
    except SAVE_ERRORS as error:
        return None, (getattr(error, "errno", None), one_line(error))


def on_whole_matrices(function: Callable[[Tensor], Tensor], rows: Tensor, parameter: Tensor) -> Tensor:
    """function of whole matrices (count, rows, columns) for a rank that has some rows of each, like of parameter.

    Every rank computes all of it. rows (count, local rows, columns), and so the result.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, shape = parameter.device_mesh, (len(rows), *parameter.shape)
    stride = torch.empty(shape, device="meta").stride()
    whole = DTensor.from_local(rows, mesh, [Shard(1)], run_check=False, shape=torch.Size(shape), stride=stride).full_tensor()
    return DTensor.from_local(function(whole), mesh, [Replicate()], run_check=False).redistribute(placements=[Shard(1)]).to_local()


def named_checkpoint(name: str, directory: str) -> Path:
    """The absolute path of a checkpoint that a person names, or for "latest" of the newest whole one in directory.

    Raises UserError for a name without a file or of a directory of checkpoints.
    """
    if name == "latest":
        return latest_checkpoint(os.path.abspath(directory))
    path = Path(os.path.abspath(name))
    if not path.exists():
        raise CheckpointError(f"{path}: No such file or directory; scripts/checkpoints.py list shows what there is")
    if (path / ".metadata").exists():
        raise CheckpointError(f"{path}: a sharded checkpoint of the first edition, which this one does not read")
    if path.is_dir() and (inside := checkpoints_in(path)):
        raise CheckpointError(f"{path} is a directory of checkpoints; its newest is {os.path.relpath(inside[0])}")
    return path


# ---- Command line ----------------------------------------------------------------------------------------------------


OPTION_GROUPS = {  # by their first option
    "mode": "what to train", "steps": "how long, and in what steps", "context": "the model", "lr": "optimization",
    "eval_every": "evaluations, checkpoints, metrics", "seed": "where and how it is computed"}


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        hint = "--help lists the options"
        if unknown := re.match(r"unrecognized arguments: (--[^\s=]+)", message):
            if close := difflib.get_close_matches(unknown[1], self._option_string_actions, 1):
                hint = f"did you mean {close[0]}?"
        raise UserError(f"{message} ({hint})")


def parse_options(arguments: Sequence[str] | None) -> dict[str, object]:
    """The options that were given, by Config field name, and `resume` and `no_keyboard`. Raises UserError."""
    parser = OneLineParser(usage="%(prog)s [options]", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                           allow_abbrev=False, argument_default=argparse.SUPPRESS)
    group = None
    for field in dataclasses.fields(Config):
        if field.name in OPTION_GROUPS:
            group = parser.add_argument_group(OPTION_GROUPS[field.name])
        settings = dict(field.metadata["argparse"])
        if field.default is not None and field.default != () and field.default is not False:
            settings["help"] += f" (default {field.default})"
        if "type" in settings:
            settings.setdefault("metavar", "N" if settings["type"].__name__ == "int" else "X")
        group.add_argument("--" + field.name.replace("_", "-"), **settings)
    group.add_argument("--no-keyboard", action="store_true", default=False, help="do not listen to the keyboard")
    group = parser.add_argument_group("going on")
    group.add_argument("--resume", metavar="CKPT", default=None, type=nonempty_path,
                       help="a checkpoint to go on from, or 'latest': the newest whole one")
    return vars(parser.parse_args(arguments))


def choose_device(name: str) -> torch.device:
    """Raises UserError where the device is not there, or no collective of torch.distributed reaches it."""
    present = torch.accelerator.current_accelerator(check_available=True)
    usable = ("cuda",) if started_by_torchrun() else ("cuda", "mps")
    if name == "auto":
        return present if present is not None and present.type in usable else torch.device("cpu")
    if name == "mps" and name not in usable:
        raise UserError("--device mps: torchrun's processes cannot exchange gradients there; use --device cpu")
    if name != "cpu" and (present is None or present.type != name):
        raise UserError(f"--device {name}: there is none here (found {present.type if present else 'only the CPU'})")
    return torch.device(name)


def checkpoint_to_resume(resume: str, directory: str, processes: Processes, report: Callable[[str], None]) -> tuple[Path, dict] | None:
    """The checkpoint that --resume names, the same in all processes, verified and of this program. Raises UserError.

    None, a fresh start, for latest where there is none and torchrun may restart us.
    """
    def read(path: Path) -> dict:
        state = processes.read(path)
        check_origin(state, path)
        return state

    if resume == "latest":
        directory = os.path.abspath(directory)
        paths = processes.on_first(checkpoints_in, directory)
        if not paths and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            return None
        return first_whole(paths, read, directory, report)
    path = processes.together(named_checkpoint, resume, directory)
    return path, read(path)


def check_origin(state: dict, path: Path) -> None:
    """Raises CheckpointError unless a checkpoint is of this program and of a version that it reads."""
    if "format_version" not in state:
        raise CheckpointError(f"{path}: not a checkpoint of this program")
    if type(state["format_version"]) is not int or state["format_version"] != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format {reprlib.repr(state['format_version'])}, but this program reads format {FORMAT_VERSION}")
    check_config(state.get("config"), path)
    if not isinstance(state.get("model_state_dict"), dict):
        raise CheckpointError(f"{path}: not a checkpoint of this program (it has no model_state_dict)")


def check_config(stored: object, path: Path) -> None:
    """Raises CheckpointError unless a checkpoint's configuration is one that the command line makes, values and types."""
    names = {field.name for field in dataclasses.fields(Config)}
    if not isinstance(stored, dict) or stored.keys() != names:
        other = reprlib.repr(sorted(map(str, names ^ stored.keys()))) if isinstance(stored, dict) else "none"
        raise CheckpointError(f"{path}: another program's configuration ({other})")
    arguments, made = [], {"data": []}
    try:
        for name, value in stored.items():
            flag, values = "--" + name.replace("_", "-"), value if isinstance(value, tuple) else [value]
            if value is None or value is False or not values:
                made.setdefault(name, getattr(Config, name))
            elif not all(type(item) in (str, int, float, bool) and "\0" not in str(item) for item in values) or (
                    values is value and not all(map(os.path.isabs, values))):
                raise ValueError(f"{name}={reprlib.repr(value)}")
            else:
                arguments += [flag] if value is True else [flag, *values] if isinstance(value, tuple) else [f"{flag}={value}"]
        made |= parse_options(arguments)
        made["data"] = tuple(made["data"])
        for name, value in stored.items():
            if type(value) is not type(made[name]) or value != made[name]:
                raise ValueError(f"{name}={reprlib.repr(value)}")
        if dataclasses.asdict(Config.from_options({}, stored)) != stored:
            raise ValueError("its parts do not go together")
    except (UserError, ValueError, TypeError) as error:  # TypeError: an argument that is no text
        raise CheckpointError(f"{path}: not a configuration of this program ({one_line(error)})") from error


def check_model(config: Config, tensors: dict[str, Tensor], path: Path) -> None:
    """Raises CheckpointError where a configuration would build another model than the checkpoint holds, without building it."""
    try:
        if config.layers * config.experts > len(tensors):
            raise ValueError("fewer tensors than its configuration asks for")
        with torch.device("meta"):
            check_same({"model_state_dict": tensors}, {"model_state_dict": ByteLM(config).state_dict()}, path)
    except (RuntimeError, ValueError) as error:  # RuntimeError: sizes beyond what any tensor can have
        raise CheckpointError(f"{path} does not fit its own configuration ({one_line(error)})") from error


def prepare(options: dict[str, object], resumed: tuple[Path, dict] | None, processes: Processes, screen: Screen) -> Run:
    """Builds data, model, controller and run and restores the checkpoint; writes nothing."""
    options = {"shard": processes.sharded, **options}
    del options["resume"]
    resumed_from, state = resumed or (None, None)
    if state is not None and home_of(resumed_from) != fallback_directory(state["config"]["checkpoint_dir"]):
        options.setdefault("checkpoint_dir", str(home_of(resumed_from)))  # wherever the run has been moved or copied
    config = Config.from_options(options, state and state["config"])
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard")
    if config.shard and not processes.sharded:
        raise UserError("--shard needs torchrun's processes: scripts/train_torchrun.sh 2 --shard, or torchrun --nproc-per-node=2")
    if state is not None:
        check_model(config, state["model_state_dict"], resumed_from)
    device = choose_device(config.device)
    if device.type == "cuda":  # bit for bit needs kernels that add in a fixed order
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(config.seed)
    data = ByteDataset(config, processes.rank, processes.world_size)
    total_steps = min(config.steps, config.epochs * data.batches_per_epoch if config.epochs else config.steps)
    bfloat16 = config.dtype == "bfloat16" or config.dtype == "auto" and device.type == "cuda"
    try:
        place = functools.partial(processes.place, device=device)
        model = place(ByteLM(config, torch.bfloat16 if bfloat16 else torch.float32, place))
    except (RuntimeError, MemoryError) as error:
        raise UserError(f"no memory for a model of this size ({one_line(error)})") from error
    controllers = {"standard": StandardTrainingController, "geometric": GeometricTrainingController}
    controller = controllers[config.mode](model, config, total_steps)
    run = Run(config, model, controller, data, total_steps, device, processes, screen)
    if state is not None:
        run.load_state_dict(state, resumed_from)
    if config.compile:
        model.compile()
    return run


def train(options: dict[str, object]) -> int:
    """Trains as the options say and returns the exit code. Raises UserError for mistakes found before training."""
    if options["resume"] == "latest":
        options.setdefault("checkpoint_dir", Config.checkpoint_dir)  # where it is looked for, even if the run has been moved
    first = is_first_rank()
    screen = Screen(shown=first)
    with contextlib.ExitStack() as stack:
        stack.callback(end_children)
        keyboard = not options.pop("no_keyboard")
        monitor = stack.enter_context(ExitMonitor(screen, keyboard and first))
        for signum in _early_signals:
            monitor.hear(signum)
        processes = Processes(monitor)
        resumed = None
        if started_by_torchrun():
            processes = ManyProcesses(monitor)
        if options["resume"] is not None:
            directory = options.get("checkpoint_dir", Config.checkpoint_dir)
            resumed = checkpoint_to_resume(options["resume"], directory, processes, screen.say)
        if started_by_torchrun() and options.get("shard", resumed is not None and resumed[1]["config"]["shard"]):
            processes.shard()
            stack.callback(processes.wait_for_others)
        run = processes.together(prepare, options, resumed, processes, screen)
        if run.finished and (run.completed or run.step > run.total_steps):
            screen.say(f"✅ Nothing left to do: step {run.step} of {run.total_steps}. A larger --steps trains further.")
            return 0
        run.begin()
        stack.callback(run.close)
        try:
            if run.evaluation_pending:
                run.finish_step()
            if run.config.loop == "standard":
                standard_training_loop(run, run.controller.model, run.controller.optimizers["adamw"], run.controller.schedulers["adamw"],
                                       run.data, processes.monitor)
            else:
                controller_training_loop(run, run.controller, run.data, processes.monitor)
            processes.close()
        except Exception as error:  # whatever the batch raised; it is shown once the state is safe
            run.leave_after_exception(error)
    if run.error is not None:
        if processes.first_failure(run.error)[0] == processes.rank:  # no other rank can say more
            complain("".join(traceback.format_exception(run.error)))
    elif run.saved is not None:
        screen.say("🎉 All steps done!" if run.saved[0] == FINAL else "✨ Graceful exit completed!")
    summary = run.summary()
    screen.say(summary)
    screen.clear(wait=OUTPUT_GRACE_SECONDS)
    if first:
        with contextlib.suppress(OSError):  # a full disk: scripts/stop.sh will know less
            run.directory.write_outcome(f"{run.exit_code}\n{summary}\n")
    if run.error is None and started_by_torchrun() and int(os.environ["TORCHELASTIC_MAX_RESTARTS"]):
        return 0  # torchrun would start again what was asked to leave
    return run.exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    for fd in range(3):  # a checkpoint must never become descriptor 1 or 2 because the parent closed it
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    try:
        return train(parse_options(arguments))
    except UserError as error:
        if is_first_rank():
            complain(f"error: {' '.join(str(error).splitlines())}\n")
        return 2
    except SystemExit as end:  # of --help
        return end.code
    finally:
        for signum in EXIT_SIGNALS:  # everything is saved: a signal in the interpreter's last moments changes nothing
            signal.signal(signum, signal.SIG_IGN)


if __name__ == "__main__":
    _exit_code = main()
    # All is saved and said. Taking torch's modules apart would keep the accelerator's memory and leave what is typed to
    # the shell for most of a second more.
    atexit._run_exitfuncs()
    for _stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):  # gone with the terminal, or closed
            _stream.flush()
    os._exit(_exit_code)
