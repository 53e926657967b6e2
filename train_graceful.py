#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "numpy"]
# ///
"""Train a PyTorch model and leave at any moment without losing anything.

    python train_graceful.py                     train the built-in model on Python's own source
    python train_graceful.py --mode geometric    rotated experts and three optimizers
    python train_graceful.py --resume latest     go on: the same run, bit for bit

For a model of your own, import this file, write train(run) and call main(train), as is done at its
end. In another trainer, ExitMonitor, save_checkpoint and load_checkpoint are of use alone.
Keys: q + Enter saves and leaves, s + Enter saves, ? + Enter shows the last checkpoint. Ctrl-C and
signals save and leave too, after the batch at hand; a second Ctrl-C leaves without saving.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    # Importing torch takes seconds: nothing to save yet, and no reason for a traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
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
import gc
import hashlib
import io
import itertools
import linecache
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate


class UserError(Exception):
    """A mistake that the user can mend: main() prints it as one line and exits with code 2."""


class CheckpointError(UserError):
    """The file is not a checkpoint, is damaged, or does not fit this run."""


def one_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or " ".join(str(error).split())[:1000]
    return text or type(error).__name__


# ---- Options ----------------------------------------------------------------------------------


class option(NamedTuple):
    """An option of the command line; a fixed one cannot change when a run is resumed."""

    default: Any
    help: str = ""
    choices: tuple[str, ...] | None = None
    fixed: bool = True
    least: float = -math.inf
    below: float = 1e15
    kind: Callable[[str], Any] | None = None

    def add_to(self, group: argparse._ActionsContainer, name: str) -> None:
        text = self.help.replace("%", "%%")
        if isinstance(self.default, bool):
            group.add_argument(flag(name), action=argparse.BooleanOptionalAction, help=text)
            return
        several = "+" if isinstance(self.default, tuple) else None
        one = next(iter(self.default), "") if several else self.default
        kind: Any = self.kind or (str if one is None else type(one))
        if one not in (None, ""):
            text += f" (default {self.default})"
        group.add_argument(flag(name), type=kind, choices=self.choices, nargs=several, help=text)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def interval(text: str) -> int | str:
    return text if text == "epoch" else int(text)


COMMON_OPTIONS = {
    "steps": option(None, "batches in the whole run, resumes included", None, False, 1, kind=int),
    "epochs": option(None, "passes over the data, if they end earlier", None, False, 1, kind=int),
    "batch_size": option(16, "samples, over all processes, unless the script says", least=1),
    "workers": option(0, "processes that load the data", None, False, 0, 1025),
    "seed": option(0, "of the weights, the order of the data, augmentation, dropout", least=0),
    "device": option("auto", "where to train", ("auto", "cpu", "cuda", "mps"), False),
    "dtype": option("auto", "auto: bfloat16 on CUDA", ("auto", "float32", "bfloat16"), False),
    "compile": option(False, "run the models through torch.compile", fixed=False),
    "shard": option(False, "share models out; to save, rank 0 holds all in memory", fixed=False),
    "eval_every": option(100, "batches, or epoch", None, False, 1, kind=interval),
    "eval_batches": option(None, "of an evaluation, if not all", None, False, 1, kind=int),
    "save_every": option(500, "batches between periodic checkpoints", None, False, 1),
    "keep": option(3, "periodic checkpoints kept, and emergency ones", None, False, 1),
    "log_every": option(10, "batches between rows of metrics.csv", None, False, 1),
    "checkpoint_dir": option("checkpoints", "where it saves", fixed=False, kind=os.path.abspath),
    "resume": option(None, "a checkpoint, or latest; auto: latest if there is one, else anew"),
    "weights": option(None, "a checkpoint from whose weights a new run begins"),
    "keyboard": option(True, "listen to the keyboard"),
}
NOT_STORED = ("resume", "weights", "keyboard")
NEW_RUN = "--weights in the place of --resume begins a new run from its weights"


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def declared(own: dict[str, Any]) -> dict[str, option]:
    """The options of a program: the common ones, overlaid with main()'s keyword arguments."""
    options = dict(COMMON_OPTIONS)
    for name, value in own.items():
        near = difflib.get_close_matches(name, COMMON_OPTIONS, cutoff=0.9)
        if near and name not in near:
            raise UserError(f"main({name}=...): {near[0]} is meant? Another one needs another name")
        if not isinstance(value, option):
            value = COMMON_OPTIONS.get(name, option(None))._replace(default=value)
        # Of a resumed run's checkpoint numpy's numbers are Python's.
        options[name] = tree_map(lambda x: x.item() if isinstance(x, np.generic) else x, value)
    return options


def parse_options(options: dict, argv: Sequence[str] | None, about: str | None) -> dict[str, Any]:
    """The options that were given on the command line, by name. Raises UserError."""
    parser = OneLineParser(
        usage="%(prog)s [options]",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    own = parser.add_argument_group("this program")
    for name, one in options.items():
        one.add_to(parser if name in COMMON_OPTIONS else own, name)
    given = vars(parser.parse_args(argv))
    return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}


def configuration(options: dict, given: dict, stored: dict, path: Any) -> argparse.Namespace:
    """Overlays defaults with a checkpoint's configuration, and that with what was given."""
    for name, value in stored.items():
        if name not in options:
            raise CheckpointError(f"{path}: here is no {flag(str(name))} as in its run; {NEW_RUN}")
        if options[name].fixed and given.get(name, value) != value:
            here, there = f"{flag(name)} {given[name]}", f"{flag(name)} {value}: leave it out"
            raise UserError(f"{here} does not fit the checkpoint, whose run has {there}; {NEW_RUN}")
    values = {name: one.default for name, one in options.items() if name not in NOT_STORED}
    values = {**values, **stored, **given}
    for name, value in values.items():
        least, below = options[name].least, options[name].below
        if isinstance(value, (int, float)) and not least <= value < below:
            raise UserError(f"{flag(name)} {value} is not {least:g} or more and below {below:g}")
    return argparse.Namespace(**values)


# ---- Terminal ---------------------------------------------------------------------------------

EXIT_SIGNALS = (SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU)
USER_REQUEST = "user_requested_graceful_exit"


def in_foreground(fd: int) -> bool:
    """False only where fd is our controlling terminal and the shell has given it to another job."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        # Not a terminal, or not our controlling one: job control does not apply.
        return True


def others_read() -> bool:
    """Whether the main thread waits for typing itself, in input() or a debugger of the loop's."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    line = frame and linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    asks = re.search(r"\binput\(", line or "") is not None
    while frame is not None and frame.f_globals is not globals() and not asks:
        module = frame.f_globals.get("__name__", "").partition(".")[0]
        asks = module in ("cmd", "code", "prompt_toolkit", "urwid", "IPython")
        frame = frame.f_back
    return asks


def complain(text: str) -> None:
    with contextlib.suppress(OSError, AttributeError):
        print(text, end="", file=sys.stderr, flush=True)


def descriptor(stream: Any) -> int | None:
    """None for a stream that was closed by the parent or is no plain file, as in a notebook."""
    try:
        # A notebook's own fileno() is that of its server's terminal.
        return io.TextIOWrapper.fileno(stream)
    except (OSError, TypeError, ValueError):
        return None


class Screen:
    """Lines for people on standard output; a failed write raises nothing and blocks no training."""

    def __init__(self, shown: bool = True) -> None:
        # A signal handler may print in the middle of a line of ours.
        self._lock = threading.RLock()
        self._stream = sys.stdout if shown else None
        self._fd = descriptor(self._stream)
        self.is_terminal = self._fd is not None and os.isatty(self._fd)
        self._status_width, self._drawn, self._unwritten = 0, -math.inf, b""
        # What others have written ends within a line: a progress bar, or a prompt.
        self._within_line = False

    def share(self, undo: contextlib.ExitStack) -> None:
        """Until then what others print on this terminal takes the status line away first."""
        streams: list[Any] = [sys.stdout, sys.stderr] if self.is_terminal else []
        for one in (one for one in streams if os.isatty(descriptor(one) or -1)):
            # input() flushes before it asks.
            for name in ("write", "flush"):
                setattr(one, name, functools.partial(self._shared, os.getpid(), getattr(one, name)))
                undo.callback(vars(one).pop, name, None)

    def _shared(self, pid: int, call: Callable, *text: str) -> Any:
        # In a forked child the lock may be another thread's.
        if os.getpid() == pid:
            self.write("")
            if any(text):
                self._within_line = not text[0].endswith("\n")
        return call(*text)

    def say(self, text: str) -> None:
        start, self._within_line = "\n" * self._within_line, False
        self.write(f"{start}{text}\n")

    def status(self, text: Callable[[], str]) -> None:
        with contextlib.suppress(OSError):
            waits = self._unwritten or self._within_line or time.monotonic() - self._drawn < 0.1
            if self._fd is not None and not waits and in_foreground(self._fd):
                self._drawn = time.monotonic()
                # Columns stay free for what is typed and where a terminal would wrap.
                line = text()[: max(1, (os.get_terminal_size(self._fd).columns or 80) - 6)]
                self.write(line + " ", status_width=len(line) + 1)

    def write(self, text: str, status_width: int = 0, wait: float = 0.0) -> None:
        """Writes in the place of the status line; a stopped terminal has `wait` s to take it."""
        with self._lock:
            if self._status_width:
                text = "\r" + " " * self._status_width + "\r" + text
            self._status_width = status_width
            encoded = text.encode(getattr(self._stream, "encoding", None) or "utf-8", "replace")
            if self._fd is None:
                if self._stream is not None:
                    self._stream.write(text)
                return
            # So much is kept for a terminal or a pipe that takes none right now.
            self._unwritten = (self._unwritten + encoded)[-65536:]
            try:
                # What a failed flush leaves in Python's buffer would turn exit code 0 into 120.
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

        with ExitMonitor() as monitor:
            while not monitor.exit_requested:
                train_on_a_batch()

    `reason` and `exit_code` describe the first request; `save_requested` is set when `s` was typed.
    The thread sleeps in select() on standard input and the pipe to which Python's signal handler
    writes: it hears in the middle of a long torch operation. At the end of the block terminal and
    handlers are as before. Loader workers that are not forked need worker_init_fn=begin_worker.
    """

    KEYS = "Keys: q + Enter saves and leaves, s + Enter saves, a second Ctrl-C leaves at once."
    # Wakes the main thread out of a system call; by default it does nothing.
    WAKE = signal.SIGURG
    # When a signal was heard last, by its number, in memory that forked children share.
    heard_at: Any = None

    def __init__(self, screen: Screen | None = None, keyboard: bool = True) -> None:
        self.keyboard, self.save_requested = keyboard, False
        self.describe: Callable[[], str] | None = None
        # Set where there is nothing to save: a request then ends the process with this line.
        self.nothing_to_save: str | None = None
        # What this process has heard, and what it acts on: of several, what all have agreed on.
        self.heard: list[tuple[str, int]] = []
        self.requests = self.heard
        self._screen, self._lock = screen or Screen(), threading.Lock()
        self._stdin, self._typed = -1, b""
        self._listening = keyboard and descriptor(sys.stdin) is not None
        self._interruptible = False
        # A guest ends no process but raises what was abandoned in the main thread.
        self.is_guest = False
        self.abandoned: BaseException | None = None
        self._terminal_settings: list | None = None

    @property
    def exit_requested(self) -> bool:
        return bool(self.requests)

    @property
    def reason(self) -> str | None:
        return next(iter(self.requests), (None, 0))[0]

    @property
    def exit_code(self) -> int:
        return next(iter(self.requests), (None, 0))[1]

    def __enter__(self) -> ExitMonitor:
        with contextlib.ExitStack() as undo:
            self._pipe, self._wakeup = os.pipe()
            undo.callback(os.close, self._pipe)
            undo.callback(os.close, self._wakeup)
            if self._listening:
                # A descriptor of our own, so that nobody closes it under select().
                self._stdin = os.dup(sys.stdin.fileno())
                undo.callback(os.close, self._stdin)
            os.set_blocking(self._wakeup, False)
            before_fd = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
            undo.callback(signal.set_wakeup_fd, before_fd)
            self._pid = os.getpid()
            ExitMonitor.heard_at = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("d")
            for signum in (*EXIT_SIGNALS, self.WAKE):
                before = signal.getsignal(signum) or signal.SIG_DFL
                # nohup's promise.
                if signum == SIGHUP and before is signal.SIG_IGN:
                    continue
                handlers_before[signum] = before
                signal.signal(signum, self._handler)
                undo.callback(signal.signal, signum, before)
            undo.callback(handlers_before.clear)
            self._save_terminal()
            self._thread = threading.Thread(target=self._watch, name="exit-monitor", daemon=True)
            self._thread.start()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        # A forked child that leaves the block: all of this is its parent's.
        if os.getpid() == self._pid:
            os.write(self._wakeup, b"\0")
            # It may wait for a line that a shell has taken this very moment.
            self._thread.join(1.0)
            self._restore_terminal()
            self._undo.close()

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """In the main thread: a request raises Interrupted in the block, whatever it waits for."""
        self._interruptible = True
        try:
            if self.heard:
                raise Interrupted
            yield
        finally:
            self._interruptible &= self.abandoned is not None

    def request(self, reason: str, exit_code: int) -> None:
        """Asks for a graceful exit and says so on the screen; the same reason counts once."""
        with self._lock:
            if (reason, exit_code) in self.heard:
                return
            # Of torchrun's processes one that ends with code 0 would be waited for by the others.
            alone = exit_code or not dist.is_torchelastic_launched()
            if self.nothing_to_save is not None and alone:
                self._abandon(f"🛑 Exit requested. {self.nothing_to_save}", exit_code)
            elif not self.heard:
                # Said before the main thread can know, whose next line must come after this one.
                self._screen.say("🛑 Exit requested! Finishing current batch gracefully...")
            self.heard.append((reason, exit_code))

    def withdraw(self) -> None:
        """Takes the first request back, for a save that failed; one that came after it stays."""
        with self._lock:
            request = self.requests.pop(0)
            if request in self.heard:
                self.heard.remove(request)

    def _hear(self, signum: int) -> None:
        last, self.heard_at[signum] = self.heard_at[signum], time.monotonic()
        # Within half a second it is the same one: wrappers such as timeout deliver it twice.
        if signum == SIGINT and last and time.monotonic() - last > 0.5:
            text = "🛑 Second Ctrl-C: leaving without saving. Earlier checkpoints are whole."
            return self._abandon(text, 128 + SIGINT)
        if signum in EXIT_SIGNALS:
            self.request(f"signal_{signal.Signals(signum).name}", 128 + signum)

    def _handler(self, signum: int, frame: object) -> None:
        """Runs in the main thread, much later maybe: what counts is the byte in the pipe."""
        if not self.heard and signum != self.WAKE:
            # An asyncio loop with signal handlers may have taken the pipe's place.
            os.write(self._wakeup, bytes([signum]))
        if signum == self.WAKE and self._interruptible:
            self._interruptible = False
            raise self.abandoned or Interrupted

    def _watch(self) -> None:
        # In the background a read fails, then, and stops nobody.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTTIN, signal.SIGTTOU))
        pause, signals = None, b""
        while 0 not in signals:
            keyboard = [self._stdin] if self._listening and pause is None else []
            if self._interruptible and (self.heard or self.abandoned):
                # Where it comes just before the main thread blocks, it wakes nobody: so again.
                signal.pthread_kill(threading.main_thread().ident or 0, self.WAKE)
                pause = 0.1
            ready, _, _ = select.select([self._pipe, *keyboard], [], [], pause)
            pause = None
            signals = os.read(self._pipe, 4096) if self._pipe in ready else b""
            for signum in signals:
                self._hear(signum)
            if self._stdin in ready and (others_read() or not in_foreground(self._stdin)):
                # That line is not ours. Nothing tells when they have left, or of fg: look again.
                pause = 0.5
            elif self._stdin in ready and select.select([self._stdin], [], [], 0)[0]:
                self._read_keyboard()

    def _read_keyboard(self) -> None:
        self._save_terminal()
        try:
            data = os.read(self._stdin, 65536)
        except OSError:
            # EIO: the terminal has gone, or was given to another job this very moment.
            data = b""
        # An end of input that leaves a terminal is only Ctrl-D on an empty line.
        self._listening = bool(data) or os.isatty(self._stdin)
        *lines, typed = (self._typed + data).split(b"\n")
        self._typed = typed[:4096] if data else b""
        commands = {line.strip().lower() for line in lines}
        if commands & {b"q", b"quit", b"exit"}:
            self.request(USER_REQUEST, 0)
        elif b"s" in commands:
            self.save_requested = True
            self._screen.say("💾 Saving a checkpoint after this batch...")
        elif commands and not self.heard and os.isatty(self._stdin):
            self._screen.say(self.KEYS)
            if b"?" in commands and self.describe is not None:
                self._screen.say(self.describe())

    def _abandon(self, text: str, exit_code: int) -> None:
        """Ends the process here and now: the main thread may be inside a call of minutes."""
        self._screen.say(text)
        if self.is_guest:
            interrupt = {128 + SIGINT: KeyboardInterrupt()}
            self.abandoned = interrupt.get(exit_code, SystemExit(exit_code))
            self._interruptible = True
            return
        self._restore_terminal()
        end_children(multiprocessing.active_children())
        os._exit(exit_code)

    def _save_terminal(self) -> None:
        # In the background it is in the shell's editing mode: that is not ours to remember.
        ours = self._listening and os.isatty(self._stdin) and in_foreground(self._stdin)
        if self._terminal_settings is None and ours:
            self._terminal_settings = termios.tcgetattr(self._stdin)

    def _restore_terminal(self) -> None:
        if self._terminal_settings is None or not in_foreground(self._stdin):
            return
        with contextlib.suppress(termios.error):
            # TCSANOW: waiting for output to drain would hang on a terminal stopped with Ctrl-S.
            termios.tcsetattr(self._stdin, termios.TCSANOW, self._terminal_settings)
            # A q typed too many is not for the shell.
            termios.tcflush(self._stdin, termios.TCIFLUSH)


# What the monitor of this process has replaced.
handlers_before: dict[int, Any] = {}


def leave_to_parent(signum: int, frame: object) -> None:
    """In a forked child: a signal to the group, which the monitor hears too, is not for it."""
    # No SIG_IGN, which a program that the child executes would inherit.
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        if time.monotonic() - ExitMonitor.heard_at[signum] < 1:
            return
        # The monitor may not have come to it yet, and nothing will tell.
        time.sleep(0.005)
    signal.signal(signum, handlers_before.get(signum, signal.SIG_DFL))
    signal.raise_signal(signum)


def in_forked_child() -> None:
    if handlers_before:
        # The pipe is the parent's; terminate() ends a child at once.
        signal.set_wakeup_fd(-1)
        for signum, before in handlers_before.items():
            signal.signal(signum, before if signum == SIGTERM else leave_to_parent)
        # But a loader's workers, to which PyTorch gives a handler that ends them, end otherwise.
        workers: Any = torch.utils.data._utils.signal_handling
        set_handlers = workers._set_worker_signal_handlers

        def set_other_handlers() -> None:
            set_handlers()
            signal.signal(SIGTERM, leave_to_parent)

        workers._set_worker_signal_handlers = set_other_handlers
    signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop())


# Until a child's handlers are there, its signals wait.
masks: list[set] = []
os.register_at_fork(
    before=lambda: masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_SIGNALS)),
    after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop()),
    after_in_child=in_forked_child,
)


def begin_worker(number: int = 0) -> None:
    """In a loader's worker: leaves signals to the process that trains."""
    for signum in EXIT_SIGNALS:
        signal.signal(signum, lambda *_: None)
    # But multiprocessing's terminate() is waited for: the alarm ends it.
    signal.signal(SIGTERM, lambda *_: signal.alarm(10))
    # For the thread that hands tensors over: leaving may interrupt the parent in the middle of one.
    sys.excepthook = lambda *error: None


