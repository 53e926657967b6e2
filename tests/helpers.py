"""What the tests share: the program as a fork of the test process, ranks, models, comparisons."""

import atexit
import contextlib
import csv
import ctypes
import faulthandler
import functools
import gc
import logging
import multiprocessing.util
import os
import pty
import re
import select
import signal
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
from subprocess import DEVNULL, PIPE, Popen
from typing import NoReturn

import numpy as np
import pexpect
import pytest
import torch
from pexpect.fdpexpect import fdspawn
from torch import nn
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from torch.distributed.launcher.api import LaunchConfig
from torch.nn import functional as F

# Whatever the tests are started by (nohup, a script's background, a closed standard input): their
# children begin as in a shell.
for signum in {*signal.Signals} - {signal.SIGPIPE, signal.SIGXFSZ}:
    if signal.getsignal(signum) is signal.SIG_IGN:
        signal.signal(signum, lambda *args: None)  # no program inherits that
signal.pthread_sigmask(signal.SIG_SETMASK, ())
while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
    pass
os.close(fd)

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_graceful.py"
sys.path.insert(0, str(ROOT))
import train_graceful as t

TINY = "--context 16 --layers 2 --heads 2 --dim 16 --experts 2 --batch-size 4 --dropout 0.1".split()
MAKE = ["make", "-C", str(ROOT), f"VENV_PYTHON={sys.executable}", "-o", ".venv/installed"]
ENDLESS = "--steps 1000000 --save-every 1000000 --eval-every 1000000".split()
MODES = {
    "standard": ["--mode", "standard"],
    "controller": ["--mode", "standard", "--loop", "controller"],
    "geometric": ["--mode", "geometric"],
}
NEWER_TORCHRUN = pytest.mark.skipif(
    not hasattr(LaunchConfig, "shutdown_timeout"), reason="this PyTorch's torchrun lacks options"
)
# Campaign, cases, failures: printed when all tests have run.
TABLE: list[tuple[str, int, int]] = []


# What each fork would compile, and what torch imports only for its first optimizer.
CODE = compile(SCRIPT.read_bytes(), SCRIPT, "exec")
torch.optim.AdamW(nn.Linear(1, 1).parameters())


# ---- where a child can be stopped


# {seam: (function, what a child does when it is called, file)}. Whoever renames one has one line
# to change.
SEAMS = {
    "any call": ("", "anything, in its main thread"),
    "start": ("main", "nothing is parsed, opened or said yet, and no signal is heard"),
    "train": ("train", "signals are heard; the person's function is called, nothing is open"),
    "data": ("Run.data", "the person's function gives its data; ranks are connected"),
    "load": ("load_checkpoint", "a checkpoint is read; on return its `state` is known"),
    "lock": ("RunDirectory.__init__", "the checkpoint directory is about to be locked"),
    "samples": ("Batches.__getitem__", "the samples of the batch `key` are put together"),
    "loss": ("loss", "a forward pass, --grad-accum of them in each batch; no weight moves"),
    "backward": ("Tensor.backward", "gradients are added up, as often", "_tensor.py"),
    "clip": ("Run.clip_gradients", "a batch's gradients are there, no optimizer has stepped"),
    "Adam": ("Adam.step", "the first optimizer in geometric mode steps", "optim/adam"),
    "Muon": ("BatchedMuon.step", "the second one in geometric mode steps"),
    "AdamW": ("AdamW.step", "the last one in geometric mode, the only one else", "optim/adam"),
    "schedule": ("LambdaLR.step", "a schedule steps; when it is made, too", "lr_scheduler.py"),
    "log": ("Run.log", "the last line of the loop's body"),
    # The loop's body, which comes back, calls nothing that is public.
    "complete": ("Run._complete", "the body has come back; on return the batch is counted"),
    "evaluate": ("evaluate", "a batch of validation data is looked at"),
    "copy": ("to_host", "what is to be saved is copied to the host's memory"),
    # What is public (save_checkpoint) begins after the rows, and ends before the deletion.
    "save": ("RunDirectory._save", "rows are flushed, then a file comes, then old ones go"),
    "write": ("save_checkpoint", "the file of a checkpoint is written"),
    "gather": ("DTensor.full_tensor", "ranks put a tensor of theirs together", "_api.py"),
    "summary": ("Run.summary", "training has ended, and how is about to be said"),
    "end": ("ExitMonitor.__exit__", "all is said; the terminal is about to be given back"),
}


