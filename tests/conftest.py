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

import helpers
import torch

import train_graceful as t


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    line = "{} squared is {}; the quick brown fox jumps over it.\n"
    path.write_text("".join(line.format(n, n * n) for n in range(400)))
    return path


@pytest.fixture(scope="session")
def forty_windows(tmp_path_factory) -> Path:
    """44 training windows of --context 16: five batches of eight, and some that fill none."""
    return helpers.corpus_of(
        tmp_path_factory.mktemp("forty") / "corpus.txt", windows=43, context=16
    )


@pytest.fixture
def options(corpus, tmp_path) -> list[str]:
    """Options of a small run with its own checkpoint directory, tmp_path / "ck"."""
    return ["--data", str(corpus), "--checkpoint-dir", str(tmp_path / "ck"), *helpers.TINY]


@pytest.fixture(params=["short", pytest.param("whole", marks=pytest.mark.campaign)])
def whole(request) -> bool:
    """A campaign's test runs twice: a short version always, the whole of it with -m campaign."""
    return request.param == "whole"


@pytest.fixture
def float32_muon(monkeypatch):
    """In bfloat16 Muon would make a rounding error of a gradient one of a hundredth."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


@pytest.fixture
def fork():
    """fork(*args, plan=...) is a helpers.Child that is killed and reaped after the test."""
    children = []

    def start(*args, **kwargs) -> helpers.Child:
        children[:] = [child for child in children if child.exitcode is None]
        children.append(helpers.Child(*args, **kwargs))
        return children[-1]

    yield start
    for child in children:
        child.close()


@pytest.fixture
def group(fork):
    """group(size, *args, plans={rank: plan}) starts so many ranks of a run; see helpers.Group."""
    ranks = helpers.Group(fork)
    yield ranks
    ranks.close()


@pytest.fixture
def ended(group, tmp_path):
    """ended("ck", 2, *options): so many ranks train in tmp_path / "ck"; what each has printed."""

    def ended(folder: str, size: int, *options: object, code: int = 0, **settings) -> list[str]:
        ranks = group(size, *options, "--checkpoint-dir", tmp_path / folder, **settings)
        texts, codes = helpers.finished(ranks)
        assert codes == [code] * size, texts
        return texts

    return ended


@pytest.fixture
def spawn():
    """spawn(*args) is pexpect's child on the real script, killed and reaped after the test.

    command=[...] is any program. With further arguments of pexpect.spawn, an environment say, it is
    started, else a fork becomes it, or the `program` given, or a script of somebody's own, or its
    source, in the folder cwd.
    """
    children = []

    def start(*args, command=None, script=helpers.SCRIPT, source=None, cwd=None, **kwargs):
        what = ["-c", source] if source else [str(script)]
        argv = command or [sys.executable, *what, *map(str, args)]
        if not command and not kwargs:
            words, kwargs["program"], kwargs["prepare"] = helpers.program_of(argv, cwd)
            argv = [sys.executable, *words]
        elif "program" not in kwargs:
            kwargs["cwd"] = cwd
        kind = helpers.Fork if "program" in kwargs else pexpect.spawn
        kwargs |= {"encoding": "utf-8", "timeout": 60, "dimensions": (24, 120)}
        children.append(kind(argv[0], argv[1:], **kwargs))
        return children[-1]

    yield start
    for child in children:
        child.close(force=True)


# ---- several tests at a time

# The files that take long come first, then those with the most tests.
LONG = (
    "hosts slurm sharded many_processes resume wrappers terminal "
    "faults_stops faults_saves faults_files"
).split()


def pytest_addoption(parser) -> None:
    # A test often waits, for a terminal, a disk or another machine.
    text = "so many processes run the tests (default: one more than cores)"
    parser.addoption("--jobs", type=int, default=os.cpu_count() + 1, help=text)


def pytest_runtestloop(session) -> bool | None:
    option, files = session.config.option, {}
    for item in session.items:
        files.setdefault(item.path, []).append(item)
    few = min(option.jobs, len(files)) < 2
    if few or option.collectonly or option.usepdb or session.testsfailed:
        return None
    session.config._tmp_path_factory.getbasetemp()  # one for all, made once
    # Whoever is free reads the number of the next file.
    order = sorted(files.values(), key=lambda items: (place_of(items[0].path.stem), -len(items)))
    next_file, queue = os.pipe()
    os.write(queue, bytes(range(len(order))))
    os.close(queue)
    # What each of them would import and compile for its forks.
    helpers.warm()
    workers, pipes = [], []
    for _ in range(option.jobs):
        reports, send = multiprocessing.Pipe(duplex=False)
        pipes.append(reports)
        # Not daemons, which may have no children.
        context, words = multiprocessing.get_context("fork"), (session, order, next_file, pipes)
        workers.append(context.Process(target=work, args=(*words, send)))
        workers[-1].start()
        send.close()
    try:
        report_all(session, pipes)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    return True


def place_of(file: str) -> int:
    name = file.removeprefix("test_")
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
                helpers.TABLE.extend(data)
                running.pop(reports, None)
            else:
                report = hook.pytest_report_from_serializable(config=config, data=data)
                hook.pytest_runtest_logreport(report=report)


class Sender:
    """In a worker, in the place of the reporter on the terminal."""

    def __init__(self, config, reports: Connection) -> None:
        self.config, self.reports = config, reports

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.reports.send(("start", nodeid))

    def pytest_runtest_logreport(self, report) -> None:
        to_serializable = self.config.hook.pytest_report_to_serializable
        self.reports.send(("report", to_serializable(config=self.config, report=report)))


def work(session, order: list[list], next_file: int, pipes: list, reports: Connection) -> None:
    # So that a report to a parent that was killed fails, and this ends too.
    for pipe in pipes:
        pipe.close()
    helpers.as_in_a_shell(t.EXIT_SIGNALS)  # what is tested here is no child of multiprocessing's
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
    reports.send(("table", helpers.TABLE))
    reports.close()
    capture.stop_global_capturing()
    sys.stdout.flush()
    os._exit(0)