def end_children(children: Iterable) -> None:
    for child in children:
        child.kill()
        child.join()


# ---- Checkpoints ------------------------------------------------------------------------------

# What a save may fail with: disk, device (in torch's words), memory, what cannot be saved.
SAVE_ERRORS = (OSError, RuntimeError, MemoryError, TypeError)
PIECE_BYTES = 4 * 2**20
PLAIN_TYPES = {bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size}
# What the pickle of a tensor or a plain value refers to, dtypes aside: nothing that grows.
PLAIN_GLOBALS = re.compile(
    r"__builtin__\.(complex|set)|collections\.(Counter|OrderedDict)|torch\.(Size|device|\w+Storage)"
    r"|torch\._utils\._rebuild_(parameter(_with_state)?|tensor_v[23])|torch\.storage\.UntypedStorage"
)


class FileForDisk(io.FileIO):
    """A new file whose pieces are on their way to the disk while the next ones are written."""

    _advised = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            done += super().write(view[done : done + PIECE_BYTES]) or 0
            length = self.tell() - self._advised
            # The advice that they need not stay in memory halves the time of a large file's flush.
            if length >= PIECE_BYTES:
                with contextlib.suppress(AttributeError, OSError):
                    os.posix_fadvise(self.fileno(), self._advised, length, os.POSIX_FADV_DONTNEED)
                self._advised += length
        return done


