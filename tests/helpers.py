"""What the tests share: the program as a fork of the test process, ranks, models, and how two runs are compared."""

import atexit
import contextlib
import csv
import ctypes
import faulthandler
import fcntl
import functools
import gc
import logging
import multiprocessing.util
import os
import pty
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import traceback
import types
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import pexpect
import ptyprocess
import pytest
import torch
from pexpect.fdpexpect import fdspawn
from torch import nn
from torch.distributed import run as torch_run
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from torch.nn import functional as F

# Whatever the tests are started by (nohup, a script's background, a closed standard input): their children begin as in a shell.
IGNORED = [
    signum
    for signum in {*signal.Signals} - {signal.SIGPIPE, signal.SIGXFSZ}
    if signal.getsignal(signum) is signal.SIG_IGN
]
for signum in IGNORED:
    signal.signal(signum, lambda *args: None)  # no program inherits that
signal.pthread_sigmask(signal.SIG_SETMASK, ())
for fd in range(3):
    try:
        os.fstat(fd)
    except OSError:
        os.open(os.devnull, os.O_RDWR)

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_graceful.py"
sys.path.insert(0, str(ROOT))
import train_graceful as t

TINY = [
    "--context",
    "16",
    "--layers",
    "2",
    "--heads",
    "2",
    "--dim",
    "16",
    "--experts",
    "2",
    "--batch-size",
    "4",
    "--dropout",
    "0.1",
]
ENDLESS = ["--steps", "1000000", "--save-every", "1000000", "--eval-every", "1000000"]
MODES = {
    "standard": ["--mode", "standard"],
    "controller": ["--mode", "standard", "--loop", "controller"],
    "geometric": ["--mode", "geometric"],
}


def as_in_a_shell(signals=IGNORED) -> None:
    """For forks of this process, which inherit what programs do not."""
    for signum in signals:
        signal.signal(
            signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
        )


# Campaign, cases, failures: printed when all tests have run.
TABLE: list[tuple[str, int, int]] = []

# ---- forks that become the program


@functools.cache
def warm(script: str = str(SCRIPT)) -> types.CodeType:
    """Imports what torch only imports for its first optimizer, so that no fork has to; the script, compiled once."""
    torch.optim.AdamW(torch.nn.Linear(1, 1).parameters())
    return compile(Path(script).read_bytes(), script, "exec")


class Moment:
    """The nth time that a function is called, or returns, in any thread of the child; `where` looks at its frame.

    Without a name, it is the nth call of any function in the main thread.

    Moments are found with sys.setprofile, so the program under test stays as it is.
    """

    def __init__(
        self,
        function: str,
        nth: int = 1,
        file: str = SCRIPT.name,
        event: str = "call",
        where=lambda frame: True,
    ) -> None:
        self.function, self.left, self.file, self.event, self.where = (
            function,
            nth,
            file,
            event,
            where,
        )

    def has_come(self, frame: types.FrameType, event: str) -> bool:
        code = frame.f_code
        if self.function:
            if (
                event != self.event
                or code.co_name != self.function
                or not code.co_filename.endswith(self.file)
                or not self.where(frame)
            ):
                return False
        elif event != "call" or threading.current_thread() is not threading.main_thread():
            return False
        self.left -= 1
        return self.left == 0


AT_EXIT = Moment("")  # when all else that a process does at its end is done


def watch(plan: list[tuple[Moment, Callable[[types.FrameType], None]]]) -> None:
    """Does what is planned for each moment, one after the other; an exception that it raises is raised there."""

    def profile(frame, event, arg) -> None:
        if not plan:
            sys.setprofile(None)
        elif plan[0][0].has_come(frame, event):
            plan.pop(0)[1](frame)

    threading.setprofile(profile)
    sys.setprofile(profile)


def batch_complete(nth: int) -> Moment:
    """The body of the loop has come back for the next batch."""
    return Moment("_complete", nth)


def saving(name: str) -> Moment:
    """A checkpoint of this name is about to be written."""
    return Moment("save_checkpoint", where=lambda frame: Path(frame.f_locals["path"]).name == name)


def frame_asks_to_leave(frame: types.FrameType) -> None:
    """For a method of Run: SIGTERM, and the monitor has heard it before the method goes on."""
    os.kill(os.getpid(), signal.SIGTERM)
    while not frame.f_locals["self"].monitor.exit_requested:
        pass