class Moment:
    """The nth time that any thread of a child comes to a seam, or (event="return") has been there.

    where(frame of the function) says which times count. Moments are found with sys.setprofile, so
    the program under test stays as it is.
    """

    def __init__(self, seam: str, nth: int = 1, event: str = "call", where=lambda frame: True):
        self.seam, self.left, self.event, self.where = seam, nth, event, where
        function, _, *file = SEAMS[seam]
        self.kind, _, self.function = function.rpartition(".")
        self.file = file[0] if file else SCRIPT.name

    def has_come(self, frame: types.FrameType, event: str) -> bool:
        if event != self.event or not self._is_there(frame):
            return False
        self.left -= 1
        return self.left == 0

    def _is_there(self, frame: types.FrameType) -> bool:
        if not self.function:
            return threading.current_thread() is threading.main_thread()
        code = frame.f_code
        if code.co_name != self.function or self.file not in code.co_filename:
            return False
        if self.kind not in ("", type(frame.f_locals.get("self")).__name__):
            return False
        return self.where(frame)


AT_EXIT = Moment("any call")  # when all else that a process does at its end is done


def watch(plan: list[tuple[Moment, Callable[[types.FrameType], None]]]) -> None:
    """Does what is planned for each moment, in turn. An exception in it is raised there."""

    def profile(frame, event, arg) -> None:
        if not plan:
            sys.setprofile(None)
        elif plan[0][0].has_come(frame, event):
            plan.pop(0)[1](frame)

    threading.setprofile(profile)
    sys.setprofile(profile)


def saving(name: str) -> Moment:
    """A checkpoint whose name begins like this is about to be written."""
    return Moment("write", where=lambda frame: Path(frame.f_locals["path"]).name.startswith(name))


def frame_asks_to_leave(frame: types.FrameType) -> None:
    """For a method of Run: SIGTERM, and the monitor has heard it before the method goes on."""
    ask_to_leave(frame.f_locals["self"])


def fail(frame) -> None:
    raise RuntimeError("injected")


# ---- forks that become the program


def become(
    command: list,
    program: Callable[[], object] | None = None,
    prepare: Callable[[], object] = dict,
    environment: dict[str, str] | None = None,
    kept=(),
) -> NoReturn:
    """In a fork: leaves nothing of the test process that the script could notice, and is it.

    The command is [python, script, ...] or [python, "-c", source, ...]; a program is called in the
    script's place.
    """
    try:
        # As for a program: what is ignored stays so, and no handler of its parent's is called.
        for signum in signal.valid_signals():
            if callable(signal.getsignal(signum)):
                default = signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
                signal.signal(signum, default)
        gc.freeze()  # no finalizer of a test's object may run here
        gc.enable()  # subprocess has not
        atexit._clear()
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd > 2 and fd not in kept:
                with contextlib.suppress(OSError):  # the listing's own
                    os.close(fd)
        # pytest's write to descriptors that are closed now, and will be a checkpoint's.
        logging.getLogger().handlers.clear()
        faulthandler.enable(sys.__stderr__)
        # PR_SET_PTRACER: strace may attach.
        ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
        # pytest's hides them.
        warnings.showwarning = lambda *args: print(
            warnings.formatwarning(*args[:4]), file=sys.stderr
        )
        warnings.resetwarnings()
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        if environment is not None:
            os.environ.clear()
            os.environ.update(environment)
        tempfile.tempdir = None  # read from the environment again
        argv = [os.fspath(word) for word in command[1:] if word != "-u"]
        source = argv.pop(1) if argv[0] == "-c" else None
        sys.argv = argv
        # A fork of this fork will have its own in their place.
        streams = enumerate((("r", -1), ("w", -1), ("w", 1)))
        files = (open(fd, mode, buffer, closefd=False) for fd, (mode, buffer) in streams)
        sys.stdin, sys.stdout, sys.stderr = files
        # And PyTorch's log handlers write to what was the tests' own output.
        for reference in logging._handlerList:
            if type(handler := reference()) is logging.StreamHandler:
                handler.stream = sys.stderr
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        main.__file__ = argv[0]
        # Importing it would have; here it is imported already.
        atexit.register(multiprocessing.util._exit_function)
        if program is None:
            script = os.path.abspath(argv[0])
            code = CODE
            if script != str(SCRIPT):
                code = compile(source or Path(script).read_bytes(), script, "exec")
            program = functools.partial(exec, code, main.__dict__)
            sys.path.insert(0, os.path.dirname(script))
        prepare()
        program()
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


