"""Fixtures, and the plugin that runs the tests in forks of the test process, a file at a time."""

import ctypes
import functools
import itertools
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pexpect
import pytest

# Before torch is imported: a second thread only waits for work in models this small.
os.environ["OMP_NUM_THREADS"] = "1"
# What PyTorch logs in passing is in nobody's way.
os.environ["TORCH_CPP_LOG_LEVEL"] = os.environ["LOGLEVEL"] = "ERROR"
# What the scripts take from there.
for name in ("SCRIPT", "LOG", "NNODES", "RENDEZVOUS", "PATIENCE"):
    os.environ.pop(name, None)

import helpers as h
import torch


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return h.corpus_of(tmp_path_factory.mktemp("corpus") / "corpus.txt", 1500, context=16)


@pytest.fixture(scope="session")
def forty_windows(tmp_path_factory) -> Path:
    """44 training windows of --context 16: five batches of eight, and some that fill none."""
    return h.corpus_of(tmp_path_factory.mktemp("forty") / "corpus.txt", windows=43, context=16)


@pytest.fixture
def options(corpus, tmp_path) -> list[str]:
    """Options of a small run with its own checkpoint directory, tmp_path / "ck"."""
    return ["--data", str(corpus), "--checkpoint-dir", str(tmp_path / "ck"), *h.TINY]


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
    """fork(*args, plan=...) is a h.Child that is killed and reaped after the test."""
    children = []

    def start(*args, **kwargs) -> h.Child:
        children[:] = [child for child in children if child.exitcode is None]
        children.append(h.Child(*args, **kwargs))
        return children[-1]

    yield start
    for child in children:
        child.close()


@pytest.fixture
def group(fork):
    """group(size, *options, plans={rank: plan}) starts so many ranks, each on its own terminal.

    They are forks of this process, as what stands for torchrun is; the rest is for all (see Child).
    """

    def start(size: int, *options: object, plans=None, **settings) -> list[h.Child]:
        if "--shard" in options and not hasattr(torch.cpu.Stream, "record_event"):
            pytest.skip("this PyTorch shards on no CPU")
        store, ranks = fork(program=h.serve_store), []
        store.terminal.expect(r"port (\d+)\r")
        settings |= {**h.FROM_TORCHRUN, "MASTER_PORT": store.terminal.match[1]}
        settings |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(size))
        for rank in range(size):
            settings |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            ranks.append(fork(*options, plan=(plans or {}).get(rank, ()), **settings))
        return ranks

    return start


@pytest.fixture
def ended(group, tmp_path):
    """ended("ck", 2, *options): so many ranks train in tmp_path / "ck"; what each has printed."""

    def ended(folder: str, size: int, *options: object, code: int = 0, **settings) -> list[str]:
        ranks = group(size, *options, "--checkpoint-dir", tmp_path / folder, **settings)
        texts, codes = h.finished(ranks)
        assert codes == [code] * size, texts
        return texts

    return ended


@pytest.fixture
def spawn():
    """spawn(*args) is pexpect's child on the real script, killed and reaped after the test.

    It is a fork, of a script of somebody's own or its source too; but with a command=[...] or
    further arguments of pexpect.spawn, an environment say, it is started.
    """
    children = []

    def start(*args, command=None, script=h.SCRIPT, source=None, cwd=None, **kwargs):
        what = ["-c", source] if source else [str(script)]
        argv = command or [sys.executable, *what, *map(str, args)]
        if not command and not kwargs:
            kwargs["preexec_fn"] = functools.partial(h.become, argv)
        kwargs |= {"encoding": "utf-8", "timeout": 60, "dimensions": (24, 120), "cwd": cwd}
        children.append(pexpect.spawn(argv[0], argv[1:], **kwargs))
        return children[-1]

    yield start
    for child in children:
        child.close(force=True)


def pytest_terminal_summary(terminalreporter) -> None:
    """What the campaigns have found, as the table that tests/README.md shows."""
    if h.TABLE:
        width = max(len(what) for what, _, _ in h.TABLE)
        terminalreporter.write_line(f"\n| {'campaign'.ljust(width)} | cases | failures |")
        terminalreporter.write_line(f"|{'-' * (width + 2)}|------:|---------:|")
        for what, cases, failures in h.TABLE:
            terminalreporter.write_line(f"| {what.ljust(width)} | {cases:5,} | {failures:8} |")


# ---- several tests at a time

# The files that take long come first, then those with the most tests.
LONG = "hosts slurm sharded many_processes resume wrappers faults_stops faults_saves".split()
# The tests of each file; the reports that a worker has of one.
ORDER: list[list] = []
REPORTS: list = []


def pytest_addoption(parser) -> None:
    # A test often waits, for a terminal, a disk or another machine.
    text = "so many processes run the tests (default: one more than cores)"
    parser.addoption("--jobs", type=int, default=os.cpu_count() + 1, help=text)


def pytest_runtestloop(session) -> bool | None:
    option, files, config = session.config.option, {}, session.config
    for item in session.items:
        files.setdefault(item.path, []).append(item)
    few = min(option.jobs, len(files)) < 2
    if few or option.collectonly or option.usepdb or session.testsfailed:
        return None
    config._tmp_path_factory.getbasetemp()  # one for all, made once
    ORDER[:] = sorted(files.values(), key=lambda one: (one[0].path.stem[5:] not in LONG, -len(one)))
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(option.jobs, fork, begin, [config]) as pool:
        try:
            for run in as_completed([pool.submit(work, number) for number in range(len(ORDER))]):
                reports, table = run.result()
                h.TABLE.extend(table)
                for report in reports:
                    config.hook.pytest_runtest_logreport(report=report)
                if session.shouldfail:
                    break
        except BrokenProcessPool:
            session.shouldfail = "a process that ran tests has died"
        finally:
            for worker in multiprocessing.active_children():
                worker.kill()
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    return True


class Reports:
    """In a worker, in the place of the reporter on the terminal."""

    def pytest_runtest_logreport(self, report) -> None:
        REPORTS.append(report)


def begin(config) -> None:
    """A worker; it ends with its parent, however that does (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    plugins = config.pluginmanager
    plugins.unregister(name="terminalreporter")
    plugins.register(Reports())
    # The files that output is caught in are the parent's.
    capture = plugins.getplugin("capturemanager")
    capture.stop_global_capturing()
    capture.start_global_capturing()


def work(number: int) -> tuple[list, list]:
    """Runs the tests of a file; their reports, and what campaigns have found."""
    REPORTS.clear()
    h.TABLE.clear()
    for item, following in itertools.zip_longest(ORDER[number], ORDER[number][1:]):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
    return REPORTS, h.TABLE