def corpus_of(path: Path, windows: int, context: int) -> Path:
    """Text of which so many windows are training data."""
    text = b"".join(b"%d squared is %d; " % (n, n * n) for n in range(2000))
    path.write_bytes(text[: int(windows * context / 0.95) + 20])
    return path


def become(
    argv: list[str],
    program: types.CodeType | Callable,
    kept=frozenset(),
    prepare: Callable = lambda: None,
    reset=IGNORED,
) -> NoReturn:
    """In a fork: leaves nothing of the test process that the script could notice, and is the script to its end."""
    try:
        as_in_a_shell(reset)
        gc.freeze()  # no finalizer of a test's object may run here
        atexit._clear()
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd > 2 and fd not in kept:
                with contextlib.suppress(OSError):  # the listing's own
                    os.close(fd)
        # pytest's writes to a descriptor that is closed now.
        faulthandler.enable(sys.__stderr__)
        ctypes.CDLL(None).prctl(
            0x59616D61, ctypes.c_ulong(-1), 0, 0, 0
        )  # PR_SET_PTRACER: strace may attach
        warnings.showwarning = lambda *args: print(
            warnings.formatwarning(*args[:4]), file=sys.stderr
        )  # pytest's hides them
        warnings.resetwarnings()
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        tempfile.tempdir = None  # read from the environment again
        sys.argv = argv
        # A fork of this fork will have its own in their place.
        streams = (("r", -1), ("w", -1), ("w", 1))
        sys.stdin, sys.stdout, sys.stderr = (
            open(fd, mode, buffer, closefd=False) for fd, (mode, buffer) in enumerate(streams)
        )
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        main.__file__ = argv[0]
        prepare()
        atexit.register(
            multiprocessing.util._exit_function
        )  # importing it would have; here it is imported already
        exec(program, main.__dict__) if isinstance(program, types.CodeType) else program()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 99
    # As Python does at its end: it waits for threads, calls what is registered and flushes.
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(code)


def set_environment(environment: dict[str, str] | None) -> None:
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)


def program_of(command: list, cwd: str | Path | None) -> tuple[list[str], types.CodeType, Callable]:
    """Of [python, script, ...] or [python, "-c", source, ...]: its sys.argv, its code, and what a fork does before it runs."""
    argv = [os.fspath(word) for word in command[1:] if word != "-u"]
    source = argv.pop(1) if argv[0] == "-c" else None
    # Where the fork will be.
    script = os.path.join(cwd or os.getcwd(), argv[0])

    def prepare() -> None:
        os.chdir(cwd or os.getcwd())
        sys.path.insert(0, os.path.dirname(script))

    return argv, compile(source, "-c", "exec") if source else warm(script), prepare


class Forked(subprocess.Popen):
    """subprocess.Popen for [python, script, ...] or [python, "-c", source, ...]: a fork that becomes it."""

    def _execute_child(
        self,
        args,
        executable,
        preexec_fn,
        close_fds,
        pass_fds,
        cwd,
        env,
        startupinfo,
        creationflags,
        shell,
        *others,
    ) -> None:
        pipes, new_session = others[:6], others[10]
        theirs = pipes[0], pipes[3], pipes[5]
        argv, program, prepare = program_of(args, cwd)
        self.pid = os.fork()
        self._child_created = True
        if self.pid:
            return self._close_pipe_fds(*pipes)
        for fd, stream in enumerate(theirs):
            if stream != -1:
                os.dup2(stream, fd)
        if new_session:
            os.setsid()
        # As for a program: what is ignored stays so, and no handler of its parent's is called.
        handled = [
            signum for signum in signal.valid_signals() if callable(signal.getsignal(signum))
        ]
        set_environment(env)
        become(argv, program, prepare=prepare, reset={*handled, *(() if new_session else IGNORED)})


def forked(
    command: list,
    capture_output: bool = False,
    input: str | None = None,
    timeout: float = 120,
    **kwargs,
) -> subprocess.CompletedProcess:
    """subprocess.run with a fork that becomes the program."""
    if capture_output:
        kwargs |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Forked(command, **kwargs) as process:
        output = process.communicate(input, timeout)
    return subprocess.CompletedProcess(command, process.returncode, *output)