def forked(args: list, env: dict[str, str] | None = None, start=Popen, **how):
    """subprocess.Popen or run with a fork, in a session of its own, that becomes the program."""
    how |= {"start_new_session": True, "restore_signals": False}
    return start(args, preexec_fn=functools.partial(become, args, environment=env), **how)


class Child:
    """The real script, run as __main__ by a fork of this process, in a session and on a terminal.

    It is a process like any other: only the seconds that importing torch takes are saved. `plan`
    says at which moments it does what; None is to wait for go(). `program` is what a script of
    somebody's own would do: call train_graceful.main.
    """

    def __init__(
        self,
        *args: object,
        plan: Sequence[tuple[Moment, Callable[[types.FrameType], None] | None]] = (),
        program: Callable[[], object] | None = None,
        **environment: str,
    ) -> None:
        self._paused, notify = os.pipe()
        wait, self._go = os.pipe()
        self.exitcode: int | None = None
        self.peak = 0

        def pause(frame) -> None:
            os.write(notify, b"%d\n" % threading.get_native_id())
            os.read(wait, 1)

        def prepare() -> None:
            moments = [(moment, act or pause) for moment, act in plan if moment is not AT_EXIT]
            if len(moments) < len(plan):
                atexit.register(pause, None)
            if moments:
                watch(moments)

        self.pid, terminal = pty.fork()
        if self.pid == 0:
            command = [sys.executable, str(SCRIPT), *map(str, args)]
            become(command, program, prepare, {**os.environ, **environment}, {notify, wait})
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
        """Waits for the end; what was printed since the last match.

        Then the exit code (minus the signal) is in exitcode, the peak memory in KiB in peak.
        """
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
            self.wait()
        if self._go is not None:
            os.close(self._go)
            os.close(self._paused)
            self._go = None
            self.terminal.close()


def ended(child: Child, code: int = 0) -> str:
    """What it printed since the last match; it ended with this exit code."""
    output = child.finish()
    assert child.exitcode == code, output
    return output


# ---- ranks

STEPS = 8
# 5 batches of 8 windows an epoch.
OPTIONS = [
    *["--context", 16, "--layers", 1, "--heads", 2, "--dim", 16, "--experts", 2],
    *["--batch-size", 4, "--grad-accum", 2, "--warmup-steps", 3, "--steps", STEPS],
    *["--log-every", 1, "--eval-every", 4, "--save-every", 3],
]
FROM_TORCHRUN = dict(
    line.split("=")
    for line in (
        "MASTER_ADDR=127.0.0.1 TORCHELASTIC_USE_AGENT_STORE=True TORCHELASTIC_RUN_ID=test "
        "TORCHELASTIC_MAX_RESTARTS=0 TORCHELASTIC_RESTART_COUNT=0 GROUP_WORLD_SIZE=1"
    ).split()
)