def save_checkpoint(state: dict, path: Path | str) -> None:
    """Writes state, as torch.save does, so that path is, at every instant, old or whole.

    State is nested dicts, lists and tuples of dense tensors, arrays, numbers, texts and None;
    nothing may change it meanwhile. Raises UserError, with the place, for anything else in it;
    OSError, or what torch raises. Then the file that was at path before is untouched.
    """
    if not isinstance(state, dict):
        raise UserError(f"state is a {type(state).__qualname__}, not a dict")
    state = to_host(state)
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, f"{path} is a directory, pipe or device, no checkpoint")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of this save alone: others may write the same path at the same time.
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}.tmp")
    checksums_wanted = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(True)
        with io.BufferedWriter(FileForDisk(temporary, "x"), PIECE_BYTES) as file:
            torch.save(state, file)
        flush_to_disk(temporary)
        os.replace(temporary, path)
        # The names become as durable as the file; one folder may be new, or not to be opened.
        for folder in (path.parent, path.parent.parent):
            with contextlib.suppress(PermissionError):
                flush_to_disk(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # torch's zip writer stumbles over a write that has failed: that one is the reason.
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        torch.serialization.set_crc32_options(checksums_wanted)


def flush_to_disk(path: Path) -> None:
    """Calls fsync, where the file system knows how to."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(fd)


def to_host(state: dict, memory: dict[tuple, Tensor] | None = None) -> dict:
    """State with its tensors on the CPU; with memory all are copies there. Raises UserError."""
    copies: dict[tuple, Tensor] = {}
    kept = {} if memory is None else memory

    def on_host(value: Any) -> Any:
        leaf = savable(value)
        if not isinstance(leaf, Tensor) or memory is None and leaf.is_cpu:
            return leaf
        # Those that are the same share their copy.
        key: Any = leaf.data_ptr(), leaf.dtype, leaf.shape, leaf.stride(), leaf.is_conj()
        key += leaf.is_neg(), value is leaf or id(value)
        if key not in copies or not leaf.numel():
            place = len(copies), leaf.dtype, leaf.shape, hasattr(leaf, "was_array")
            if place not in kept:
                kept[place] = torch.empty_like(leaf, device="cpu", pin_memory=leaf.is_cuda)
                if hasattr(leaf, "was_array"):
                    kept[place] = of_array(kept[place])
            copies[key] = kept[place].copy_(leaf.detach())
        return copies[key]

    return mapped(state, on_host, {})


def savable(value: Any) -> Any:
    """A leaf as it is saved: numpy's number as Python's, an array as a tensor. Raises UserError."""
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) is np.ndarray:
        # Texts, objects and numbers of another machine's are no tensors.
        with contextlib.suppress(TypeError, ValueError):
            value = of_array(torch.from_numpy(value if value.flags.carray else value.copy()))
    kind = type(value)
    if kind is int and value.bit_length() > 2000:
        raise UserError(" cannot be saved: torch.load refuses integers of more than 2,000 bits")
    if kind in PLAIN_TYPES or kind is set and all(type(item) in PLAIN_TYPES for item in value):
        return value
    if kind in (Tensor, nn.Parameter) and value.layout == torch.strided:
        plain = vars(value).keys() <= {"was_array"}
        if plain and not (value.is_meta or value.is_nested or value.is_quantized):
            return value
    raise UserError(
        f" cannot be saved: it is a {kind.__module__}.{kind.__qualname__}; dense tensors, arrays of"
        " numbers, numbers, texts, None can, and dicts, lists, tuples of them (list(x), vars(x))"
    )


def mapped(state: Any, change: Callable[[Any], Any], done: dict) -> Any:
    """Changes the leaves of nested dicts, lists, tuples; a UserError gets the place before it."""
    kind = type(state)
    if kind not in (dict, collections.OrderedDict, collections.Counter, list, tuple):
        return change(state)
    # What a stranger's file holds again and again stays one thing.
    if id(state) in done:
        return done[id(state)]
    new = {}
    for key, item in state.items() if isinstance(state, dict) else enumerate(state):
        try:
            new[change(key)] = mapped(item, change, done)
        except UserError as error:
            raise UserError(f"[{key!r}]{error}") from None
    done[id(state)] = made = kind(new if isinstance(state, dict) else new.values())
    if hasattr(state, "_metadata"):
        # A module's: the versions of its parts.
        made._metadata = state._metadata
    return made


def load_checkpoint(path: Path | str, map_location: str = "cpu", mmap: bool = False) -> dict:
    """What is in a file of save_checkpoint or torch.save. Runs no code in it.

    Every record's checksum is verified first: torch.load alone misses a flipped bit. On the device
    "meta" tensors are not read; with mmap their memory is the file's. Raises CheckpointError.
    """
    try:
        # A pipe would be waited for.
        if os.path.exists(path) and not os.path.isfile(path):
            raise CheckpointError(f"{path}: a directory, pipe or device, not a checkpoint")
        check_records(path, tensors=map_location != "meta")
        state = torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"holds a {type(state).__name__}")
        return mapped(state, loaded, {})
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except Exception as error:
        # zipfile and torch have dozens of ways to stumble over damage; all mean the same here.
        text = f"{path}: damaged, or not a checkpoint ({one_line(error)})"
        raise CheckpointError(text) from error


def of_array(tensor: Tensor) -> Tensor:
    # A Parameter: what else is saved with an attribute needs more than PLAIN_GLOBALS.
    marked: Any = nn.Parameter(tensor, requires_grad=False)
    marked.was_array = True
    return marked


def loaded(value: Any) -> Any:
    if isinstance(value, Tensor) and hasattr(value, "was_array") and not value.is_meta:
        return value.numpy(force=True)
    return value


def check_records(path: Path | str, tensors: bool) -> None:
    """Raises CheckpointError for a wrong checksum, ValueError for what torch.save never writes.

    torch.load(weights_only=True) runs no code, but builds objects of any size: so what the pickle
    refers to is compared with what tensors and plain values need.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        # An attribute that calls a record a folder makes torch return memory that it never filled.
        if any(record.compress_type or record.external_attr for record in records):
            raise ValueError("its records are not torch.save's")

        def verify(record: zipfile.ZipInfo) -> Iterator[None]:
            try:
                with archive.open(record) as file:
                    yield
                    while file.read(PIECE_BYTES):
                        pass
            except zipfile.BadZipFile as error:
                name = record.filename.partition("/")[2]
                raise CheckpointError(f"{path}: damaged checkpoint (record {name})") from error

        opened = [verify(one) for one in records if tensors or "/data/" not in one.filename]
        # First all: before Python 3.12.9 and 3.13.2 opening one moves the others' readers.
        list(map(next, opened))
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
            list(threads.map(list, opened))
        pickles = (archive.read(one) for one in records if one.filename.endswith("/data.pkl"))
        for opcode, argument, _ in itertools.chain.from_iterable(map(pickletools.genops, pickles)):
            name = str(argument).replace(" ", ".")
            known = getattr(torch, name.removeprefix("torch."), None)
            plain = isinstance(known, torch.dtype) or PLAIN_GLOBALS.fullmatch(name)
            if opcode.name == "GLOBAL" and not plain:
                raise ValueError(f"it refers to {name}")


# ---- The checkpoint directory -----------------------------------------------------------------


def checkpoint_files(directory: Path | str) -> list[Path]:
    folder = Path(directory)
    return [*folder.glob("[!.]*.pt"), *folder.glob("emergency_exit/[!.]*.pt")]


def find_checkpoints(directory: Path | str, report: Callable) -> list[tuple[Path, dict]]:
    """The checkpoints in a directory, the one that `latest` prefers first; no tensor is read.

    It is the furthest of the run that has saved last (after its first step), or of its last start.
    """
    found: list[tuple] = []
    newest: dict[str, str] = {}
    for path in checkpoint_files(directory):
        try:
            state = load_checkpoint(path, map_location="meta")
            if state["format_version"] != Run.FORMAT_VERSION:
                raise ValueError
            run, step, saved_at = str(state["run_id"]), int(state["step"]), str(state["saved_at"])
            order = run, int(state["metrics"]["sessions"]), step, saved_at, path
        except CheckpointError as error:
            report(f"⚠️ Skipped {error}")
        except (LookupError, RuntimeError, TypeError, ValueError):
            report(f"⚠️ Skipped {path}: not a checkpoint of this program")
        else:
            found.append((order, path, state))
            newest[run] = max(newest.get(run, ""), saved_at if step else "")
    found.sort(key=lambda one: (newest[one[0][0]], *one[0]), reverse=True)
    return [(path, state) for _, path, state in found]


def latest_checkpoint(directory: Path | str, report: Callable[[str], None] = print) -> Path:
    """The first whole one of find_checkpoints(). Raises CheckpointError where there is none."""
    for path, _ in find_checkpoints(directory, report):
        try:
            load_checkpoint(path, mmap=True)
            return path
        except CheckpointError as error:
            report(f"⚠️ Skipped {error}")
    raise CheckpointError(f"{directory}: no checkpoint there")


class RunDirectory:
    """One run's hold on a checkpoint directory: its lock, and all that is saved there.

    metrics.csv (metrics_2.csv where that is another run's) has a row every --log-every batches;
    rows after `step` come again. Raises OSError, also where a run that is alive has it.
    """

    def __init__(self, path: Path, run_id: str, step: int, keep: int, say: Callable) -> None:
        self.path, self.run_id, self._keep, self._say = path, run_id, keep, say
        # What writes in a thread; its last task; the memory of what it writes.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._pending: Future | None = None
        self._memory: dict[tuple, Tensor] = {}
        path.mkdir(parents=True, exist_ok=True)
        self._lock_file = os.open(path / "run.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                words = os.pread(self._lock_file, 256, 0).decode(errors="replace").split()
                os.close(self._lock_file)
                holder = "(pid {} on {})".format(*(*words, "unknown", "unknown")[:2])
                text = f"in use by another run {holder}: stop it, or give this one another"
                raise OSError(errno.EBUSY, text) from None
            text = f"no locks there ({error.strerror}); see to it that no other run uses it"
            say(f"⚠️ {path}: {text}")
        self.write_outcome("")
        for leftover in (*path.glob(".*.tmp"), *path.glob("emergency_exit/.*.tmp")):
            with contextlib.suppress(OSError):
                leftover.unlink()
        # A save in its thread flushes the rows while the main thread adds one.
        self._rows_lock = threading.Lock()
        # Whether the file holds all rows but the last, in these columns.
        self._current = False
        self._metrics = self.path_for("metrics.csv")
        rows = self._read_rows()
        self._columns = list(next(iter(rows), ["run"]))
        self._rows = [row for row in rows if int(row["step"]) <= step]
        if rows:
            self._write_rows()

    def write_outcome(self, outcome: str) -> None:
        """Leaves pid and host of this run, and how it ended, in the lock file for stop.sh."""
        text = f"{os.getpid()} {os.uname().nodename}\n{outcome}".encode(errors="replace")
        # Before the cut, so that a reader always finds a pid.
        os.pwrite(self._lock_file, text, 0)
        os.ftruncate(self._lock_file, len(text))

    def path_for(self, name: str) -> Path:
        """Where to save under name: another run's file is never overwritten but evaded."""
        first = path = self.path / name
        numbers = itertools.count(2)
        while path.exists() and not self._is_own(path):
            path = first.with_name(f"{first.stem}_{next(numbers)}{first.suffix}")
        return path

    def _is_own(self, path: Path) -> bool:
        if not path.is_file():
            return False
        with contextlib.suppress(OSError), open(path, "rb") as file:
            return self.run_id.encode() in file.read(4096)
        return False

    def add_row(self, values: dict[str, Any]) -> None:
        """Adds a row. A value that comes late gets a column, empty in the rows before."""
        # An OSError: it comes with the next one.
        with self._rows_lock, contextlib.suppress(OSError):
            late = [name for name in values if name not in (*self._columns, "run")]
            self._current &= not late and self._metrics.exists()
            self._columns[-1:] = [*late, "run"]
            self._rows.append({**values, "run": self.run_id})
            self._write_rows()

    def _read_rows(self) -> list[dict]:
        if not self._metrics.is_file():
            return []
        try:
            # -sig: a spreadsheet leaves a mark at the beginning.
            text = self._metrics.read_text("utf-8-sig", "surrogateescape")
            # Python 3.10 would stumble over a NUL.
            rows = list(csv.DictReader(io.StringIO(text.replace("\0", ""), newline="")))
        except (OSError, csv.Error):
            return []
        mine = [row for row in rows if row.get("run") == self.run_id and None not in row]
        return [row for row in mine if re.fullmatch("[0-9]{1,18}", row.get("step") or "")]

    def _write_rows(self) -> None:
        anew, self._current = not self._current, False
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        if anew:
            writer.writeheader()
        writer.writerows(self._rows if anew else self._rows[-1:])
        path = self._metrics.with_name(f".{self._metrics.name}.tmp") if anew else self._metrics
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb" if anew else "ab") as file:
            file.write(text.getvalue().encode(errors="surrogateescape"))
        if anew:
            os.replace(path, self._metrics)
        self._current = True

    def save_meanwhile(self, state: dict, targets: dict[str, str], is_copy: bool) -> None:
        """Saves the state as it is now to every target {exit_reason: name}, in a thread."""
        self.wait()
        try:
            copy = to_host(state, None if is_copy else self._memory)
        except SAVE_ERRORS as error:
            self._memory = {}
            names = " and ".join(targets.values())
            self._say(f"⚠️ {names} not saved: {one_line(error)}. Training goes on.")
        else:
            self._pending = self._thread.submit(self._write, copy, targets)

    def _write(self, state: dict, targets: dict[str, str]) -> None:
        for reason, name in targets.items():
            try:
                path = self._save({**state, "exit_reason": reason}, name)
                if reason == "user_requested_save":
                    self._say(f"✅ Checkpoint saved: {path}")
            except SAVE_ERRORS as error:
                self._say(f"⚠️ {name} not saved: {one_line(error)}. Training goes on.")

    def wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def _save(self, state: dict, name: str, elsewhere: bool = False) -> Path:
        if elsewhere:
            path = Path(tempfile.gettempdir(), f"train_graceful_{self.run_id}_{Path(name).name}")
        else:
            with self._rows_lock:
                # No checkpoint is ahead of its rows.
                if self._rows and not self._current:
                    self._write_rows()
            if self._metrics.exists():
                flush_to_disk(self._metrics)
            path = self.path_for(name)
        save_checkpoint(state, path)
        for pattern in ("step_*.pt", "emergency_exit/emergency_step_*.pt"):
            with contextlib.suppress(OSError):
                files = sorted(self.path.glob(pattern), key=os.path.getmtime)
                older = [one for one in files if one != path and self._is_own(one)]
                for one in older[: max(0, len(older) + (path in files) - self._keep)]:
                    one.unlink()
        return path

    def save_last(self, state: dict, label: str) -> Path | None:
        name = f"emergency_exit/emergency_step_{state['step']}.pt"
        if state["exit_reason"] == "completed":
            name = "final.pt"
        hints = ["Trying the temporary directory...", "TMPDIR names another place."]
        if state["exit_reason"] == USER_REQUEST:
            hints = ["Training goes on: make room, then press 'q' + Enter again."]
        self.wait()
        for attempt, hint in enumerate(hints):
            try:
                return self._save(state, name, elsewhere=attempt > 0)
            except SAVE_ERRORS as error:
                self._say(f"❌ {label} not saved: {one_line(error)}. {hint}")
        return None

    def close(self) -> None:
        self._thread.shutdown()
        os.close(self._lock_file)


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


GENERATORS = random.Random, np.random.RandomState, np.random.Generator, torch.Generator


def found_in(kinds: tuple, *roots: object) -> list:
    """The objects of these kinds that roots consist of or refer to, near ones first."""
    data = str, Tensor, np.ndarray, type, types.ModuleType
    found, seen, left = [], dict[int, object](), collections.deque(roots)
    while left and len(seen) < 100_000:
        value = left.popleft()
        if id(value) in seen or isinstance(value, data):
            continue
        if isinstance(value, kinds):
            found.append(value)
        elif isinstance(value, types.FunctionType):
            left.extend(value.__closure__ or ())
        elif gc.is_tracked(value):
            left.extend(itertools.islice(gc.get_referents(value), 1000))
        seen[id(value)] = value
    return found


def is_indexed(data: Any) -> bool:
    """Whether it is a map-style dataset. Raises UserError for a plain loader of one."""
    plain = isinstance(data, DataLoader) and not hasattr(data, "state_dict")
    if plain and is_indexed(data.dataset):
        raise UserError("run.data: give it the dataset of your DataLoader, with collate=, sampler=")
    indexed = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return indexed and not isinstance(data, (IterableDataset, DataLoader))


def fingerprint(data: Any) -> Any:
    """What data.fingerprint() says, which samples a Subset has, and of what a dataset consists."""
    own = getattr(data, "fingerprint", lambda: None)()
    if isinstance(data, Tensor):
        content = data.contiguous().flatten().view(torch.uint8).numpy(force=True)
        return hashlib.blake2b(content.data, digest_size=16).hexdigest()
    if isinstance(data, Subset):
        indices = torch.as_tensor(np.asarray(data.indices, np.int64))
        return [own, fingerprint(indices), fingerprint(data.dataset)]
    return [own, *map(fingerprint, getattr(data, "datasets", ()))]


def shuffled(indices: np.ndarray, n: int, key: bytes) -> np.ndarray:
    """The images of indices under a permutation of range(n) that depends on key alone, unlisted.

    Four rounds of a Feistel network on pairs of numbers below a and b, a * b >= n, walked until it
    is back below n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002); they mix as
    SplitMix64 does (Steele, Lea and Flood, 2014).
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


@dataclasses.dataclass
class Batches(Dataset):
    """The batches of a run, of which this process has every world_size-th sample.

    Item ("training", step) is a function of seed and step alone: nothing has to be replayed to go
    on. An item is (the collated samples, how many of them count).
    """

    training: Any
    validation: Any
    collate: Callable[[list], Any]
    batch_size: int
    seed: int
    validated: int
    rank: int
    world_size: int
    sampler: Any = None

    def __post_init__(self) -> None:
        self.per_evaluation = -(-self.validated // self.batch_size)
        self.generators = found_in(GENERATORS, *vars(self).values())
        self._epoch, self._order = -1, list[list[int]]()
        # A stream has no epochs of a known length.
        self.per_epoch: Any = len(self.training) // self.batch_size or math.inf
        if self.sampler is not None:
            self.per_epoch = 0
            self._begin_epoch(0)
            self.per_epoch = len(self._order)

    def __getitem__(self, key: tuple[str, int]) -> tuple[Any, int]:
        split, number = key
        if split == "training":
            data, (epoch, number) = self.training, divmod(number, self.per_epoch)
            self._begin_epoch(epoch)
            if self.sampler is not None:
                indices = self._order[number][self.rank :: self.world_size]
            else:
                places = self._places(number, len(data))
                indices = shuffled(places, len(data), b"%d %d" % (self.seed, epoch)).tolist()
        else:
            data, epoch = self.validation, -1
            # Evenly spread. A rank without a sample of its own computes one all the same.
            indices = (self._places(number, self.validated) * len(data) // self.validated).tolist()
        samples = []
        for index in indices or [0]:
            seed_generators(self.seed, epoch, index, own=self.generators)
            samples.append(data[index])
        try:
            return self.collate(samples), len(indices)
        except (RuntimeError, TypeError, ValueError) as error:
            if self.collate is not default_collate:
                raise
            raise UserError(f"run.data(collate=...) is needed: {one_line(error)}") from error

    def _begin_epoch(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        seed_generators(self.seed, "epoch", epoch, own=self.generators)
        getattr(self.training, "set_epoch", lambda epoch: None)(epoch)
        if self.sampler is not None:
            order = list(self.sampler(epoch) if callable(self.sampler) else self.sampler)
            if order and not np.ndim(order[0]):
                whole_batches = range(0, len(order) + 1 - self.batch_size, self.batch_size)
                order = [order[first : first + self.batch_size] for first in whole_batches]
            if not order or self.per_epoch not in (0, len(order)):
                text = f"epoch {epoch} has {len(order)} batches, not {self.per_epoch}"
                raise UserError(f"run.data(sampler=...): {text}")
            self._order = [[int(index) for index in batch] for batch in order]
            if any(not batch or len(batch) % self.world_size for batch in self._order):
                text = f"a batch is empty, or no multiple of {self.world_size} processes"
                raise UserError(f"run.data(sampler=...): {text}")
        self._epoch = epoch

    def _places(self, number: int, end: int) -> np.ndarray:
        first = number * self.batch_size
        return np.arange(first + self.rank, min(first + self.batch_size, end), self.world_size)


def started_loader(batches: Batches, keys: Iterator, workers: int, pin: bool) -> tuple:
    """The items of batches with these keys, and the workers, which start once for a whole run."""
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=keys,  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=pin,
        collate_fn=tuple,
        worker_init_fn=begin_worker,
    )
    others, on_child = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
    if workers:
        # Made here, it is the workers' too, and is removed however they end.
        multiprocessing.util.get_temp_dir()
    items = iter(loader)
    # torch's handler raises wherever the main thread is when a worker dies, in the middle of an
    # optimizer step too; without it the loader says so at the next batch.
    signal.signal(signal.SIGCHLD, on_child)
    return items, [one for one in multiprocessing.active_children() if one not in others]


# ---- The run ----------------------------------------------------------------------------------


@contextlib.contextmanager
def fitting(path: Path | None, name: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{path} does not fit {name} ({one_line(error)})") from error


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    return itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)


def load_optimizer(optimizer: Optimizer, saved: dict) -> None:
    """Its load_state_dict, but types and groups stay what they were."""
    groups, parameters = optimizer.param_groups, dict(enumerate(parameters_of(optimizer)))
    state = own_part(saved, {"state": parameters})
    optimizer.load_state_dict(state)
    # PyTorch gives the state the types of the weights.
    for number, one in parameters.items():
        for key, value in state.get("state", {}).get(number, {}).items():
            now = optimizer.state[one].get(key)
            if isinstance(value, Tensor) and getattr(now, "dtype", value.dtype) != value.dtype:
                optimizer.state[one][key] = value.to(now.device)
    # An optimizer in another, and a scheduler, may share groups.
    for group, restored in zip(groups, optimizer.param_groups):
        group.update(restored)
    optimizer.param_groups = groups


class RunState:
    """What a run consists of, its models and the objects that it keeps, and their states."""

    def __init__(self, processes: Processes, resumed: tuple, weights: tuple) -> None:
        self.processes = processes
        self.resumed, self._saved = resumed
        # Or what a new run has its first weights from.
        self._origin = resumed if self.resumed else weights
        self.step = operator.index(self._saved.get("step", 0))
        self.trains = False
        # What has to be done in the end, whatever it is.
        self.undo = contextlib.ExitStack()
        # {name: bare module}, {kind of state: {name: object}}.
        self._models: dict[str, nn.Module] = {}
        self._schedulers: dict[str, Any] = {}
        self._others: dict[str, Any] = {}
        self._optimizers: dict[str, Optimizer] = {}
        self._kept = {
            "scheduler_state_dicts": self._schedulers,
            "state_dicts": self._others,
            "optimizer_state_dicts": self._optimizers,
        }
        # Kept optimizers that have others in them.
        self._outer: set[str] = set()
        # The parameters of all models, with their names; those that this batch has updated.
        self._names: dict[Tensor, str] = {}
        self._updated: dict[Tensor, Any] = {}
        self._wrapped: list[nn.Module] = []
        self._not_reduced: list[Tensor] = []
        self._other_flags = False
        self._first_seen = weakref.WeakKeyDictionary[Optimizer, int]()

    def model(self, module: nn.Module, name: str = "model") -> nn.Module:
        """Moves a module to the device, wraps and compiles it, and restores its weights on resume.

        Returns what the loop calls. Optimizers are made after this. Raises UserError.
        """
        if self.trains or name in self._models:
            raise UserError(f"run.model({name}): before the loop, and each with a name of its own")
        module, wrapped = self.processes.wrap(module)
        path, saved = self._origin
        if path is not None:
            with fitting(path, name):
                saved = {**saved["state_dicts"], "model": saved["model_state_dict"]}
                module.load_state_dict(own_part(saved[name], module.state_dict()))
        self._models[name] = module
        if wrapped is not module:
            self._wrapped.append(wrapped)
            self._not_reduced += [one for one in module.parameters() if not one.requires_grad]
        return wrapped

    @property
    def module(self) -> nn.Module:
        """The bare model, without what makes it one of many processes."""
        return next(iter(self._models.values()))

    def keep(self, **objects: Any) -> Any:
        """Saves objects with state_dict and load_state_dict, or dicts of them; returns them.

        They are restored when the loop begins.
        """
        for label, value in objects.items():
            for name, part in (value if isinstance(value, dict) else {label: value}).items():
                kept = self._others
                if isinstance(part, (LRScheduler, ReduceLROnPlateau)):
                    kept = self._schedulers
                if isinstance(part, Optimizer):
                    kept = self._optimizers
                inside = map(type, getattr(part, "modules", list)())
                wrapped = nn.parallel.DistributedDataParallel in inside
                problems = {
                    "before the loop": self.trains,
                    "it has no load_state_dict": not hasattr(part, "load_state_dict"),
                    f"the name {name} is taken": name in (*kept, *self._models),
                    "make it of run.module, which fits any number of processes": wrapped,
                }
                for problem in (text for text, is_so in problems.items() if is_so):
                    raise UserError(f"run.keep({label}=...): {problem}")
                kept[name] = part
        values = tuple(objects.values())
        return values[0] if len(values) == 1 else values

    @property
    def _scalers(self) -> dict[str, torch.amp.GradScaler]:
        return {k: one for k, one in self._others.items() if isinstance(one, torch.amp.GradScaler)}

    def _begin_state(self) -> None:
        """Restores what is kept, and watches from here on who updates which parameters."""
        for name, module in self._models.items():
            self._names |= {one: f"{name}.{key}" for key, one in module.named_parameters()}
        modules = {name: x for name, x in self._others.items() if isinstance(x, nn.Module)}
        self._roots = {**self._models, **modules}
        # An object of another kind may save those that it has.
        self._held = found_in((Optimizer, LRScheduler, ReduceLROnPlateau), *self._others.values())
        optimizers = list(self._optimizers.items())
        for name, optimizer in optimizers:
            if not self._names.keys() >= set(parameters_of(optimizer)):
                raise UserError(
                    f"run.keep({name}=...): the optimizer has parameters that no run.model(...)"
                    " has. Call run.model first, and give the optimizer its parameters"
                )
            scheduled = hasattr(optimizer.step, "_wrapped_by_lr_sched")
            if scheduled and not self._schedulers and not self._held:
                raise UserError(f"{name} has a scheduler that is not kept: run.keep(scheduler=...)")
            for key, value in (vars(optimizer) | {"state": None}).items():
                for one in (one for one in tree_leaves(value) if isinstance(one, Optimizer)):
                    self._outer.add(name)
                    if one not in self._optimizers.values():
                        inner = f"{name}.{key}.{len(self._optimizers)}"
                        self._optimizers[inner] = one
                        optimizers.append((inner, one))
        self._first_buffers = {key: one.clone() for key, one in self._other_buffers().items()}
        if self.resumed is not None:
            with fitting(self.resumed, "this run"):
                self._restore()
        self._saved = {}
        self._origin = self._origin[0], {}
        self.undo.callback(register_optimizer_step_pre_hook(self._before_step).remove)

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        for name, module in self._models.items():
            for key, one in module.named_modules():
                yield f"{name}.{key}".removesuffix("."), one

    def _other_buffers(self) -> dict[tuple[str, str], Tensor]:
        return {
            (name, key): buffer.detach()
            for name, module in self._roots.items()
            for saved in [module.state_dict()]
            for key, buffer in module.named_buffers()
            if key not in saved
        }

    def _before_step(self, optimizer: Optimizer, *arguments: object) -> None:
        parameters = self._names.keys() & parameters_of(optimizer)
        for one in parameters:
            grad: Any = one.grad
            self._updated[one] = grad is not None and (weakref.ref(grad), grad._version)
        # One that lives for a batch leaves nothing to keep; another object may save one.
        lasts = self._first_seen.setdefault(optimizer, self.step) != self.step
        kept = optimizer in self._optimizers.values()
        if not kept and optimizer not in self._held and (parameters or lasts):
            hint = "run.keep(name=...), and run.model(...) for its module"
            raise UserError(f"{type(optimizer).__name__} steps in the loop but is not kept: {hint}")
        if kept and len(parameters) < sum(1 for _ in parameters_of(optimizer)):
            raise UserError("a kept optimizer has parameters that no run.model(...) had at first")
        if any(one.requires_grad for one in self._not_reduced):
            raise UserError("frozen before run.model(...) it stays so on many ranks: freeze after")

    def _restore(self) -> None:
        """Restores what is kept, the optimizers last: a scheduler's constructor changes them."""
        parameters = {name: parameter for parameter, name in self._names.items()}
        for kind, parts in self._kept.items():
            saved = self._saved[kind]
            models = self._models.keys() - {"model"} if kind == "state_dicts" else set()
            for name in sorted((parts.keys() | models) ^ saved.keys(), key=str):
                where = "in the checkpoint, but not kept by this run"
                if name not in saved:
                    where = "kept by this run, but not in the checkpoint"
                text = f"{self.resumed} does not fit this run: {name} is {where}; {NEW_RUN}"
                raise CheckpointError(text)
            for name, part in parts.items():
                with fitting(self.resumed, name):
                    if isinstance(part, Optimizer):
                        groups = zip(saved[name]["param_groups"], saved[name]["param_names"])
                        for added, names in list(groups)[len(part.param_groups) :]:
                            added = {**added, "params": [parameters[one] for one in names]}
                            part.add_param_group(added)
                    own = self._state_of(part)
                    # PyTorch takes the state of any scheduler, and optimizer of as many parameters.
                    for key in ("class", "total_steps", "param_names"):
                        here, there = own.get(key), saved[name].get(key)
                        if here != there:
                            raise ValueError(f"{key}: {there!s:.99} there, {here!s:.99} here")
                    saved[name].pop("class", None)
                    if isinstance(part, Optimizer):
                        load_optimizer(part, saved[name])
                    else:
                        part.load_state_dict(own_part(saved[name], own))
        with fitting(self.resumed, "what the loop has changed"):
            self._restore_loop(self._saved["loop"])

    def _restore_loop(self, saved: dict) -> None:
        for name, buffers in saved["buffers"].items():
            for key, value in buffers.items():
                path, _, last = key.rpartition(".")
                owner = self._roots[name].get_submodule(path)
                own: Any = getattr(owner, last, None)
                if value is not None:
                    value = value.to(self.processes.device, copy=True)
                    if getattr(own, "shape", None) == value.shape and own.dtype == value.dtype:
                        own.copy_(value)
                        continue
                owner.register_buffer(last, value, persistent=False)
        for name, module in self._modules():
            module.training = name not in saved["eval"]
        frozen = set(saved["frozen"])
        for one, name in self._names.items():
            self._other_flags |= one.requires_grad == (name in frozen)
            one.requires_grad_(name not in frozen)
            if name in saved["gradients"]:
                old = saved["gradients"][name]
                grad: Any = torch.zeros_like(one) if old is None else own_part(old, one)
                one.grad = grad = grad.to(one.device)
                self._updated[one] = old is None and (weakref.ref(grad), grad._version)

    def _mark_boundary(self) -> None:
        """Remembers what an exception in a batch has to put back, and gradients that wait."""
        buffers = [buffer for module in self._models.values() for buffer in module.buffers()]
        # All of them: BatchNorm changes its own without a new version.
        self._before: list[tuple] = [(one.detach().copy_, one.clone()) for one in buffers]
        for part in (*self._schedulers.values(), *self._scalers.values()):
            self._before.append((part.load_state_dict, dict(part.state_dict())))
        self._gradients: dict[str, Tensor | None] = {}
        for parameter, name in self._names.items():
            grad: Any = parameter.grad
            known = self._updated.get(parameter)
            used = known and grad is not None and known[0]() is grad and known[1] == grad._version
            if grad is not None and not used:
                self._gradients[name] = grad.clone()
            elif used and not grad.is_sparse:
                # A step has used it. The loop may zero it, and step with zeros in the next batch.
                self._gradients[name] = None
        self._updated.clear()
        self._kept_as = self._marks()

    def rates(self) -> dict[str, float]:
        return {
            f"lr_{name}.{number}".removesuffix(".0"): float(group["lr"])
            for name, optimizer in self._optimizers.items()
            for number, group in enumerate(optimizer.param_groups)
        }

    def _marks(self) -> tuple:
        """What of the state cannot be put back after a batch has changed it."""
        parameters = [(one._version, one.requires_grad) for one in self._names]
        buffers = [id(buffer) for one in self._models.values() for buffer in one.buffers()]
        # Groups that were added show there, too.
        return parameters, buffers, self.rates()

    def _states(self) -> dict:
        kept = {
            kind: {name: self._state_of(part) for name, part in parts.items()}
            for kind, parts in self._kept.items()
        }
        models = {name: module.state_dict() for name, module in self._models.items()}
        model = models.pop("model", {})
        kept["state_dicts"] |= models
        now = self._other_buffers()
        buffers: dict[str, dict[str, Tensor | None]] = {}
        for name, key in {**self._first_buffers, **now}:
            one, first = now.get((name, key)), self._first_buffers.get((name, key))
            if one is None or first is None or one.dtype != first.dtype or not one.equal(first):
                buffers.setdefault(name, {})[key] = one
        loop = {
            "gradients": self._gradients,
            "buffers": buffers,
            "frozen": [name for one, name in self._names.items() if not one.requires_grad],
            "eval": [name for name, one in self._modules() if not one.training],
        }
        return {"model_state_dict": model, **kept, "loop": loop}

    def _state_of(self, part: Any) -> dict:
        if not isinstance(part, (Optimizer, LRScheduler, ReduceLROnPlateau)):
            return part.state_dict()
        state = {**part.state_dict(), "class": type(part).__qualname__}
        # SWALR's held a function before PyTorch 2.10.
        state.pop("anneal_func", None)
        if isinstance(part, Optimizer):
            groups = [group["params"] for group in part.param_groups]
            state["param_names"] = [[self._names[one] for one in group] for group in groups]
        return state


class Run(RunState):
    """One training run, and what happens between two batches; main() hands it to train(run).

    In this order: data(), model(), keep(), then one loop over batches(), in which log(),
    clip_gradients() and autocast() are for the body. `options` is what the command line says;
    `step` counts complete batches; `best`, found at `best_step`, is None before an evaluation.
    """

    FORMAT_VERSION = 3

    def __init__(self, options: Any, processes: Processes, screen: Screen, *origin: tuple) -> None:
        super().__init__(processes, *origin)
        saved = self._saved
        self.options = options
        self.screen = screen
        self.monitor = processes.monitor
        self.device = processes.device
        self.rank = processes.rank
        self.world_size = processes.world_size
        self.run_id: str = saved.get("run_id") or uuid.uuid4().hex[:12]
        best = saved.get("best", {"value": None, "step": 0, "of": None})
        self.best: float | None = best["value"]
        self.best_step: int = best["step"]
        self._best_of: str | None = best["of"]
        self._evaluation: dict = saved.get("evaluation", {"values": {}, "step": -1})
        # `sums` and `counts` are since the last row; what was due up to `done_step` is done.
        start: Any = {"sums": {}, "counts": {}, "smooth_loss": None, "seconds": 0.0}
        self._metrics: dict = saved.get("metrics", {**start, "sessions": 0, "done_step": 0})
        self._logged: dict[str, tuple[float, int]] = {}
        self._config: dict = saved.get("config", {})
        self._made_by = f"{torch.get_num_threads()} threads, {self.world_size} processes"
        before = str(saved.get("made_by", self._made_by))
        self._made_otherwise = [f"{self._made_by} (was {before})"] * (before != self._made_by)
        self.completed = saved.get("exit_reason") == "completed"
        self.exit_code = 0
        # The file that was saved or named last, and what it is called.
        self.saved: Path | None = None
        self._label = "Checkpoint"
        # If set, called on rank 0 with each row of metrics.csv, {column: value}.
        self.on_row: Callable[[dict[str, Any]], object] | None = None
        # A batch is complete; all is saved, on leaving; the loop's body, or evaluate, is at work.
        self.trained = self.has_left = self._in_body = False
        self._batches: Any = None
        # In the place of training data: what yields batches, None for the number of the step.
        self._streams = False
        self._source: Any = None
        self._stream_epoch = 0
        self._fingerprint: dict[str, list] = {}
        # What is yielded, by a stream or by the loader, and the loader's workers.
        self._items: dict[bool, Iterator] = {}
        self._workers: list = []
        self.undo.callback(self._close_loader)
        self._seed("start")

    def _seed(self, *what: object) -> None:
        seed_generators(self.options.seed, *what, device=self.device.type)

    def data(
        self,
        training: Any,
        validation: Any = None,
        collate: Callable | None = None,
        batch_size: int | None = None,
        sampler: Any = None,
        **others: object,
    ) -> None:
        """Sets the datasets: lists, tensors, or map-style torch Datasets with a length.

        collate(samples) makes a batch, batch_size is that of all processes. sampler(epoch), called
        where samples are loaded as set_epoch(epoch) is, returns the indices of an epoch, or lists
        of them, its batches. Training data may be an iterable that yields batches (and goes on if
        it has state_dict and load_state_dict), or None. Raises UserError, also for other data.
        """
        for name in others:
            raise UserError(f"run.data({name}=...): it has collate=, batch_size=, sampler=")
        size = batch_size or self.options.batch_size
        if size % self.world_size:
            raise UserError(f"--batch-size {size} is no multiple of {self.world_size} processes")
        if not is_indexed(training):
            if training is not None and not hasattr(training, "__iter__"):
                raise UserError(f"run.data: {type(training).__name__} is no dataset or stream")
            self._streams = True
            self._source = training
            training = []
        if sampler is not None and (self._streams or hasattr(sampler, "num_replicas")):
            raise UserError("run.data(sampler=...): not of a stream, nor one that deals to ranks")
        fewest = 0 if self._streams or sampler is not None else size
        validation, least = ([], 0) if validation is None else (validation, 1)
        for split, data, count in ("training", training, fewest), ("validation", validation, least):
            if not is_indexed(data):
                text = f"{type(data).__name__} has no __getitem__(index) and __len__()"
                raise UserError(f"run.data: validation data is map-style, but {text}")
            if len(data) < count:
                raise UserError(f"run.data: {len(data)} {split} samples, where {count} are needed")
            self._fingerprint[split] = [len(data), fingerprint(data)]
        if self._fingerprint != (there := self._saved.get("data_fingerprint", self._fingerprint)):
            text = f"the data is not what the run of {self.resumed} was trained on"
            raise CheckpointError(f"{text} ({there} then, {self._fingerprint} now); {NEW_RUN}")
        most = self.options.eval_batches or len(validation)
        how = collate or default_collate, size, self.options.seed, min(len(validation), most * size)
        self._batches = Batches(training, validation, *how, self.rank, self.world_size, sampler)

    @property
    def total_steps(self) -> int:
        """Batches in the whole run: --steps, or --epochs if that comes earlier."""
        if self._batches is None:
            raise UserError("call run.data(training, validation) first")
        steps, epochs = self.options.steps or math.inf, self.options.epochs or math.inf
        total = min(steps, epochs * self._batches.per_epoch)
        if total == math.inf:
            raise UserError("how long? Give --steps (or --epochs, but not of a stream)")
        return int(total)

    @property
    def epoch(self) -> int:
        return self._stream_epoch if self._streams else self.step // self._batches.per_epoch

    @property
    def evaluation(self) -> dict[str, float] | None:
        """{name: mean} in the body of the first batch after an evaluation, else None."""
        return dict(self._evaluation["values"]) if self._evaluation["step"] == self.step else None

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context that --dtype asks for, for the body and for evaluate."""
        wanted = self.options.dtype
        bfloat16 = wanted == "bfloat16" or wanted == "auto" and self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16)

    def clip_gradients(self, max_norm: float, parameters: Any = None) -> Tensor:
        """Scales the gradient to a norm of at most max_norm; returns the norm that it had.

        Raises FloatingPointError where it is not finite (a kept GradScaler skips that step itself).
        """
        if parameters is None:
            parameters = self._names
        norm = whole(nn.utils.clip_grad_norm_(list(dict.fromkeys(parameters)), max_norm))
        if not norm.isfinite() and not any(one.is_enabled() for one in self._scalers.values()):
            text = "the gradient is NaN or infinite; nothing was updated. A resumed run comes to it"
            raise FloatingPointError(f"{text} again; {NEW_RUN}, at a smaller learning rate")
        return norm

    def log(self, **values: float | Tensor) -> None:
        """Numbers whose means since the last row become columns of metrics.csv; `loss` is shown.

        A loss that is not finite ends the run when the batch is complete, and is not saved.
        """
        for name, value in values.items():
            if name in ("step", "epoch", "seconds", "samples_per_second", "run"):
                raise UserError(f"run.log({name}=...): metrics.csv has a column of that name")
            total, count = self._logged.get(name, (0.0, 0))
            self._logged[name] = total + float(torch.as_tensor(value).detach()), count + 1

    def batches(
        self, evaluate: Any = None, best: str = "min loss", summarize: Callable | None = None
    ) -> Iterator:
        """Yields batches on the device. Coming back for the next one completes the one before.

        evaluate(batch) returns {name: a value for each sample}; summarize({name: those of all
        samples, in order}) {name: number}, for what is no mean. best names one, and min or max. A
        request to leave is honoured between batches: all is saved, and SystemExit raised.
        """
        if self._batches is None:
            self.data(None)
        other = self.best is not None and best != self._best_of
        problems = {
            f'best="{best}": write "min NAME" or "max NAME"': not re.match("(min|max) .", best),
            "one loop goes through all epochs, and is all that a run has": self.trains,
            "call run.model(module) before the loop": not self._models,
            "there is no validation data": evaluate and not self._batches.validated,
            "--eval-every epoch: there are none": self.options.eval_every == "epoch"
            and self._streams,
            f'"{best}" does not fit the checkpoint, whose run has "{self._best_of}"': other,
        }
        for problem in (text for text, is_so in problems.items() if is_so):
            raise UserError(f"run.batches: {problem}")
        self._evaluate = evaluate
        self._summarize: Any = summarize
        self._best_of = best
        self._best_name = best.partition(" ")[2]
        return self._loop()

    def _loop(self) -> Iterator:
        self._begin()
        if self.completed:
            self.saved = self.resumed
            self.screen.say(f"✅ Nothing left to do: step {self.step} of {self.total_steps}.")
            return
        while True:
            try:
                if self._metrics["done_step"] < self.step:
                    self._at_boundary()
                if self.monitor.exit_requested:
                    raise Interrupted
                if self.step >= self.total_steps:
                    break
                batch, count = self._fetched("training")
                self._samples += count * self.world_size
            except Interrupted:
                self._close_loader()
                self._leave()
                continue
            self._seed("step", self.step, self.rank)
            self._in_body = True
            yield batch
            self._complete()
        self._save_last("completed")
        self.monitor.nothing_to_save = "Everything is saved already."

    def _begin(self) -> None:
        nowhere = [{"epoch": 0, "state": None}] * self.world_size
        self._places: list[dict] = self._saved.get("stream", nowhere)
        with fitting(self.resumed, "its stream"):
            if len(self._places) != self.world_size and self._streams:
                raise UserError(f"{self.resumed}: a stream of {len(self._places)} ranks; {NEW_RUN}")
            self._stream_epoch = self._places[0]["epoch"]
        self._begin_state()
        # What a loop has left by break it goes on with: the body decides again.
        self.completed &= self.step == self.total_steps
        self.completed |= self.step > self.total_steps
        if self.completed:
            return
        self.processes.first(self._open_directory)
        self._mark_boundary()
        self._start = self._row_time = self._batch_time = time.monotonic()
        self._first_step = self.step
        self._samples = self._row_samples = 0
        self._metrics["sessions"] += 1
        self.monitor.describe = self._describe
        self.monitor.nothing_to_save = None
        self._introduce()
        self.trains = True
        self.processes.exchange({})
        if self.processes.many and sys.version_info < (3, 11):
            # Meanwhile gloo's threads give back what they had of that: a worker that is forked
            # while they do may hang, there.
            dist.barrier()

    def _open_directory(self) -> None:
        path, how = Path(self.options.checkpoint_dir), (self.options.keep, self.screen.say)
        try:
            self.directory = RunDirectory(path, self.run_id, self._metrics["done_step"], *how)
        except OSError as error:
            raise UserError(f"--checkpoint-dir {path}: {error.strerror}") from error
        # Of a process that ends the lock goes with it, and not before.
        if self.monitor.is_guest:
            self.undo.callback(self.directory.close)

    def _introduce(self) -> None:
        batches, say = self._batches, self.screen.say
        kinds = (type(module).__name__.removeprefix("FSDP") for module in self._models.values())
        count = sum(map(Tensor.numel, self._names))
        where = f"{self.world_size} x {self.device}".removeprefix("1 x ")
        size = f" of {batches.batch_size}" * (batches.sampler is None)
        data = f"{len(batches.training):,} samples, {batches.per_epoch:,} batches{size} an epoch"
        if self._streams:
            data = "no data" if self._source is None else "a stream"
        say(
            f"🧠 {' and '.join(kinds)}, {count:,} parameters, on {where}: {data};"
            f" saves in {self.options.checkpoint_dir}"
        )
        for name, one in self._others.items():
            if isinstance(one, nn.Module) and not (one.state_dict() or list(one.buffers())):
                say(f"⚠️ run.keep({name}=...): its state is empty (a metric: persistent(True)).")
        if self._source is not None and not self._has_state():
            say("⚠️ The stream has no state_dict and load_state_dict: resumed it begins anew.")
        if self.resumed is not None:
            say(f"📂 Resumed at step {self.step} of {self.total_steps} from {self.resumed}")
            then, now = self._config, vars(self.options)
            names = [one for one in then if then[one] != now[one] and one != "checkpoint_dir"]
            changed = [f"{flag(one)} {now[one]} (was {then[one]})" for one in names]
            changed += self._made_otherwise
            changed += ["requires_grad in the script (it stays as saved)"] * self._other_flags
            if changed:
                own = {*names} - (COMMON_OPTIONS.keys() - {"steps", "epochs"})
                text = " Learning rates and schedules that are kept go on as saved." * bool(own)
                say(f"⚙️ Changed: {', '.join(changed)}.{text}")
        elif self._origin[0] is not None:
            say(f"📂 A new run, with the weights of {self._origin[0]}")
        how = "Press 'q' + Enter" if self.monitor.keyboard else "Interrupt it or send SIGTERM"
        say(f"🔄 Training started. {how} to exit gracefully...")

    def _keys(self) -> Iterator[tuple[str, int]]:
        done = self._metrics["done_step"]
        for step in range(self.step, self.total_steps + 1):
            if step > done and self._evaluates(step, done):
                for number in range(self._batches.per_evaluation):
                    yield "validation", number
            done = step
            if step < self.total_steps and not self._streams:
                yield "training", step

    def _evaluates(self, step: int, done: int) -> bool:
        every = self.options.eval_every
        if every == "epoch":
            every = self._batches.per_epoch
        due = step >= self.total_steps or step // every > done // every
        return due and self._evaluate is not None

    def _fetched(self, split: str) -> tuple[Any, int]:
        """The next batch, on the device, and how many samples of it count. Raises Interrupted."""
        streams = split == "training" and self._streams
        if streams and self._source is None:
            return self.step, 1
        if streams not in self._items and streams:
            self._items[streams] = self._stream(**self._places[self.rank])
        elif streams not in self._items:
            plan = self._batches, self._keys(), self.options.workers
            self._items[streams], self._workers = started_loader(*plan, self.device.type == "cuda")
        # Of several processes the others are in a collective: there a request waits for the loader.
        alone = self.world_size == 1
        try:
            with self.monitor.interruptible() if alone else contextlib.nullcontext():
                batch, count = next(self._items[streams])
        except UserError as error:
            # A worker's arrives with a traceback in it.
            raise UserError(str(error).strip().rpartition("UserError: ")[2]) from None
        to = {"device": self.device, "non_blocking": True}
        return tree_map(lambda x: x.to(**to) if hasattr(x, "to") else x, batch), count

    def _close_loader(self) -> None:
        end_children(self._workers)
        self._items, self._workers = {}, []

    def _has_state(self) -> bool:
        return hasattr(self._source, "state_dict") and hasattr(self._source, "load_state_dict")

    def _stream(self, epoch: int, state: Any) -> Iterator[tuple[Any, int]]:
        """What an iterable yields, and its number of samples; exhausted, it begins again."""
        source = self._source
        while True:
            what = "stream", self.rank, "epoch", epoch
            seed_generators(self.options.seed, *what, own=found_in(GENERATORS, source))
            for one in (source, getattr(source, "dataset", None)):
                getattr(one, "set_epoch", lambda epoch: None)(epoch)
            if state:
                source.load_state_dict(state)
            on_child = signal.getsignal(signal.SIGCHLD)
            items = iter(source)
            signal.signal(signal.SIGCHLD, on_child)
            begun = self.step
            self._seed("stream", self.rank, self.step)
            for batch in items:
                self._stream_epoch = epoch
                sizes = (len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.dim())
                yield batch, next(sizes, 1)
                self._seed("stream", self.rank, self.step)
            if not state and begun == self.step:
                raise UserError(f"run.data: {type(source).__name__} yields no batches")
            epoch, state = epoch + 1, None

    def _complete(self) -> None:
        """Counts the batch that the body has had, and adds what all ranks have logged in it."""
        logged, failure = self._logged, None
        try:
            logged = self.processes.exchange(logged)
        except RuntimeError as error:
            # Another rank has died; this one's part of the batch is complete.
            failure = error
        if not math.isfinite(logged.get("loss", (0.0, 0))[0]):
            raise FloatingPointError("the loss is NaN or infinite; nothing of it is saved")
        if self._streams:
            # An error too, then: where its stream was nobody knows any more.
            state = self._has_state() and copy.deepcopy(self._source.state_dict())
            self._places = self.processes.gather({"epoch": self._stream_epoch, "state": state})
        metrics, now = self._metrics, time.monotonic()
        for name, (total, count) in logged.items():
            metrics["sums"][name] = metrics["sums"].get(name, 0.0) + total
            metrics["counts"][name] = metrics["counts"].get(name, 0) + count
            if name == "loss":
                smooth = metrics["smooth_loss"]
                mean = total / count
                metrics["smooth_loss"] = mean if smooth is None else 0.9 * smooth + 0.1 * mean
        metrics["seconds"] += now - self._batch_time
        self._batch_time = now
        self._logged = {}
        self._in_body = False
        self.step += 1
        self._mark_boundary()
        if failure is not None:
            raise failure
        if not self.trained:
            # What cannot be saved is said now.
            self.state_dict("")
            self.trained = True

    def _at_boundary(self) -> None:
        """Evaluates, logs and saves what is due. What a request cuts short is done on resume."""
        o = self.options
        last = self.step >= self.total_steps
        targets = {}

        def due(every: int) -> bool:
            return self.step // every > self._metrics["done_step"] // every

        evaluates = self._evaluates(self.step, self._metrics["done_step"])
        if evaluates:
            self._evaluated()
            if self.best_step == self.step:
                targets["best"] = "best.pt"
        logs = evaluates or last or due(o.log_every)
        if logs:
            self._row()
        if self.processes.save_requested or due(o.save_every):
            reason = "user_requested_save" if self.processes.save_requested else "periodic"
            self.processes.save_requested = False
            targets[reason] = f"step_{self.step}.pt"
        self._metrics["done_step"] = self.step
        if targets:
            state = self.state_dict("")
            if self.rank == 0:
                self.directory.save_meanwhile(state, targets, self.processes.sharded)
        if self.screen.is_terminal:
            self.screen.status(self._status)
        elif logs:
            self.screen.say(self._status())

    @torch.no_grad()
    def _evaluated(self) -> None:
        """Finds the mean of each value over all samples, in eval mode. Raises Interrupted."""
        parts: dict[str, list[Tensor]] = {}
        with self._eval_mode():
            for number in range(self._batches.per_evaluation):
                if self.monitor.exit_requested:
                    raise Interrupted
                batch, counted = self._fetched("validation")
                self._seed("evaluation", number)
                for name, values in self._values(batch, counted).items():
                    parts.setdefault(name, []).append(values)
                self.processes.exchange({})
        ranks = self.processes.gather(parts)
        # Each batch was dealt out to the ranks.
        dealt = torch.arange(self._batches.validated) % self._batches.batch_size % self.world_size
        order = dealt.argsort(stable=True).argsort()
        samples: dict[str, Tensor] = {}
        found: dict[str, float] = {}
        for name in parts:
            values = torch.cat([part for rank in ranks for part in rank[name]])[order]
            samples[name] = values
            # Labels and predictions have no mean.
            is_measure = values.is_floating_point() or values.dtype == torch.bool
            if self._summarize is None or values.dim() == 1 and is_measure:
                found[name] = values.double().mean().item()
        if self._summarize is not None:
            self._seed("summarize")
            summary = self.processes.first(lambda: self._summarize(samples))
            try:
                found |= {name: float(value) for name, value in summary.items()}
            except (AttributeError, RuntimeError, TypeError, ValueError):
                raise UserError(f"summarize gave {summary!s:.60}, not {{name: number}}") from None
        if self._best_name not in found:
            raise UserError(f"evaluate has found {', '.join(found)}; best is {self._best_of!r}")
        self._evaluation = {"values": found, "step": self.step}
        value = found[self._best_name]
        better = operator.gt if str(self._best_of).startswith("max") else operator.lt
        if value == value and (self.best is None or better(value, self.best)):
            self.best, self.best_step = value, self.step

    @contextlib.contextmanager
    def _eval_mode(self) -> Iterator[None]:
        modules = (*self._wrapped, *self._roots.values())
        training = [(one, one.training) for root in modules for one in root.modules()]
        switch: list[Any] = [one for one in self._optimizers.values() if hasattr(one, "eval")]
        weights = [(one, one.detach().clone()) for each in switch for one in parameters_of(each)]
        try:
            for root in (*modules, *switch):
                root.eval()
            # Rank 0's are those of all.
            for buffer in (one for root in self._roots.values() for one in root.buffers()):
                if self.processes.many:
                    dist.broadcast(buffer, src=0)
            yield
        finally:
            for one, was in training:
                one.training = was
            for optimizer in switch:
                optimizer.train()
            for parameter, weight in weights:
                parameter.detach().copy_(weight)

    def _values(self, batch: Any, count: int) -> dict[str, Tensor]:
        self._in_body = True
        values = self._evaluate(batch)
        self._in_body = False
        if not isinstance(values, dict) or not values:
            raise UserError(f"evaluate gave {values!s:.60}, not {{name: a value for each sample}}")
        checked = {}
        for name, value in values.items():
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                value = whole(torch.as_tensor(value).detach())
            shape = tuple(getattr(value, "shape", ()))
            if (shape[:1] if self._summarize else shape) != (max(count, 1),):
                text = f'evaluate returned "{name}" of shape {shape} for {max(count, 1)} samples'
                raise UserError(f'{text}: reduction="none" gives a value for each, as is wanted')
            checked[name] = value[:count].cpu()
        return checked

    def state_dict(self, exit_reason: str) -> dict:
        """The checkpoint as of the last boundary, with live tensors; sharded, rank 0 has it."""
        state = {
            "format_version": self.FORMAT_VERSION,
            # Early in the file, for RunDirectory.
            "run_id": self.run_id,
            **self._states(),
            "step": self.step,
            "best": {"value": self.best, "step": self.best_step, "of": self._best_of},
            "evaluation": self._evaluation,
            "metrics": self._metrics,
            "config": dict(vars(self.options)),
            "data_fingerprint": self._fingerprint,
            "stream": self._places,
            "exit_reason": exit_reason,
            "made_by": self._made_by,
            "torch_version": str(torch.__version__),
            "saved_at": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        }
        if self.processes.sharded:
            state = mapped(state, self.processes.gathered, {})
        mapped(state, savable, {})
        return state

    def _leave(self) -> None:
        """Saves and raises SystemExit. Returns only where a save after q has failed."""
        self.processes.exchange({})
        while self.monitor.exit_requested:
            reason, self.exit_code = self.monitor.reason or "", self.monitor.exit_code
            if self._save_last(reason) or reason != USER_REQUEST:
                self.has_left = True
                raise SystemExit(self.exit_code)
            self.monitor.withdraw()

    def _save_last(self, reason: str, together: bool = True) -> bool:
        """Saves the last boundary on leaving; False where that failed. Together: on all ranks."""
        self._label = label = "Final checkpoint"
        if reason != "completed":
            self._label = label = "Emergency checkpoint"
            self.screen.say("📝 Saving emergency checkpoint...")
        state = self.state_dict(reason)
        if together:
            self.saved = self.processes.first(lambda: self.directory.save_last(state, label))
        elif self.rank == 0:
            self.saved = self.directory.save_last(state, label)
        if self.saved is None:
            if reason != USER_REQUEST:
                self.exit_code = 1
                self._name_newest()
            return False
        self.completed = reason == "completed"
        self.screen.say(f"✅ {label} saved: {self.saved}")
        if self.device.type != "cpu":
            getattr(torch, self.device.type).empty_cache()
            self.screen.say(f"🧹 {self.device.type.upper()} cache cleared")
        return True

    def _name_newest(self) -> None:
        with contextlib.suppress(CheckpointError, OSError):
            self.saved = latest_checkpoint(self.options.checkpoint_dir, self.screen.say)
            self._label = "Newest whole checkpoint"

    def finish(self) -> None:
        if self.trains and not self.completed and not self.exit_code:
            if self._in_body and self._updated:
                self._complete()
                with contextlib.suppress(Interrupted):
                    self._at_boundary()
            names = [name for name in self._others if name not in {**self._roots, **self._scalers}]
            if self._in_body and names:
                text = "Ended within a batch, before an optimizer's step: a resumed run begins it"
                self.screen.say(f"⚠️ {text} again, with {', '.join(names)} as it is now.")
            for put_back, before in self._before:
                put_back(before)
            self._save_last("completed")

    def failed(self, error: BaseException) -> BaseException | None:
        """Saves the state before the batch, if it is certain. Returns None on leaving."""
        if self.has_left:
            return None
        self.exit_code = 1
        if isinstance(error, UserError):
            self.exit_code = 2
            if not self.trained:
                raise error
        if isinstance(error, SystemExit):
            self.exit_code = error.code if isinstance(error.code, int) else error.code is not None
        if self.completed or not self.trains:
            return error
        if self.processes.many and hasattr(dist.group.WORLD, "abort"):
            # A device may be waiting for ranks that will not come.
            dist.group.WORLD.abort()  # type: ignore[union-attr]
        unknown = [*(one for one in self._others if one not in self._scalers), *self._outer]
        changed = self._in_body and (self._updated or self._kept_as != self._marks())
        reasons = {
            "Asked twice to leave": self.monitor.abandoned is not None,
            "Nothing has been trained": not self.trained,
            "The other ranks' parts of the state are out of reach": self.processes.sharded,
            "The exception came after a step of an optimizer, or what is like one": changed,
            f"The batch may have changed {', '.join(unknown)}": self._in_body and unknown,
        }
        reason = next((text for text, is_so in reasons.items() if is_so), None)
        if reason is None:
            for put_back, before in self._before:
                put_back(before)
            try:
                self._save_last(f"exception_{type(error).__name__}", together=False)
                return error
            except UserError as unsavable:
                reason = one_line(unsavable)
        if self.rank == 0:
            self.directory.wait()
            self._name_newest()
        self.screen.say(f"❌ {reason}: nothing half-updated is saved.")
        return error

    def _row(self) -> None:
        metrics, now = self._metrics, time.monotonic()
        samples = self._samples - self._row_samples
        values: dict[str, Any] = {"step": self.step, "epoch": self.epoch}
        values |= {name: sum_ / metrics["counts"][name] for name, sum_ in metrics["sums"].items()}
        values |= {f"val_{name}": mean for name, mean in (self.evaluation or {}).items()}
        values |= self.rates()
        values["samples_per_second"] = round(samples / max(1e-9, now - self._row_time), 1)
        values["seconds"] = round(metrics["seconds"], 3)
        if self.rank == 0:
            self.directory.add_row(values)
            if self.on_row is not None:
                self.on_row(values)
        metrics |= {"sums": {}, "counts": {}}
        self._row_time, self._row_samples = now, self._samples

    def _status(self) -> str:
        elapsed = max(1e-9, time.monotonic() - self._start)
        seconds = elapsed / max(1, self.step - self._first_step)
        left = min(round(seconds * (self.total_steps - self.step)), 10**9)
        parts = [f"step {self.step}/{self.total_steps}"]
        if self._metrics["smooth_loss"] is not None:
            parts.append(f"loss {self._metrics['smooth_loss']:.4f}")
        parts.append(f"{datetime.timedelta(seconds=left)} left")
        if self.best is not None:
            last = self._evaluation["values"][self._best_name]
            parts.append(f"val {self._best_name} {last:.4f} (best {self.best:.4f})")
        parts.append(f"{self._samples / elapsed:,.0f} samples/s")
        parts += [f"lr {rate:.2e}" for rate in list(self.rates().values())[-1:]]
        return " | ".join(parts)

    def _describe(self) -> str:
        # In the monitor's thread, which no file that goes at this moment may end.
        with contextlib.suppress(OSError, ValueError):
            saved = (path for path in self.directory.path.rglob("[!.]*.pt") if path.is_file())
            when, name = max((path.stat().st_mtime, path.name) for path in saved)
            age = datetime.timedelta(seconds=round(time.time() - when))
            return f"Last checkpoint: {name}, {age} ago."
        return "No checkpoint yet."

    def summary(self) -> str:
        """What is read last: how far it came, what was saved, and the command that goes on."""
        best = "none yet" if self.best is None else f"{self.best:.4f}"
        lines = [
            "📊 Training Summary:",
            f"   Completed Steps: {self.step}",
            f"   Epoch: {self.epoch}",
            f"   Best {self._best_name.replace('_', ' ').title()}: {best}",
            f"   {self._label}: {self.saved}" if self.saved else "   Checkpoint: none yet",
        ]
        if self.saved and not self.completed:
            how = f"{own_command()} --resume {shlex.quote(str(self.saved))}"
            if self.monitor.is_guest:
                how = f"main(..., argv={['--resume', str(self.saved)]})"
            lines.append(f"▶️ Resume with: {how}")
        return "\n".join(lines)


# ---- Processes --------------------------------------------------------------------------------


class Processes:
    """The processes that train one model together: torchrun's, or this one alone.

    Each rank has the whole model (DistributedDataParallel) or, if `sharded`, rows of all of it
    (fully_shard). Rank 0 alone saves, prints and hears the keys.
    """

    def __init__(self, monitor: ExitMonitor) -> None:
        self.monitor = monitor
        self.device = torch.device("cpu")
        self.save_requested = self.sharded = self.compiled = False
        self.many = dist.is_torchelastic_launched()
        self.rank, self.world_size = 0, 1
        if not self.many:
            return
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        backend = "gloo"
        if torch.cuda.is_available():
            if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
                raise UserError(f"more processes than GPUs, {torch.cuda.device_count()} here")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend)
        # Who leaves for a mistake now leaves no other alone in the middle of connecting.
        self.gather(None)
        self._torchrun = os.getppid()
        # From here on a request is for all, when the loop begins.
        monitor.requests = []
        monitor.nothing_to_save = None

    def wrap(self, module: nn.Module) -> tuple[nn.Module, nn.Module]:
        module = module.to(self.device)
        if self.compiled:
            module.compile()
        if self.many and not self.sharded and any(one.requires_grad for one in module.parameters()):
            # Which take part may differ (a GAN in one module), and buckets keep their order.
            return module, nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
        if self.sharded:
            # Every child of an nn.ModuleList, then the root, with rank 0's weights.
            from torch.distributed.fsdp import fully_shard

            if self.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
                raise UserError(f"--shard on CPUs needs a newer PyTorch than {torch.__version__}")
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.detach(), src=0)
            mesh = dist.device_mesh.init_device_mesh(self.device.type, (self.world_size,))
            lists = [one for one in module.modules() if isinstance(one, nn.ModuleList)]
            found = (unit for one in reversed(lists) for unit in one if list(unit.parameters()))
            try:
                for unit in (*dict.fromkeys(found), module):
                    fully_shard(unit, mesh=mesh)
            except (ValueError, NotImplementedError) as error:
                raise UserError(f"--shard: {one_line(error)}") from None
        return module, module

    def gathered(self, leaf: Any) -> Any:
        """A collective: a copy on rank 0, of a tensor that is spread over processes all of it."""
        if not isinstance(leaf, Tensor):
            return leaf
        tensor = whole(leaf.detach())
        return tensor.to("cpu", copy=tensor.is_cpu) if self.rank == 0 else None

    def gather(self, value: object) -> list[Any]:
        values: list[Any] = [value] * self.world_size
        if self.many:
            dist.all_gather_object(values, value)
        return values

    def exchange(self, own: dict[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
        """What one has heard becomes the request of all; returns {name: (sum, count)} of all."""
        monitor = self.monitor
        mine = own, monitor.heard, monitor.save_requested
        self.save_requested |= monitor.save_requested
        monitor.save_requested = False
        if self.many and os.getppid() != self._torchrun:
            monitor.request("torchrun_died", 1)
        total: dict[str, tuple[float, int]] = {}
        for values, requests, save in self.gather(mine):
            self.save_requested |= save
            for request in requests:
                if request not in monitor.requests:
                    monitor.requests.append(request)
                monitor.request(*request)
            for name, (part, count) in values.items():
                before = total.get(name, (0.0, 0))
                total[name] = before[0] + part, before[1] + count
        return total

    def first(self, function: Callable[[], Any]) -> Any:
        """A collective: what function returns or raises on rank 0 is for all."""
        answer: list[Any] = [None, None]
        try:
            answer[0] = self.rank == 0 and function()
        except (UserError, *SAVE_ERRORS) as error:
            answer[1] = error
        answer = self.gather(answer)[0]
        if answer[1] is not None:
            raise answer[1]
        return answer[0]


def whole(tensor: Any) -> Tensor:
    """All of a tensor that may be spread over processes (a DTensor)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_part(saved: Any, own: Any) -> Any:
    """Part of a checkpoint in memory of its own, spread over the processes as its like in own."""
    if isinstance(saved, dict):
        of_own = own.get if isinstance(own, dict) else lambda key: own
        return type(saved)({key: own_part(value, of_own(key)) for key, value in saved.items()})
    if isinstance(saved, (list, tuple)):
        return type(saved)(own_part(value, None) for value in saved)
    return spread(saved, own) if isinstance(saved, Tensor) else saved


def spread(tensor: Tensor, own: Any) -> Tensor:
    """A copy of a tensor that each rank has; where own is a DTensor, each rank's part of it."""
    if not hasattr(own, "full_tensor") or tensor.shape != own.shape:
        return tensor.clone()
    from torch.distributed.tensor import distribute_tensor

    mesh, tensor = own.device_mesh, tensor.to(own.device)
    return distribute_tensor(tensor, mesh, own.placements, src_data_rank=None).clone()


# ---- main -------------------------------------------------------------------------------------


def main(train: Callable[[Run], None], argv: Sequence[str] | None = None, **options: Any) -> Run:
    """Parses the command line, calls train(run), and ends the process with the run's exit code.

    Keyword arguments become options, or change a common one's default; see option(...). With argv,
    in a notebook or a sweep, it returns the run instead, with `exit_code`, `completed`, `best` and
    `saved`, raises what train has raised, once the state is safe, and UserError for a mistake.
    """
    if argv is not None or hasattr(sys, "ps1"):
        return trained(train, declared(options), argv or [])
    try:
        run = trained(train, declared(options), None)
    except UserError as error:
        complain(f"error: {one_line(error)}\n")
        sys.exit(2)
    code = run.exit_code
    if run.processes.many and (run.completed or run.has_left):
        # Its models hold the group, whose threads may yet ask for the interpreter; nothing tells.
        time.sleep(0.1)
        del run
        gc.collect()
        dist.destroy_process_group()
    begun = time.monotonic()

    def hurry(signum: int, frame: object) -> None:
        # Half a second later it ends the wait for a person's threads.
        if time.monotonic() - begun > 0.5:
            end_children(multiprocessing.active_children())
            os._exit(code)

    for signum in EXIT_SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, hurry)
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except (AttributeError, OSError, ValueError):
            # What Python cannot flush when it ends would turn any exit code into 120.
            setattr(sys, name, None)
    sys.exit(code)


def trained(train: Callable[[Run], None], options: dict, argv: Sequence[str] | None) -> Run:
    """Parses, trains, says how it ended, and, with argv, raises what ended it. Raises UserError."""
    given = parse_options(options, argv, train.__doc__ or sys.modules["__main__"].__doc__)
    if threading.current_thread() is not threading.main_thread():
        raise UserError("main() hears signals: call it in the main thread, or in a process")
    # A checkpoint must never become descriptor 1 or 2 because the parent has closed it.
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(fd)
    given = {name: options[name].default for name in NOT_STORED} | given
    is_first = not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"
    screen = Screen(shown=is_first)
    # What is typed in an interactive interpreter is its own.
    keyboard = given.pop("keyboard") and is_first and not hasattr(sys, "ps1")
    with contextlib.ExitStack() as stack:
        # Its first call writes a file; and behind all this a caller's random search goes on.
        with contextlib.suppress(FileNotFoundError):
            tempfile.gettempdir()
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        screen.share(stack)
        monitor = ExitMonitor(screen, keyboard)
        monitor.is_guest = argv is not None
        monitor.nothing_to_save = "Training has not begun: there is nothing to save."
        stack.enter_context(monitor)
        run = prepared(options, given, Processes(monitor), screen)
        stack.enter_context(run.undo)
        error: BaseException | None = None
        try:
            train(run)
            run.finish()
        except (Exception, KeyboardInterrupt, SystemExit) as failure:
            error = run.failed(failure)
        monitor.nothing_to_save = None
        # A signal or a q that comes only now takes away neither the last words nor the exit code.
        last_words(run, error)
        if error is not None and monitor.is_guest:
            if monitor.exit_requested and not isinstance(error, (UserError, KeyboardInterrupt)):
                # Who has asked to leave means the caller's sweep too.
                error = SystemExit(monitor.exit_code)
            raise error
    return run


def prepared(options: dict, given: dict, processes: Processes, screen: Screen) -> Run:
    """The run that the command line asks for, with the checkpoint it goes on from."""
    directory = os.path.abspath(options["checkpoint_dir"].default)
    resume, weights = given.pop("resume"), given.pop("weights")
    if weights and resume not in (None, "auto"):
        raise UserError("--weights begins a new run: leave it out, or --resume")
    where = given.get("checkpoint_dir", directory)
    path, state = named_checkpoint(resume, where, processes, screen.say)
    origin = named_checkpoint(weights if path is None else None, where, processes, screen.say)
    with fitting(path, "this program"):
        if path is not None:
            # The directory that its run saves in, links resolved, if it was saved there.
            directory = os.path.dirname(os.path.realpath(path)).removesuffix("/emergency_exit")
            if os.path.basename(path).startswith("train_graceful_"):
                directory = state["config"]["checkpoint_dir"]
        given.setdefault("checkpoint_dir", directory)
        try:
            tempfile.gettempdir()
        except FileNotFoundError:
            # PyTorch needs one to import its compiler, which an optimizer does.
            tempfile.tempdir = given["checkpoint_dir"]
            with contextlib.suppress(OSError):
                os.makedirs(tempfile.tempdir, exist_ok=True)
        config = configuration(options, given, state.get("config", {}), path)
        if given.get("shard") and not processes.many:
            raise UserError("--shard needs processes: scripts/train_torchrun.sh 2 --shard")
        processes.device = choose_device(config.device)
        # The checkpoint of a sharded run is one like any other.
        processes.sharded = config.shard and processes.many
        processes.compiled = config.compile
        return Run(config, processes, screen, (path, state), origin)


def named_checkpoint(name: Any, directory: str, processes: Processes, say: Callable) -> tuple:
    """The path and the state of a checkpoint, or of `latest`; (None, {}) for none."""
    if name is None or name == "auto" and not processes.first(lambda: checkpoint_files(directory)):
        return None, {}
    path = Path(os.path.abspath(name))
    if name in ("latest", "auto"):
        path = processes.first(lambda: latest_checkpoint(directory, say))
    state = load_checkpoint(path, mmap=True)
    known = re.fullmatch("[0-9a-f]{12}", str(state.get("run_id")))
    if str(state.get("format_version")) != str(Run.FORMAT_VERSION) or not known:
        raise CheckpointError(f"{path}: not a checkpoint of this program and edition")
    return path, state


def last_words(run: Run, error: BaseException | None) -> None:
    if error is None:
        if run.completed:
            done = "All steps done!" if run.step >= run.total_steps else "The loop has ended."
            run.screen.say(f"🎉 {done}")
        elif run.trains and run.exit_code != 1:
            run.screen.say("✨ Graceful exit completed!")
    elif isinstance(error, UserError) and not run.monitor.is_guest:
        complain(f"error: {one_line(error)}\n")
    elif not isinstance(error, (SystemExit, UserError)):
        # The caller of a guest gets it, if nobody has asked to leave.
        if not run.monitor.is_guest or run.monitor.exit_requested:
            complain("".join(traceback.format_exception(error)))
    if run.trains:
        summary = run.summary()
        run.screen.say(summary)
        if run.rank == 0:
            with contextlib.suppress(OSError):
                run.directory.write_outcome(f"{run.exit_code}\n{summary}\n")
    # A terminal that was stopped with Ctrl-S may take the last lines yet.
    run.screen.write("", wait=2.0)


def own_command() -> str:
    """What starts this program again, from any directory."""
    script = os.path.abspath(sys.argv[0])
    here = os.path.dirname(os.path.abspath(__file__))
    python = shlex.quote(sys.executable)
    if dist.is_torchelastic_launched():
        python += f" -m torch.distributed.run --nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}"
    if here != os.path.dirname(script):
        python = f"PYTHONPATH={shlex.quote(here)} {python}"
    # A shell wrapper says how it was started itself.
    return os.environ.get("TRAIN_COMMAND") or f"{python} {shlex.quote(script)}"


def choose_device(name: str) -> torch.device:
    """Raises UserError where the device is not there, or torch.distributed cannot use it."""
    mps = torch.backends.mps.is_available() and not dist.is_torchelastic_launched()
    there = ("cuda", torch.cuda.is_available()), ("mps", mps), ("cpu", True)
    usable = [kind for kind, is_there in there if is_there]
    if name not in ("auto", *usable):
        raise UserError(f"--device {name}: here it can be {' or '.join(usable)}")
    device = torch.device(usable[0] if name == "auto" else name)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    return device


# ---- The built-in program: text and model -----------------------------------------------------

MAX_ANGLE = math.pi / 4


def text_datasets(paths: Sequence[str], context: int, left_out: Path) -> list[Tensor]:
    """Training and validation data: the first 95 % of the files in paths, and the rest.

    Row i, uint8, is byte i * context and the `context` that follow it. Without paths, of Python's
    own source. Hidden files and what is below left_out are not data. Raises UserError for none.
    """
    omitted = set() if paths else {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    content = bytearray()
    for top in map(Path, paths or [sysconfig.get_path("stdlib")]):
        try:
            top.stat()
            for file in sorted(top.rglob("*" if paths else "*.py")) if top.is_dir() else [top]:
                parts = file.relative_to(top).parts or (file.name,)
                hidden = any(part[0] == "." for part in parts) or left_out in file.parents
                if not hidden and omitted.isdisjoint(parts) and file.is_file():
                    content += file.read_bytes()
        except OSError as error:
            raise UserError(f"--data {error.filename}: {error.strerror}") from error
    rest = len(content) // 20
    if rest <= context:
        raise UserError(f"--data {' '.join(paths)}: {len(content):,} bytes are too few")
    text = torch.frombuffer(content, dtype=torch.uint8)
    return [part.unfold(0, context + 1, context) for part in (text[:-rest], text[-rest:])]


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
        dropout = self.dropout * self.training
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.out(y.transpose(1, 2).flatten(-2))


def rotate_columns(weight: Tensor, angle: Tensor) -> Tensor:
    """weight @ R(angle), for weight (..., hidden, dim) and angle (..., planes) in radians.

    R is the product of the Givens rotations of the disjoint coordinate planes (i, i + planes), with
    planes <= dim / 2. Since (W R) x = W (R x), folding R into the weight rotates every input.
    """
    planes = angle.shape[-1]
    cos, sin = angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)
    sizes = [planes, planes, weight.shape[-1] - 2 * planes]
    first, second, rest = weight.split(sizes, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin, rest], dim=-1)


