"""A signal to the whole group costs no batch, and a child is as if there were no monitor."""

import os
import re
import signal
import sys

import helpers as h
import pytest

from train_graceful import EXIT_SIGNALS

LOOP = f"""
import asyncio, multiprocessing, os, signal, subprocess, sys, time
sys.path.insert(0, {str(h.ROOT)!r})
import torch
from train_graceful import ExitMonitor, begin_worker, save_checkpoint

fork = multiprocessing.get_context("fork")
"""


@pytest.fixture
def program(spawn):
    """program(code) runs a person's program in a session of its own."""
    return lambda code: spawn(source=LOOP + code)


def ended(child) -> int:
    """The exit code, once the program has ended."""
    h.finish(child)
    return child.exitstatus


CHILDREN = """
begun = fork.Event()

def patient():
    signal.signal(signal.SIGUSR2, lambda *args: os._exit(7))
    resting()

def resting():
    begun.set()
    # Python hears a signal that comes just before a sleep after it.
    while True:
        time.sleep(0.01)

def started(target):
    begun.clear()
    process = fork.Process(target=target)
    process.start()
    return process

def end(process, signum):
    os.kill(process.pid, signum)
    process.join(10)
    print("@ended", process.exitcode)

with ExitMonitor() as monitor:
    cases = [(patient, signal.SIGUSR2), (resting, signal.SIGHUP), (resting, signal.SIGINT)]
    for target, signum in cases:
        process = started(target)
        begun.wait()
        end(process, signum)
    # Those that have hardly begun.
    for _ in range(20):
        end(started(resting), signal.SIGTERM)
    left = [started(resting), started(resting)]
    print("@ready", monitor.exit_requested)
    while not monitor.exit_requested:
        time.sleep(0.01)
    end(left[0], signal.SIGTERM)
    end(left[1], signal.SIGUSR1)
"""


def test_a_child_that_is_meant_does_what_it_would_without_a_monitor_and_one_that_is_not_lives(
    program,
):
    """Also right after all its group has been asked to leave."""
    child = program(CHILDREN)
    for code in (7, -signal.SIGHUP, 1, *[-signal.SIGTERM] * 20):
        child.expect(f"@ended {code}\r")
        assert code != 1 or "KeyboardInterrupt" in child.before
    child.expect("@ready False")
    os.killpg(child.pid, signal.SIGHUP)
    for code in (-signal.SIGTERM, -signal.SIGUSR1):
        child.expect(f"@ended {code}\r")
    assert ended(child) == 0


EXECUTED = """
SHOW = "status = dict(line.split(':') for line in open('/proc/self/status'));"
SHOW += "masks = (int(status['Sig' + kind], 16) for kind in ('Blk', 'Ign', 'Cgt'));"
# Two signals are the C library's own.
SHOW += "print('@', *(hex(mask & ~0x180000000) for mask in masks))"
WORDS = [sys.executable, "-Sc", SHOW]

def executed():
    subprocess.run(WORDS)
    subprocess.run(WORDS, preexec_fn=lambda: None)
    pid = os.fork()
    if pid == 0:
        os.execv(sys.executable, WORDS)
    os.waitpid(pid, 0)

executed()
with ExitMonitor() as monitor:
    executed()
"""


def test_what_a_child_executes_finds_its_signals_as_without_a_monitor(program):
    """Nothing blocked, ignored or handled that would not be so anyway."""
    child = program(EXECUTED)
    assert ended(child) == 0, child.before
    shown = re.findall(r"@ (\w+) (\w+) (\w+)", child.before)
    assert len(shown) == 6 and len(set(shown)) == 1, shown


DEAF = """
async def taken():
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGALRM, print)
    loop.remove_signal_handler(signal.SIGALRM)

pid = 1
with ExitMonitor() as monitor:
    if CASE == "fork":
        pid = os.fork()
    else:
        asyncio.run(taken())
    if pid:
        print("@waiting")
        while not monitor.exit_requested:
            time.sleep(0.01)
if pid:
    print("@left", monitor.reason)
"""


@pytest.mark.parametrize("case", ["fork", "asyncio"])
def test_what_others_do_with_the_monitor_makes_nobody_deaf(program, case):
    """A forked child that leaves the block; a library that takes the wakeup descriptor."""
    child = program(DEAF.replace("CASE", repr(case)))
    child.expect("@waiting")
    child.send("\x03")
    child.expect("@left signal_SIGINT\r")
    assert ended(child) == 0


WORKERS = f"""
{LOOP}
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 48
    def __getitem__(self, index):
        time.sleep(0.02)
        return torch.ones(4)

def loaded():
    own = {{"multiprocessing_context": CONTEXT, "worker_init_fn": begin_worker}}
    own = own if CONTEXT else {{}}
    return iter(torch.utils.data.DataLoader(Data(), 4, num_workers=2, **own))

if __name__ == "__main__":
    if OLDER:
        batches = loaded()
    with ExitMonitor() as monitor:
        if not OLDER:
            batches = loaded()
        # Both workers have begun.
        next(batches)
        next(batches)
        print("@training", flush=True)
        while not monitor.exit_requested:
            time.sleep(0.01)
        # The children, at work, make these yet.
        print("@more", sum(1 for _ in batches), flush=True)
        save_checkpoint({{"step": 1}}, sys.argv[1])
    sys.exit(monitor.exit_code)
"""


@pytest.mark.parametrize(
    "context, older, signum",
    [
        *((None, False, signum) for signum in EXIT_SIGNALS),
        ("spawn", False, signal.SIGTERM),
        # SIGTERM would end its server.
        ("forkserver", False, signal.SIGINT),
        ("fork", True, signal.SIGTERM),
    ],
)
def test_a_signal_to_the_group_costs_no_batch_of_a_loop_with_workers(
    spawn, tmp_path, context, older, signum
):
    """A plain loader's; with begin_worker, those not forked or older than the monitor.

    All of it is started for real, and none is left.
    """
    script = tmp_path / "mine.py"
    script.write_text(f"CONTEXT, OLDER = {context!r}, {older}" + WORKERS)
    child = spawn(command=[sys.executable, str(script), str(tmp_path / "mine.pt")])
    child.expect("@training")
    os.killpg(child.pid, signum)
    child.expect("@more 10")
    text = h.finish(child)
    assert child.exitstatus == 128 + signum, text
    assert "Traceback" not in text and "Second" not in text
    assert (tmp_path / "mine.pt").exists()
    h.wait_until(lambda: not h.processes_in_session(child.pid))