def serve_store() -> None:
    """torchrun's part, for a child of its own; it prints its port."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    print("port", store.port, flush=True)
    signal.pause()


def finished(ranks: list) -> tuple[list[str], list[int]]:
    """What each rank has printed since the last match, and its exit code, when all have ended."""
    return [rank.finish() for rank in ranks], [rank.exitcode for rank in ranks]


# ---- torchrun itself


def torchrun(spawn, *words: object, size=2, environment=None, enter=dict, script=None):
    """torchrun, or this project's script for it, as a fork; its workers are forks of it.

    Where enter() leads, in the namespaces of a host say, is where they live.
    """
    environment = environment or {**os.environ, "PWD": os.getcwd()}

    def prepare() -> None:
        enter()
        os.chdir(environment["PWD"])
        subprocess_handler.Popen = forked

    what = [script]
    if script is None:
        what = ["-c", "from torch.distributed.run import main; main()", "--standalone"]
        what.append(f"--nproc-per-node={size}")
    command = [sys.executable, *map(str, [*what, *words])]
    becomes = functools.partial(become, command, prepare=prepare, environment=environment)
    return spawn(command=command, preexec_fn=becomes)


def by_script(spawn, *words: object, enter=dict, cwd=None, **environment: object):
    """scripts/train_torchrun.sh, and then what it starts as forks."""
    command = [ROOT / "scripts" / "train_torchrun.sh", *map(str, words)]
    given = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    how = {"env": {**given, "PYTHON": ROOT / "tests" / "show.sh"}, "cwd": cwd, "stdout": PIPE}
    number, *rest = subprocess.run(command, text=True, check=True, **how).stdout.split("\0")[:-1]
    script, *arguments = rest[: int(number)]
    started = dict(variable.split("=", 1) for variable in rest[int(number) :])
    started["PYTHON"] = sys.executable
    return torchrun(spawn, *arguments, environment=started, enter=enter, script=script)


def fields_of(pid: int | str) -> list[str]:
    """State, parent, group, session and more of a process (Linux); of none a zombie's."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["Z", *"000"]


def alive(pid: int) -> bool:
    """And no zombie that only an absent init would reap."""
    return fields_of(pid)[0] != "Z"


def worker_pids(parent: int) -> list[int]:
    return [int(pid) for pid in open(f"/proc/{parent}/task/{parent}/children").read().split()]


# ---- models of people's own


def program(train, **options):
    """What a script does at its end, for a child of the tests (see Child)."""
    defaults = {"batch_size": 8, "steps": 8, "eval_every": 4, "save_every": 3, "log_every": 1}
    return lambda: t.main(train, **{**defaults, "lr": 1e-2, **options})


def mlp(dropout: float = 0.3) -> nn.Module:
    """With BatchNorm; 10 rows of weights cannot be shared out equally among four.

    No bias comes before it: its gradient would be rounding errors, and Adam's step as long as any.
    """
    layers = nn.Linear(4, 10, bias=False), nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout(dropout)
    return nn.Sequential(*layers, nn.Linear(10, 2))


class Residual(nn.Module):
    """Layers in an nn.ModuleList, and no BatchNorm: any number of ranks computes the same."""

    def __init__(self, width: int = 24, layers: int = 3) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, width), nn.Linear(width, 2)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.last(x)


def classify(make):
    """A train(run) with what scripts have: a schedule, clipping, a best accuracy."""

    def begin(run: t.Run, module: nn.Module):
        rate = run.options.lr
        optimizer = run.keep(optimizer=torch.optim.AdamW(module.parameters(), rate))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, run.total_steps)
        return optimizer, run.keep(scheduler=schedule)

    def body(run: t.Run, module: nn.Module, kept, batch) -> torch.Tensor:
        optimizer, scheduler = kept
        optimizer.zero_grad()
        loss = loss_of(module, batch)
        loss.backward()
        run.clip_gradients(1.0)
        optimizer.step()
        scheduler.step()
        return loss

    def data(run: t.Run) -> None:
        run.data(Rows(43), Rows(13, moved=False))

    return learning(begin, body, data, make, best="max accuracy")