def on_a_terminal(
    argv: list[str],
    program: types.CodeType | Callable,
    prepare: Callable = lambda: None,
    rows: int = 0,
    columns: int = 0,
    kept=frozenset(),
) -> tuple[int, int]:
    """Pid and terminal of a fork that becomes the program, in a session and on a terminal of its own."""
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        become(argv, program, kept, prepare)
    return pid, terminal


class Fork(pexpect.spawn):
    """A program as a fork of this process, which has imported torch already, in a session and on a terminal of its own."""

    def __init__(
        self,
        command: str,
        args: list[str],
        program: types.CodeType | Callable,
        prepare: Callable = lambda: None,
        **kwargs,
    ) -> None:
        self._program, self._prepare = program, prepare
        super().__init__(command, args, **kwargs)

    def _spawnpty(self, args, dimensions, **kwargs) -> ptyprocess.PtyProcess:
        argv = [os.fsdecode(arg) for arg in args[1:]]
        return ptyprocess.PtyProcess(
            *on_a_terminal(argv, self._program, self._prepare, *dimensions)
        )


class Child:
    """The real script, run as __main__ by a fork of this process, in a session and on a terminal of its own.

    It is a process like any other: only the seconds that importing torch takes are saved. `plan` says at which moments
    it does what; None is to wait for go(). `program` is what a script of somebody's own would do: call train_graceful.main.
    """

    def __init__(
        self,
        *args: object,
        plan: Sequence[tuple[Moment, Callable[[types.FrameType], None] | None]] = (),
        program: Callable[[], object] | None = None,
        **environment: str,
    ) -> None:
        code = warm()
        self._paused, notify = os.pipe()
        wait, self._go = os.pipe()
        self.exitcode: int | None = None
        self.peak = 0

        def pause(frame) -> None:
            os.write(notify, b"%d\n" % threading.get_native_id())
            os.read(wait, 1)

        def prepare() -> None:
            os.environ.update(environment)
            moments = [(moment, act or pause) for moment, act in plan if moment is not AT_EXIT]
            if len(moments) < len(plan):
                atexit.register(pause, None)
            if moments:
                watch(moments)

        self.pid, terminal = on_a_terminal(
            [str(SCRIPT), *map(str, args)], program or code, prepare, kept={notify, wait}
        )
        os.close(notify)
        os.close(wait)
        self.terminal = fdspawn(terminal, encoding="utf-8", codec_errors="replace", timeout=60)

    def paused(self) -> int:
        """Waits until the child has reached its moment; the id of the thread that did."""
        assert select.select([self._paused], [], [], 60)[0], "the moment did not come"
        told = os.read(self._paused, 20)
        assert told, f"it has ended before that moment: {self.finish()}"
        return int(told)

    def go(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # a request may have ended it at its moment
            os.write(self._go, b"!")

    def kill(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def finish(self, settings: list | None = None) -> str:
        """Waits for the end; what was printed since the last match. Exit code (minus the signal): exitcode; peak memory, KiB: peak."""
        self.terminal.expect(pexpect.EOF)
        assert settings is None or termios.tcgetattr(self.terminal.fileno()) == settings
        self.wait()
        self.close()
        return self.terminal.before

    def wait(self) -> None:
        """For the end of a child whose terminal is gone."""
        _, status, usage = os.wait4(self.pid, 0)
        self.exitcode, self.peak = os.waitstatus_to_exitcode(status), usage.ru_maxrss

    def ended(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def close(self) -> None:
        if self.exitcode is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.exitcode = -9
        if self._go is not None:
            os.close(self._go)
            os.close(self._paused)
            self._go = None
            self.terminal.close()


def fail(frame) -> None:
    raise RuntimeError("injected")


def whole_files(directory) -> dict[str, int]:
    """The step of every checkpoint under its final name, each of which passes its check."""
    return {path.name: t.load_checkpoint(path)["step"] for path in directory.rglob("[!.]*.pt")}


# ---- ranks

STEPS = 8
# 5 batches of 8 windows an epoch.
OPTIONS = [
    *["--context", 16, "--layers", 1, "--heads", 2, "--dim", 16, "--experts", 2],
    *["--batch-size", 4, "--grad-accum", 2, "--warmup-steps", 3, "--steps", STEPS],
    *["--log-every", 1, "--eval-every", 4, "--save-every", 3],
]


class Group:
    """Ranks that are forks of this process, each with a terminal of its own, and torchrun's store."""

    def __init__(self, fork) -> None:
        self._fork = fork
        self._stores: list[int] = []

    def __call__(self, size: int, *options: object, plans: dict | None = None, **settings) -> list:
        """Starts so many ranks; plans are {rank: its plan}, the rest is for all (see Child)."""
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        self._stores.append(serve_store(listener))
        return [
            self._fork(
                *options,
                plan=(plans or {}).get(rank, ()),
                **settings,
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(size),
                LOCAL_WORLD_SIZE=str(size),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                TORCHELASTIC_USE_AGENT_STORE="True",
                TORCHELASTIC_RUN_ID="test",
                TORCHELASTIC_MAX_RESTARTS="0",
                TORCHELASTIC_RESTART_COUNT="0",
                GROUP_WORLD_SIZE="1",
            )
            for rank in range(size)
        ]

    def close(self) -> None:
        for pid in self._stores:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def serve_store(listener: socket.socket) -> int:
    """Starts torchrun's part, in a process of its own; returns its pid.

    A lock that a thread of ours held while a rank is forked would stay locked there.
    """
    pid = os.fork()
    if pid == 0:
        try:
            os.closerange(3, listener.fileno())
            os.closerange(listener.fileno() + 1, 1000)
            _store = torch.distributed.TCPStore(
                "127.0.0.1",
                listener.getsockname()[1],
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=listener.fileno(),
            )
            signal.pause()
        finally:
            os._exit(1)
    listener.close()
    return pid


def finished(ranks: list) -> tuple[list[str], list[int]]:
    """What each rank has printed since the last match, and its exit code, when all have ended."""
    texts = [rank.finish() for rank in ranks]
    return texts, [rank.exitcode for rank in ranks]


def final(directory) -> dict:
    return t.load_checkpoint(directory / "final.pt")


def assert_close_run(left, right) -> None:
    """Two directories hold runs of the same batches, added up in another order."""
    a, b = final(left), final(right)
    assert a["step"] == b["step"] and a["model_state_dict"].keys() == b["model_state_dict"].keys()
    for name, weight in a["model_state_dict"].items():
        expected = b["model_state_dict"][name]
        torch.testing.assert_close(weight, expected, rtol=0, atol=2e-4, msg=name)
    for row, other in zip(metrics_without_times(left), metrics_without_times(right), strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            assert bool(value) == bool(other[key]), key
            assert not value or float(value) == pytest.approx(float(other[key]), abs=1e-4), key


# ---- torchrun itself


def plain_torchrun() -> None:
    try:
        torch_run.main()
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def torchrun(
    spawn,
    *words: object,
    size: int = 2,
    environment: dict | None = None,
    enter=lambda: None,
    script: Path | None = None,
):
    """torchrun, or this project's script for it, as a fork; its workers are forks of it.

    Where enter() leads, in the namespaces of a host say, is where they live.
    """
    environment = environment or {**os.environ, "PWD": os.getcwd()}

    def prepare() -> None:
        enter()
        set_environment(environment)
        os.chdir(environment["PWD"])
        subprocess_handler.Popen = Forked
        for reference in logging._handlerList:
            # Those that PyTorch has made write to what was the tests' own output.
            if type(handler := reference()) is logging.StreamHandler:
                handler.stream = sys.stderr

    if script is None:
        words = "--standalone", f"--nproc-per-node={size}", *words
    return spawn(
        command=[sys.executable, str(script or torch_run.__file__), *map(str, words)],
        program=warm(str(script)) if script else plain_torchrun,
        prepare=prepare,
    )


@functools.cache
def show() -> str:
    """In the place of Python: a program that tells its arguments and its environment."""
    path = Path(tempfile.mkdtemp(prefix="show_"), "show")
    path.write_text('#!/bin/sh\nprintf \'%s\\0\' $# "$@"\nexec env PWD="$PWD" env -0\n')
    path.chmod(0o755)
    atexit.register(shutil.rmtree, path.parent)
    return str(path)


def by_script(
    spawn, *words: object, enter=lambda: None, cwd: Path | None = None, **environment: object
):
    """scripts/train_torchrun.sh, and then what it starts as forks."""
    command = [ROOT / "scripts" / "train_torchrun.sh", *map(str, words)]
    given = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    told = subprocess.run(
        command,
        env={**given, "PYTHON": show()},
        cwd=cwd,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    number, *rest = told.split("\0")[:-1]
    arguments, variables = rest[: int(number)], rest[int(number) :]
    started = dict(variable.split("=", 1) for variable in variables)
    started["PYTHON"] = sys.executable
    return torchrun(
        spawn, *arguments[1:], environment=started, enter=enter, script=Path(arguments[0])
    )


def alive(pid: int) -> bool:
    """And no zombie that only an absent init would reap."""
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def worker_pids(parent: int) -> list[int]:
    return [int(pid) for pid in open(f"/proc/{parent}/task/{parent}/children").read().split()]


# ---- models of people's own


def program(train, **options):
    """What a script does at its end, for a child of the tests (see Child)."""
    defaults = {"batch_size": 8, "steps": 8, "eval_every": 4, "save_every": 3, "log_every": 1}
    return lambda: t.main(train, **{**defaults, "lr": 1e-2, **options})


class Images(torch.utils.data.Dataset):
    """Images of four classes in a noise of their own, augmented at random by every generator there is."""

    def __init__(self, count: int, augmented: bool) -> None:
        generator = torch.Generator().manual_seed(count)
        self.labels = torch.randint(4, (count,), generator=generator)
        noise = torch.randn(count, 3, 8, 8, generator=generator)
        self.images = noise + self.labels.view(-1, 1, 1, 1)
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        image = self.images[index]
        if self.augmented:
            image = image.flip(-1) if random.random() < 0.5 else image
            image = image.roll(int(np.random.randint(3)), dims=-1) + 0.1 * torch.randn(())
        return image, self.labels[index]


def cnn(dropout: float = 0.3) -> nn.Module:
    """A plain one, with BatchNorm; 10 rows of weights cannot be shared out equally among four.

    No bias comes before a BatchNorm: its gradient would be rounding errors, and Adam's step as long as any.
    """
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1, bias=False),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.Conv2d(10, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(8 * 36, 4),
    )


class Residual(nn.Module):
    """Layers in an nn.ModuleList, and no BatchNorm: any number of ranks computes the same."""

    def __init__(self, width: int = 24, layers: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(3 * 64, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.last = nn.Linear(width, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.first(images.flatten(1))
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.last(x)


def classify(make, training: int = 43, validation: int = 13, augmented: bool = True):
    """A train(run) for images with the model that make() returns."""

    def train(run: t.Run) -> None:
        o = run.options
        run.data(Images(training, augmented), Images(validation, False))
        model = run.model(make())
        optimizer = run.keep(optimizer=torch.optim.AdamW(model.parameters(), o.lr))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, o.lr, total_steps=run.total_steps)
        scheduler = run.keep(scheduler=schedule)

        def evaluate(batch):
            images, labels = batch
            logits = model(images)
            loss = F.cross_entropy(logits, labels, reduction="none")
            return {"loss": loss, "accuracy": logits.argmax(1) == labels}

        for images, labels in run.batches(evaluate, best="max accuracy"):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            run.clip_gradients(1.0)
            optimizer.step()
            scheduler.step()
            run.log(loss=loss)

    return train


class Gan(nn.Module):
    """Two networks in one module: each of its two losses leaves parameters without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3 * 64))
        self.discriminator = nn.Sequential(nn.Linear(3 * 64, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, noise: torch.Tensor, images: torch.Tensor | None = None) -> torch.Tensor:
        """The generator's loss, or with images the discriminator's; one for each sample."""
        made = self.generator(noise)
        if images is None:
            return F.softplus(-self.discriminator(made)).squeeze(1)
        seen = self.discriminator(torch.cat([made.detach(), images.flatten(1)]))
        fake, real = seen.squeeze(1).chunk(2)
        return F.softplus(fake) + F.softplus(-real)


def train_gan(run: t.Run) -> None:
    run.data(Images(43, False), Images(13, False))
    model = run.model(Gan())
    adam = torch.optim.Adam
    generator = run.keep(generator=adam(run.module.generator.parameters(), run.options.lr))
    discriminator = run.keep(
        discriminator=adam(run.module.discriminator.parameters(), run.options.lr)
    )

    def noise_for(images: torch.Tensor) -> torch.Tensor:
        """A function of the images: the same on any number of ranks."""
        return images[:, 0, 0, :4]

    def evaluate(batch):
        images, _ = batch
        return {"loss": model(noise_for(images), images)}

    for images, _ in run.batches(evaluate):
        discriminator.zero_grad()
        loss = model(noise_for(images), images).mean()
        loss.backward()
        discriminator.step()
        generator.zero_grad()
        generator_loss = model(noise_for(images)).mean()
        generator_loss.backward()
        generator.step()
        run.log(loss=loss, generator_loss=generator_loss)


# ---- what is looked at


def end_groups(children) -> None:
    """Kills and reaps forks that lead a group of their own, as far as they are still there."""
    for child in children:
        try:
            os.killpg(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        child.close()


def finish(child) -> str:
    """Waits for the child's end and returns what it printed since the last match; exit code in child.exitstatus."""
    child.expect(pexpect.EOF)
    child.wait()
    return child.before


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    """The script without a terminal, to its end."""
    kwargs.setdefault("stdin", subprocess.DEVNULL)
    return forked(
        [sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True, **kwargs
    )


def refused(*args) -> str:
    """The message of the UserError that a command line ends with, in this process (main makes it a line and exit code 2)."""
    with pytest.raises(t.UserError) as error:
        t.trained(t.train, t.declared(t.OPTIONS), [*map(str, args), "--no-keyboard"])
    assert "\n" not in str(error.value)
    return str(error.value)


def session(*args, train=None, **options) -> int:
    """One session of the program in this process, of the built-in one or of train(run).

    Returns its exit code, and says what went wrong on standard error, as a process of its own does.
    """
    if train is None:
        train, options = t.train, {**t.OPTIONS, **options}
    try:
        return t.main(train, argv=["--no-keyboard", *map(str, args)], **options).exit_code
    except t.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as error:
        return error.code
    except Exception:
        traceback.print_exc()
        return 1


def ask_to_leave(run) -> None:
    """SIGTERM, and the run's monitor has heard it on return."""
    os.kill(os.getpid(), signal.SIGTERM)
    wait_until(lambda: run.monitor.heard)


def assert_same(left, right, where="checkpoint") -> None:
    """Nested dicts, lists and tuples of tensors and plain values are the same, bit for bit."""
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and left.equal(right), where
    elif isinstance(left, dict):
        assert list(left) == list(right), where
        for key in left:
            assert_same(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for number, pair in enumerate(zip(left, right)):
            assert_same(*pair, f"{where}[{number}]")
    else:
        assert left == right, where


STATE_KEYS = (
    "model_state_dict",
    "optimizer_state_dicts",
    "scheduler_state_dicts",
    "state_dicts",
    "loop",
    "step",
    "best",
    "evaluation",
    "data_fingerprint",
)


def metrics_without_times(directory: Path, name="metrics.csv") -> list[dict]:
    """The rows of metrics.csv, without what no two runs have in common."""
    with open(directory / name) as file:
        return [
            {
                key: value
                for key, value in row.items()
                if key not in ("samples_per_second", "seconds", "run")
            }
            for row in csv.DictReader(file)
        ]


def assert_same_run(left: Path, right: Path) -> None:
    """Two directories hold the same finished run: weights, optimizers, schedulers, what else was kept, and metrics."""
    a, b = t.load_checkpoint(left / "final.pt"), t.load_checkpoint(right / "final.pt")
    assert_same({key: a[key] for key in STATE_KEYS}, {key: b[key] for key in STATE_KEYS})
    assert a["metrics"]["smooth_loss"] == b["metrics"]["smooth_loss"]
    assert metrics_without_times(left) == metrics_without_times(right)


def flip_a_weight(path: Path, into: Path) -> None:
    """One bit of the largest tensor in a checkpoint; torch.load does not notice."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        tensors = [info for info in archive.infolist() if "/data/" in info.filename]
        record = max(tensors, key=lambda info: info.file_size)
    data[record.header_offset + 2000] ^= 1
    into.write_bytes(data)
    torch.load(into, weights_only=True)


def processes_in_session(session: int) -> list[str]:
    """Command lines of all processes, zombies too, in a session (Linux)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == session:
                found.append(f"{entry.name} {fields[0]}")
    return found


def saved_path(output: str) -> Path:
    return Path(re.search(r"checkpoint saved: (\S+\.pt)", output)[1])


def wait_until(condition, process=None, timeout=60) -> None:
    """Waits for an event that nothing announces; fails after timeout seconds or when process has ended without it."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        assert process is None or process.poll() is None, "the process has ended"
        time.sleep(0.02)
