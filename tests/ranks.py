"""What tests of many processes share: a group of ranks without torchrun, models of one's own for them, and torchrun itself."""

import atexit
import functools
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
from campaign import Forked, set_environment, warm
from conftest import ROOT, metrics_without_times
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

import train_graceful as t

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
        """Starts so many ranks; plans are {rank: its plan}, the rest is for all (see campaign.Child)."""
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
        run.main()
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
        command=[sys.executable, str(script or run.__file__), *map(str, words)],
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