class Experts(nn.Module):
    """A softmax-routed mixture of two-layer MLPs that share 4 * dim hidden units.

    Every expert sees every token, weighted by its gate; with rotations, through R_e with angles
    max_angle * tanh(theta_e). `gates` (..., experts), `rotated_by` (experts, dim // 2): the last.
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
        self.gates: Any = None
        self.rotated_by: Any = None

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


# ---- The built-in program: controllers and loops ----------------------------------------------


def orthogonality_loss(angles: Tensor) -> Tensor:
    """How alike the experts' rotations are: mean over e < f of (<R_e, R_f> / <R_e, R_e>)**2.

    With <A, B> = trace(A^T B) the quotient is mean_i cos(angle_ei - angle_fi). In [0, 1]; zero for
    a single expert. angles (experts, planes), radians.
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

    Low when each token is routed decisively while all experts share the load (regularized
    information maximization; Krause, Perona and Gomes, 2010). gates (..., experts), each row
    summing to 1; load (experts,) is their mean over the tokens of the batch.
    """
    if gates.shape[-1] == 1:
        return gates.new_zeros(())
    entropy = torch.special.entr(gates.float()).sum(dim=-1).mean()
    return (entropy - torch.special.entr(load).sum()) / math.log(gates.shape[-1])


def forward_backward(loss: Callable, batch: Any, parts: int = 1, extra: Callable = float) -> Tensor:
    """Adds the gradient of loss(batch) + extra() to .grad; returns the mean of loss.

    A batch that is a tensor is taken in so many forward passes; loss is a mean over samples.
    """
    losses = []
    for part in [batch] if parts == 1 else batch.chunk(parts):
        value = loss(part)
        ((value + extra()) / parts).backward()
        losses.append(value.detach())
    return torch.stack(losses).mean()


def warmup_decay(optimizer: Optimizer, warmup: int, total: int, decay: Callable) -> LambdaLR:
    """A straight rise over warmup steps, then decay(progress), progress from 0 to 1 at the end."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return decay(min(1.0, (step - warmup) / max(1, total - warmup)))

    return LambdaLR(optimizer, factor)