class Halves(nn.Module):
    """As in a GAN, each of its losses leaves parameters without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.halves = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])

    def forward(self, rows: torch.Tensor, number: int) -> torch.Tensor:
        return self.halves[number](rows)


def train_halves(run: t.Run) -> None:
    run.data(Rows(43), Rows(13))
    model, adam = run.model(Halves()), functools.partial(torch.optim.Adam, lr=run.options.lr)
    optimizers = [adam(half.parameters()) for half in run.module.halves]
    run.keep(first=optimizers[0], second=optimizers[1])

    def losses_of(batch, number: int) -> torch.Tensor:
        return F.cross_entropy(model(batch[0], number), batch[1], reduction="none")

    for batch in run.batches(lambda batch: {"loss": losses_of(batch, 1)}):
        for number, optimizer in enumerate(optimizers):
            optimizer.zero_grad()
            loss = losses_of(batch, number).mean()
            loss.backward()
            optimizer.step()
        run.log(loss=loss)


# ---- what is started, and what is looked at


def corpus_of(path: Path, windows: int, context: int) -> Path:
    """Text of which so many windows are training data."""
    text = b"".join(b"%d squared is %d; " % (n, n * n) for n in range(2000))
    path.write_bytes(text[: int(windows * context / 0.95) + 20])
    return path


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    """The script without a terminal, to its end."""
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    how = {"stdin": DEVNULL, "capture_output": True, "text": True, "timeout": 120, **kwargs}
    return forked(command, start=subprocess.run, **how)


def refused(*args) -> str:
    """The message of the UserError that a command line ends with, in this process.

    main makes it a line, and exit code 2.
    """
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


def finish(child) -> str:
    """Waits for the child's end (exit code: exitstatus); what it printed since the last match."""
    child.expect(pexpect.EOF)
    child.wait()
    return child.before


def wait_until(condition, process=None, timeout=60) -> None:
    """Waits for what nothing announces; fails after timeout seconds or when process has ended."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        assert process is None or process.poll() is None, "the process has ended"
        time.sleep(0.02)


def processes_in_session(session: int) -> list[str]:
    """Pids and states of all processes, zombies too, in a session."""
    found = [(path.name, fields_of(path.name)) for path in Path("/proc").glob("[0-9]*")]
    return [f"{pid} {fields[0]}" for pid, fields in found if fields[3] == str(session)]


def saved_path(output: str) -> Path:
    return Path(re.search(r"checkpoint saved: (\S+\.pt)", output)[1])


def final(directory) -> dict:
    return t.load_checkpoint(directory / "final.pt")


def whole_files(directory) -> dict[str, int]:
    """The step of every checkpoint under its final name, each of which passes its check."""
    return {path.name: t.load_checkpoint(path)["step"] for path in directory.rglob("[!.]*.pt")}


def flip_a_weight(path: Path, into: Path, place: int = 2000) -> None:
    """One bit of the largest tensor in a checkpoint; torch.load does not notice."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        tensors = [info for info in archive.infolist() if "/data/" in info.filename]
        record = max(tensors, key=lambda info: info.file_size)
    data[record.header_offset + place] ^= 1
    into.write_bytes(data)
    torch.load(into, weights_only=True)


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
    *("model_state_dict", "optimizer_state_dicts", "scheduler_state_dicts", "state_dicts"),
    *("loop", "step", "best", "evaluation", "data_fingerprint"),
)


def metrics_without_times(directory: Path, name="metrics.csv") -> list[dict]:
    """The rows of metrics.csv, without what no two runs have in common."""
    with open(directory / name) as file:
        rows = list(csv.DictReader(file))
    own = ("samples_per_second", "seconds", "run")
    return [{key: value for key, value in row.items() if key not in own} for row in rows]


def assert_same_state(left: Path, right: Path) -> tuple[dict, dict]:
    """Two directories hold the same end of a run, whatever its rows say: these two."""
    a, b = final(left), final(right)
    assert_same({key: a[key] for key in STATE_KEYS}, {key: b[key] for key in STATE_KEYS})
    return a, b


def assert_same_run(left: Path, right: Path) -> None:
    """Two directories hold the same finished run: all that was kept, and metrics."""
    a, b = assert_same_state(left, right)
    assert a["metrics"]["smooth_loss"] == b["metrics"]["smooth_loss"]
    assert metrics_without_times(left) == metrics_without_times(right)


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


# ---- a run of one's own, stopped at a step and resumed

OWN = {"batch_size": 4, "steps": 12, "eval_every": 5, "save_every": 100, "log_every": 1}
OWN |= {"lr": t.option(0.05, fixed=False), "fails": t.option(-1, fixed=False)}


