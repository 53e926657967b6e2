"""Forks of the test process run the tests, a file at a time; the process itself reports them.

One more than there are cores: a test often waits, for a terminal, a disk, another machine or Slurm.
"""

import contextlib
import itertools
import multiprocessing
import os
import sys
from multiprocessing.connection import Connection, wait

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
    from campaign import warm

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
    from campaign import TABLE

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
    from campaign import TABLE
    from conftest import as_in_a_shell

    from train_graceful import EXIT_SIGNALS

    # So that a report to a parent that was killed fails, and this ends too.
    for receive, send in pipes:
        receive.close()
        if send is not reports:
            send.close()
    as_in_a_shell(EXIT_SIGNALS)  # what is tested here is no child of multiprocessing's
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