class StandardTrainingController:
    """Turns batches into optimizer steps: one AdamW, one warm-up and cosine schedule.

    loss(batch) is the mean loss of a batch, a scalar. Options that the run has not are built-in.
    """

    def decay(self, progress: float) -> float:
        """Half a cosine, from 1 down to a tenth: the learning rate's factor after the warm-up."""
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))

    def __init__(self, run: Run, model: nn.Module, loss: Callable[[Any], Tensor]) -> None:
        self.run, self.model, self.loss = run, model, loss
        defaults = {name: one.default for name, one in declared(OPTIONS).items()}
        self.options = argparse.Namespace(**{**defaults, **vars(run.options)})
        self.optimizers = self.make_optimizers()
        self.schedulers = {
            name: warmup_decay(one, self.options.warmup_steps, run.total_steps, self.decay)
            for name, one in self.optimizers.items()
        }

    def make_optimizers(self) -> dict[str, Optimizer]:
        return {"adamw": self.adamw(self.model.parameters())}

    def adamw(self, parameters: Iterable) -> Optimizer:
        rate, decay = self.options.lr, self.options.weight_decay
        return torch.optim.AdamW(parameters, rate, weight_decay=decay, fused=True)

    def regularization(self) -> Tensor | float:
        """Returns what is added to the loss of the last forward pass."""
        return 0.0

    def training_step(self, batch: Any) -> Tensor:
        """Makes one step of every optimizer; returns the mean loss of the batch."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss = forward_backward(self.loss, batch, self.options.grad_accum, self.regularization)
        self.run.clip_gradients(self.options.grad_clip)
        for optimizer in self.optimizers.values():
            optimizer.step()
        for scheduler in self.schedulers.values():
            scheduler.step()
        return loss


class BatchedMuon(Optimizer):
    """Muon (Jordan et al., 2024), all matrices of a shape at once."""

    MOMENTUM = 0.95

    def __init__(self, params: Iterable, lr: float, weight_decay: float, ns_steps: int) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "ns_steps": ns_steps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[torch.Size, tuple[list, list]] = {}
            for parameter in (one for one in group["params"] if one.grad is not None):
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - self.MOMENTUM)
                parameters, updates = alike.setdefault(parameter.shape, ([], []))
                parameters.append(parameter)
                updates.append(whole(parameter.grad.lerp(momentum, self.MOMENTUM)))
            for (rows, columns), (parameters, updates) in alike.items():
                rate = group["lr"] * math.sqrt(max(1, rows / columns))
                changes = orthogonalize(torch.stack(updates), group["ns_steps"])
                for one, change in zip(parameters, changes):
                    one.mul_(1 - group["lr"] * group["weight_decay"])
                    one.add_(spread(change, one), alpha=-rate)


def orthogonalize(matrices: Tensor, iterations: int) -> Tensor:
    """The nearest (semi-)orthogonal matrix, roughly, to each of matrices (count, rows, columns).

    A quintic Newton-Schulz iteration (Jordan et al., "Muon", 2024), in bfloat16, or in float32 on a
    CPU that would only emulate it.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalize(matrices.mT, iterations).mT
    a, b, c = 3.4445, -4.7750, 2.0315
    emulated = matrices.is_cpu and not torch.cpu._is_avx512_bf16_supported()
    x = matrices.to(torch.float32 if emulated else torch.bfloat16)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


