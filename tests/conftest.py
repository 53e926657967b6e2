"""Fixtures, and the plugin that runs the tests in forks of the test process, a file at a time."""

import contextlib
import itertools
import multiprocessing
import os
import sys
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pexpect
import pytest

# Before torch is imported: a second thread only waits for work in models this small.
os.environ["OMP_NUM_THREADS"] = "1"
# As scripts/train_torchrun.sh sets them.
os.environ["TORCH_CPP_LOG_LEVEL"] = os.environ["LOGLEVEL"] = "ERROR"

import torch
from helpers import (
    SCRIPT,
    TABLE,
    TINY,
    Child,
    Fork,
    Group,
    as_in_a_shell,
    program_of,
    warm,
)

import train_graceful as t


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
    """fork(*args, plan=...) is a Child that is killed and reaped after the test."""
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
    """group(size, *args, plans={rank: plan}) starts so many ranks of a run; see Group."""
    ranks = Group(fork)
    yield ranks
    ranks.close()


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
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


@pytest.fixture
def spawn():
    """spawn(*args) runs the real script in a pseudo-terminal, command=[...] any program; it is killed and reaped after the test.

    With further arguments of pexpect.spawn, an environment say, it is started, else a fork becomes it, or the `program` given,
    or a script of somebody's own, or its source, in the folder cwd.
    """
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


# ---- several tests at a time

# One more than there are cores: a test often waits, for a terminal, a disk or another machine.
LONG = [
    "test_hosts",
    "test_slurm",
    "test_sharded",
    "test_many_processes",
    "test_resume",
    "test_wrappers",
    "test_terminal",
]
LONG += ["test_faults_stops", "test_faults_saves", "test_faults_files"]


def pytest_addoption(parser) -> None:
    default = os.cpu_count() + 1
    parser.addoption(
        "--jobs",
        type=int,
        default=default,
        help="so many processes run the tests (default: one more than cores)",
    )


def pytest_runtestloop(session) -> bool | None:
    config, files = session.config, {}
    for item in session.items:
        files.setdefault(item.path, []).append(item)
    if (
        min(config.option.jobs, len(files)) < 2
        or config.option.collectonly
        or config.option.usepdb
        or session.testsfailed
    ):
        return None
    config._tmp_path_factory.getbasetemp()  # one for all, made once
    # Whoever is free reads the number of the next file; first come those that take long, then those with the most tests.
    order = [
        files[file]
        for file in sorted(files, key=lambda file: (place_of(file.stem), -len(files[file])))
    ]
    next_file, queue = os.pipe()
    os.write(queue, bytes(range(len(order))))
    os.close(queue)
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(config.option.jobs)]
    # What each of them would import and compile for its forks.
    warm()
    # Not daemons, which may have no children.
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=work, args=(session, order, next_file, pipes, send))
        for _, send in pipes
    ]
    for worker in workers:
        worker.start()
    for _, send in pipes:
        send.close()
    try:
        report_all(session, [reports for reports, _ in pipes])
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    return True


def place_of(name: str) -> int:
    return LONG.index(name) if name in LONG else len(LONG)


def report_all(session, left: list[Connection]) -> None:
    hook, config, running = session.config.hook, session.config, {}
    while left and not session.shouldfail:
        for reports in wait(left):
            try:
                kind, data = reports.recv()
            except EOFError:
                left.remove(reports)
                if reports in running:
                    session.shouldfail = f"the process that ran {running[reports]} has died"
                continue
            if kind == "start":
                running[reports] = data
            elif kind == "table":
                TABLE.extend(data)
                running.pop(reports, None)
            else:
                hook.pytest_runtest_logreport(
                    report=hook.pytest_report_from_serializable(config=config, data=data)
                )


class Sender:
    """In a worker, in the place of the reporter on the terminal."""

    def __init__(self, config, reports: Connection) -> None:
        self.config, self.reports = config, reports

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.reports.send(("start", nodeid))

    def pytest_runtest_logreport(self, report) -> None:
        self.reports.send(
            (
                "report",
                self.config.hook.pytest_report_to_serializable(config=self.config, report=report),
            )
        )


def work(
    session,
    order: list[list],
    next_file: int,
    pipes: list[tuple[Connection, Connection]],
    reports: Connection,
) -> None:
    # So that a report to a parent that was killed fails, and this ends too.
    for receive, send in pipes:
        receive.close()
        if send is not reports:
            send.close()
    as_in_a_shell(t.EXIT_SIGNALS)  # what is tested here is no child of multiprocessing's
    config, plugins = session.config, session.config.pluginmanager
    plugins.unregister(name="terminalreporter")
    plugins.register(Sender(config, reports))
    # The files that output is caught in are the parent's.
    capture = plugins.getplugin("capturemanager")
    capture.stop_global_capturing()
    capture.start_global_capturing()

    def items():
        while number := os.read(next_file, 1):
            yield from order[number[0]]
        # Behind the last one, fixtures are torn down.
        yield None

    with contextlib.suppress(KeyboardInterrupt):
        for item, following in itertools.pairwise(items()):
            config.hook.pytest_runtest_protocol(item=item, nextitem=following)
    reports.send(("table", TABLE))
    reports.close()
    capture.stop_global_capturing()
    sys.stdout.flush()
    os._exit(0)
