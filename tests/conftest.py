"""A tiny corpus, tiny options, and the real script in a pseudo-terminal that is always reaped."""

import csv
import os
import re
import signal
import subprocess
import sys
import traceback
import zipfile
from pathlib import Path

import pexpect
import pytest

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch is imported: a second thread only waits for work in models this small
)
os.environ["TORCH_CPP_LOG_LEVEL"] = os.environ["LOGLEVEL"] = (
    "ERROR"  # as scripts/train_torchrun.sh sets them
)

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

pytest_plugins = ["jobs"]

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_graceful.py"
sys.path.insert(0, str(ROOT))

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


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(
        "".join(f"{n} squared is {n * n}; the quick brown fox jumps over it.\n" for n in range(400))
    )
    return path


@pytest.fixture
def options(corpus, tmp_path) -> list[str]:
    """Options of a small run with its own checkpoint directory, tmp_path / "ck"."""
    return ["--data", str(corpus), "--checkpoint-dir", str(tmp_path / "ck"), *TINY]


@pytest.fixture(params=["short", pytest.param("whole", marks=pytest.mark.campaign)])
def whole(request) -> bool:
    """A campaign's test runs twice: a short version always, the whole of it with -m campaign."""
    return request.param == "whole"


@pytest.fixture
def fork():
    """fork(*args, plan=...) is a campaign.Child that is killed and reaped after the test."""
    from campaign import Child

    children = []

    def start(*args, **kwargs) -> Child:
        children[:] = [child for child in children if child.exitcode is None]
        children.append(Child(*args, **kwargs))
        return children[-1]

    yield start
    for child in children:
        child.close()


@pytest.fixture
def group(fork):
    """group(size, *args, plans={rank: plan}) starts so many ranks of a run; see ranks.Group."""
    from ranks import Group

    ranks = Group(fork)
    yield ranks
    ranks.close()


@pytest.fixture
def hosts(tmp_path, spawn):
    """hosts[0] and so on: machines of their own; see hosts.Hosts."""
    from hosts import Hosts

    hosts = Hosts(tmp_path, spawn)
    yield hosts
    hosts.close()


@pytest.fixture(scope="session")
def forty_windows(tmp_path_factory) -> Path:
    """A corpus with 44 training windows of --context 16: five batches of eight, and some that fill none."""
    text = b"".join(b"%d squared is %d; " % (n, n * n) for n in range(2000))
    path = tmp_path_factory.mktemp("forty") / "corpus.txt"
    path.write_bytes(text[: int(43 * 16 / 0.95) + 20])
    return path


@pytest.fixture
def float32_muon(monkeypatch):
    """In bfloat16 Muon would make a rounding error of a gradient one of a hundredth."""
    import torch

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


def pytest_terminal_summary(terminalreporter) -> None:
    """What the campaigns of this run found, as the table that README shows."""
    from campaign import TABLE

    if TABLE:
        width = max(len(what) for what, _, _ in TABLE)
        terminalreporter.write_line(
            f"\n| {'campaign'.ljust(width)} | cases | failures |\n|{'-' * (width + 2)}|------:|---------:|"
        )
        for what, cases, failures in TABLE:
            terminalreporter.write_line(f"| {what.ljust(width)} | {cases:5,} | {failures:8} |")


@pytest.fixture
def spawn():
    """spawn(*args) runs the real script in a pseudo-terminal, command=[...] any program; it is killed and reaped after the test.

    With further arguments of pexpect.spawn, an environment say, it is started, else a fork becomes it, or the `program` given,
    or a script of somebody's own, or its source, in the folder cwd.
    """
    from campaign import Fork, program_of

    children = []

    def start(*args, command=None, script=SCRIPT, source=None, cwd=None, **kwargs):
        argv = command or [
            sys.executable,
            *(["-c", source] if source else [str(script)]),
            *map(str, args),
        ]
        if not command and not kwargs:
            words, kwargs["program"], kwargs["prepare"] = program_of(argv, cwd)
            argv = [sys.executable, *words]
        elif "program" not in kwargs:
            kwargs["cwd"] = cwd
        kind = Fork if "program" in kwargs else pexpect.spawn
        child = kind(
            argv[0], argv[1:], encoding="utf-8", timeout=60, dimensions=(24, 120), **kwargs
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.close(force=True)


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
    from campaign import forked

    kwargs.setdefault("stdin", subprocess.DEVNULL)
    return forked(
        [sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True, **kwargs
    )


def refused(*args) -> str:
    """The message of the UserError that a command line ends with, in this process (main makes it a line and exit code 2)."""
    import train_graceful as t

    with pytest.raises(t.UserError) as error:
        t.trained(t.train, t.declared(t.OPTIONS), [*map(str, args), "--no-keyboard"])
    assert "\n" not in str(error.value)
    return str(error.value)


def session(*args, train=None, **options) -> int:
    """One session of the program in this process, of the built-in one or of train(run).

    Returns its exit code, and says what went wrong on standard error, as a process of its own does.
    """
    import train_graceful as t

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
    import torch

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
    import train_graceful as t

    a, b = t.load_checkpoint(left / "final.pt"), t.load_checkpoint(right / "final.pt")
    assert_same({key: a[key] for key in STATE_KEYS}, {key: b[key] for key in STATE_KEYS})
    assert a["metrics"]["smooth_loss"] == b["metrics"]["smooth_loss"]
    assert metrics_without_times(left) == metrics_without_times(right)


def flip_a_weight(path: Path, into: Path) -> None:
    """One bit of the largest tensor in a checkpoint; torch.load does not notice."""
    import torch

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
    import time

    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        assert process is None or process.poll() is None, "the process has ended"
        time.sleep(0.02)