class GeometricTrainingController(StandardTrainingController):
    """Rotated experts, and an optimizer for each kind of parameter.

    loss = task + 0.01 orthogonality + 0.001 rotation_efficiency + 0.01 specialization, averaged
    over the Experts. `rotation`: Adam on their angles. `expert`: Muon on the matrices in them or in
    an nn.ModuleList, which is what lowers the loss, for (W R) x = W (R x). `embedding`: AdamW on
    the rest. Raises UserError for a model without tg.Experts that have rotations.
    """

    def decay(self, progress: float) -> float:
        """From 1 straight down to 0 (Bergsma et al., "Straight to Zero", 2025)."""
        return 1 - progress

    def make_optimizers(self) -> dict[str, Optimizer]:
        modules = list(self.model.modules())
        self.experts = [x for x in modules if isinstance(x, Experts) and x.theta is not None]
        if not self.experts:
            raise UserError("GeometricTrainingController: no tg.Experts(dim, experts) in the model")
        o = self.options
        # A step decays the weights as much as AdamW's does; with four iterations it is as good.
        muon = {"lr": 8 * o.lr, "weight_decay": o.weight_decay / 8, "ns_steps": 4}
        lists = [one for one in modules if isinstance(one, (nn.ModuleList, Experts))]
        inside = {p for one in lists for p in one.parameters() if p.dim() == 2}
        angles = {one.theta for one in self.experts}
        # What looks things up or chooses is no hidden layer.
        inside -= {one.weight for one in modules if isinstance(one, nn.Embedding)}
        inside -= {one.router.weight for one in modules if isinstance(one, Experts)}
        rotation = [p for p in self.model.parameters() if p in angles]
        others = [p for p in self.model.parameters() if p not in angles]
        return {
            "rotation": torch.optim.Adam(rotation, o.rotation_lr, fused=True),
            "expert": BatchedMuon([p for p in others if p in inside], **muon),
            "embedding": self.adamw([p for p in others if p not in inside]),
        }

    def regularization(self) -> Tensor:
        """The three geometric losses, weighted, averaged over the model's Experts."""
        experts: list[Any] = [one for one in self.experts if one.gates is not None]
        total = torch.zeros((), device=self.run.device)
        for one in experts:
            load = one.gates.float().flatten(0, -2).mean(dim=0)
            # The value is that of all processes, the slope this one's, as in the rest of the loss.
            whole_load = load.detach().clone()
            if self.run.processes.many:
                dist.all_reduce(whole_load)
            load = load + (whole_load / self.run.world_size - load.detach())
            total = total + 0.01 * orthogonality_loss(one.rotated_by)
            total = total + 0.001 * rotation_efficiency_loss(one.rotated_by)
            total = total + 0.01 * specialization_loss(one.gates, load)
            one.gates = one.rotated_by = None
        return total / max(1, len(experts))


