"""What the fault campaigns share: the script in forks of this process, stopped at chosen moments, and a count of cases."""

import atexit
import contextlib
import ctypes
import faulthandler
import fcntl
import functools
import gc
import multiprocessing.util
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import traceback
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import pexpect
import ptyprocess
import pytest
import torch
from conftest import IGNORED, SCRIPT, as_in_a_shell
from pexpect.fdpexpect import fdspawn

TABLE: list[tuple[str, int, int]] = []  # campaign, cases, failures: conftest prints it at the end


class Campaign:
    """Counts cases and collects failures, so that one bad case does not hide the next; as a context manager it reports."""

    def __init__(self, what: str) -> None:
        self.what, self.cases, self.failures = what, 0, []

    def __enter__(self):
        return self

    def case(self, name: object, body: Callable, *args) -> None:
        self.cases += 1
        try:
            body(*args)
        except Exception:
            self.failures.append(f"{name}: {traceback.format_exc()}")

    def __exit__(self, kind, *rest) -> None:
        if kind is None:
            TABLE.append((self.what, self.cases, len(self.failures)))
            assert self.cases and not self.failures, "\n".join(self.failures[:5])


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


def ask_to_leave(frame: types.FrameType) -> None:
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
    import train_graceful as t

    return {path.name: t.load_checkpoint(path)["step"] for path in directory.rglob("[!.]*.pt")}


needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None, reason="strace is missing: apt install strace"
)


def trace(thread: int, log, *options: str) -> subprocess.Popen:
    """strace on one thread; returns when it has taken hold."""
    strace = subprocess.Popen(
        ["strace", "-p", str(thread), "-o", str(log), "-e", "trace=%file,%desc", *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "attached" in strace.stderr.readline()
    return strace