class Rows(torch.utils.data.Dataset):
    """Rows of two classes with their index, moved at random each time that they are looked at."""

    def __init__(self, count: int = 22, moved: bool = True) -> None:
        self.moved = moved
        self.rows = torch.randn(count, 4, generator=torch.Generator().manual_seed(count))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        row = self.rows[index]
        noise = self.moved * (0.1 * torch.randn(4) + np.random.uniform(0, 0.1))
        return row + noise, (row.sum() > 0).long(), index


def sgd(run: t.Run, module: nn.Module) -> torch.optim.Optimizer:
    return run.keep(optimizer=torch.optim.SGD(module.parameters(), run.options.lr, momentum=0.9))


def loss_of(module: nn.Module, batch) -> torch.Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def update(run: t.Run, module: nn.Module, optimizer, batch) -> torch.Tensor:
    optimizer.zero_grad()
    loss = loss_of(module, batch)
    loss.backward()
    optimizer.step()
    return loss


def losses(run: t.Run, module: nn.Module):
    def evaluate(batch):
        logits = module(batch[0])
        loss = F.cross_entropy(logits, batch[1], reduction="none")
        return {"loss": loss, "minus": -loss, "accuracy": logits.argmax(1) == batch[1]}

    return evaluate


def learning(
    begin=sgd,
    body=update,
    data=lambda run: run.data(Rows(), Rows(7)),
    model=lambda: nn.Linear(4, 2),
    evaluate=losses,
    **how,
):
    """train(run): begin(run, module) keeps what it needs, body(run, module, it, batch) trains."""

    def train(run: t.Run) -> None:
        data(run)
        module = run.model(model())
        kept = begin(run, module)
        for batch in run.batches(evaluate and evaluate(run, module), **how):
            run.log(loss=body(run, module, kept, batch))
            if isinstance(batch, (list, tuple)):
                run.log(index=batch[2].float().mean(), size=len(batch[2]))

    return train


def stopping(train, stop: int | str):
    """train(run) that is asked to leave in the body of this batch, or "start 8", "evaluation 8"."""

    def stopped(run: t.Run) -> None:
        batches, say = run.batches, run.screen.say

        def ask(moment: str) -> None:
            if str(stop) == moment:
                ask_to_leave(run)

        def stopped_say(text: str) -> None:
            say(text)
            if "Training started" in text:
                ask(f"start {run.step}")

        def stopped_batches(evaluate=None, **how):
            def stopped_evaluate(batch):
                ask(f"evaluation {run.step}")
                return evaluate(batch)

            for batch in batches(evaluate and stopped_evaluate, **how):
                ask(str(run.step + 1))
                yield batch

        run.batches, run.screen.say = stopped_batches, stopped_say
        train(run)

    return stopped


def go(train, directory: Path | None, *args, stop=None, code=None, defaults=OWN, **options):
    """The run of one session of train(run), with a stop if one is given (see stopping)."""
    runs = []

    def noted(run: t.Run) -> None:
        runs.append(run)
        (train if stop is None else stopping(train, stop))(run)

    where = () if directory is None else ("--checkpoint-dir", directory)
    ended = session(*where, *args, train=noted, **{**defaults, **options})
    assert ended == (code if code is not None else 0 if stop is None else 143)
    return runs[0] if runs else None


def resume(train, directory: Path, *args, **how) -> t.Run:
    return go(train, directory, "--resume", "latest", *args, **how)


def assert_resumes(train, tmp_path: Path, *stops, before=(), after=(), **options) -> Path:
    """Stopped at each of these and resumed it ends with the bits of the run that was not stopped.

    Where that one lies.
    """
    go(train, tmp_path / "whole", **options)
    for stop in stops or [7]:
        parts = tmp_path / f"stopped {stop}"
        go(train, parts, *before, stop=stop, **options)
        resume(train, parts, *after, **options)
        assert_same_run(tmp_path / "whole", parts)
    return tmp_path / "whole"


def mistake(capfd, train, *args, **how) -> str:
    """The one line on standard error that a session ends with, with exit code 2."""
    capfd.readouterr()
    go(train, *args, code=2, **how)
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def column(directory: Path, name: str, file: str = "metrics.csv") -> list[float]:
    return [float(row[name]) for row in metrics_without_times(directory, file)]