def standard_training_loop(
    run: Run, optimizer: Optimizer, scheduler: LRScheduler, loss: Callable, evaluate: Callable
) -> None:
    """Trains until all steps are done or somebody asks to leave; either way everything is saved."""
    for batch in run.batches(evaluate):
        optimizer.zero_grad()
        mean = forward_backward(loss, batch, run.options.grad_accum)
        run.clip_gradients(run.options.grad_clip)
        optimizer.step()
        scheduler.step()
        run.log(loss=mean)


def controller_training_loop(run: Run, controller: Any, evaluate: Callable) -> None:
    """The same for any controller, which decides what an optimizer step on a batch is."""
    for batch in run.batches(evaluate):
        run.log(loss=controller.training_step(batch))


def train(run: Run) -> None:
    """Trains a byte-level language model on text."""
    o = run.options
    geometric = o.mode == "geometric"
    if geometric and o.loop == "standard":
        raise UserError("--mode geometric needs --loop controller, for it has three optimizers")
    if o.dim % o.heads or o.dim < 2 or 4 * o.dim < o.experts:
        raise UserError("--heads has to divide --dim, and --experts be at most 4 times --dim")
    training, validation = text_datasets(o.data, o.context, Path(o.checkpoint_dir).resolve())
    run.data(training, validation, batch_size=o.batch_size * o.grad_accum)
    sizes = o.context, o.layers, o.heads, o.dim, o.experts, o.dropout
    model = run.model(ByteLM(*sizes, rotations=geometric))

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
        standard_training_loop(run, optimizer, scheduler, loss, evaluate)


OPTIONS = {
    "mode": option("standard", "one AdamW, or rotated experts", ("standard", "geometric")),
    "loop": option(None, "for --mode standard (default standard)", ("standard", "controller")),
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
