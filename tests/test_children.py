"""A signal to the whole group costs no batch, and a child is as if there were no monitor."""

import os
import re
import signal
import sys
from pathlib import Path

import pytest
from helpers import ROOT, finish, processes_in_session, wait_until

LOOP = f"""
import asyncio, multiprocessing, os, pty, signal, subprocess, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
import torch
from train_graceful import ExitMonitor, begin_worker, save_checkpoint

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 10**6
    def __getitem__(self, index):
        time.sleep(0.001)
        return torch.ones(4)

fork = multiprocessing.get_context("fork")
"""


@pytest.fixture
def program(spawn):
    """program(code) runs a person's program in a fork, in a session on a terminal of its own."""
    return lambda code, *words: spawn(*words, source=LOOP + code)


def ended(child) -> int:
    """The exit code, once the program has ended."""
    finish(child)
    return child.exitstatus


CHILD = """
def ready():
    print("@ready", os.getpid(), flush=True)
    time.sleep(1000)

with ExitMonitor() as monitor:
    process = fork.Process(target=ready)
    process.start()
    while not monitor.exit_requested:
        time.sleep(0.01)
    print("@heard", monitor.reason)
    HOW
    process.join(10)
    print("@child", process.exitcode)
"""


@pytest.mark.parametrize(
    "how, asked, group, code",
    [
        ("process.terminate()", signal.SIGHUP, True, -15),
        ("process.terminate()", signal.SIGHUP, False, -15),
        ("process.kill()", signal.SIGHUP, True, -9),
        ("os.kill(process.pid, signal.SIGUSR1)", signal.SIGHUP, True, -10),
        ("os.kill(process.pid, signal.SIGUSR1)", signal.SIGHUP, False, -10),
        # As without a monitor: of a SIGTERM nobody can tell whether it is terminate().
        ("", signal.SIGTERM, True, -15),
    ],
)
def test_a_child_that_is_meant_ends_and_one_that_is_not_lives(program, how, asked, group, code):
    """Also right after the parent has been asked to leave, alone or with all its group."""
    child = program(CHILD.replace("HOW", how))
    child.expect("@ready ([0-9]+)")
    worker = int(child.match[1])
    (os.killpg if group else os.kill)(child.pid, asked)
    child.expect(f"@heard signal_{asked.name}")
    child.expect(f"@child {code}\r")
    assert ended(child) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_a_child_that_alone_is_signalled_does_what_it_would_without_a_monitor(program):
    """Also where it has hardly begun."""
    child = program("""
begun = fork.Event()

def patient():
    signal.signal(signal.SIGUSR2, lambda *args: (print("@its own", flush=True), os._exit(7)))
    resting()

def resting():
    begun.set()
    # Python hears a signal that comes just before a sleep after it.
    while True:
        time.sleep(0.01)

with ExitMonitor() as monitor:
    cases = [(patient, signal.SIGUSR2), (resting, signal.SIGHUP), (resting, signal.SIGINT)]
    cases += [(resting, signal.SIGTERM)] * 20
    for number, (target, signum) in enumerate(cases):
        begun.clear()
        process = fork.Process(target=target)
        process.start()
        if number < 3:
            begun.wait()
        os.kill(process.pid, signum)
        process.join(10)
        print(f"@ended {process.exitcode}")
    print("@requested", monitor.exit_requested)
""")
    child.expect("@its own")
    for code in (7, -signal.SIGHUP, 1, *[-signal.SIGTERM] * 20):
        child.expect(f"@ended {code}\r")
        assert code != 1 or "KeyboardInterrupt" in child.before
    child.expect("@requested False")
    assert ended(child) == 0


EXECUTED = """
SHOW = "status = dict(line.split(':') for line in open('/proc/self/status'));"
SHOW += "print('@', *(status['Sig' + kind].strip() for kind in ('Blk', 'Ign', 'Cgt')))"
WORDS = [sys.executable, "-Sc", SHOW]

def executed():
    subprocess.run(WORDS)
    subprocess.run(WORDS, preexec_fn=lambda: None)
    pid = os.fork()
    if pid == 0:
        os.execv(sys.executable, WORDS)
    os.waitpid(pid, 0)
    pty.spawn(WORDS)

executed()
with ExitMonitor() as monitor:
    executed()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_what_a_child_executes_finds_its_signals_as_without_a_monitor(program):
    """Nothing blocked, ignored or handled that would not be so anyway."""
    child = program(EXECUTED)
    assert ended(child) == 0, child.before
    shown = re.findall(r"@ (\w+) (\w+) (\w+)", child.before)
    assert len(shown) == 8 and len(set(shown)) == 1, shown


@pytest.mark.parametrize("number", range(5))
def test_a_group_signal_at_any_moment_of_starting_children_is_heard_once(program, number):
    """Children that come and go all the time, and one Ctrl-C.

    One thread forks, the others only execute: a fork of Python with several threads may inherit a
    lock that nobody opens.
    """
    child = program("""
def execute():
    while not monitor.exit_requested:
        subprocess.run(["true"])

with ExitMonitor() as monitor:
    threads = [threading.Thread(target=execute) for _ in range(3)]
    for thread in threads:
        thread.start()
    print("@starting")
    while not monitor.exit_requested:
        process = fork.Process(target=int)
        process.start()
        process.join()
    for thread in threads:
        thread.join()
    print("@heard", monitor.reason)
sys.exit(monitor.exit_code)
""")
    child.expect("@starting")
    os.killpg(child.pid, signal.SIGINT)
    child.expect("@heard signal_SIGINT")
    assert ended(child) == 130, child.before


DEAF = """
async def taken():
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGALRM, print)
    if CASE == "inside":
        print("@waiting")
        while not monitor.exit_requested:
            await asyncio.sleep(0.01)
    loop.remove_signal_handler(signal.SIGALRM)

pid = 1
with ExitMonitor() as monitor:
    if CASE == "fork":
        pid = os.fork()
    elif CASE:
        asyncio.run(taken())
        asyncio.run(taken())
    if pid:
        print("@waiting")
        while not monitor.exit_requested:
            time.sleep(0.01)
if pid:
    print("@left", monitor.reason)
"""


@pytest.mark.parametrize("case", ["fork", "inside", "behind"])
def test_what_others_do_with_the_monitor_makes_nobody_deaf(program, case):
    """A forked child that leaves the block; a library that takes the wakeup descriptor."""
    child = program(DEAF.replace("CASE", repr(case)))
    child.expect("@waiting")
    child.send("\x03")
    child.expect("@left signal_SIGINT\r")
    assert ended(child) == 0


OTHER_CHILDREN = f"""
{LOOP}

def slow(number):
    time.sleep(0.02)
    return number

def numbers():
    number = 0
    while not over:
        yield number
        number += 1

over = False

def loaded(context):
    own = {{"multiprocessing_context": context, "worker_init_fn": begin_worker}}
    own = {{}} if context == "plain" else own
    loader = torch.utils.data.DataLoader(Data(), 4, sampler=numbers(), num_workers=2, **own)
    return iter(loader)

if __name__ == "__main__":
    if HOW == "older workers":
        batches = loaded("fork")
    with ExitMonitor() as monitor:
        if HOW == "pool":
            pool = fork.Pool(2)
            batches = pool.imap(slow, range(10**6))
        elif HOW != "older workers":
            batches = loaded(HOW)
        for step, batch in enumerate(batches):
            if step == 10:
                print("@training", flush=True)
            if monitor.exit_requested:
                break
        # These come from the children too.
        print("@more", sum(1 for _ in zip(range(20), batches)), flush=True)
        save_checkpoint({{"step": step}}, sys.argv[1])
    # As at the end of: for batch in loader. Spawned workers may abort when they are ended at work.
    over = True
    if HOW != "pool":
        for batch in batches:
            pass
    del batches
    if HOW == "pool":
        pool.terminate()
        pool.join()
    sys.exit(monitor.exit_code)
"""


ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
ALL += [signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]
OTHERS = [("spawn", signal.SIGTERM), ("forkserver", signal.SIGINT)]
OTHERS += [("older workers", signal.SIGTERM), ("pool", signal.SIGINT)]
MORE = [("spawn", signal.SIGINT), ("older workers", signal.SIGINT)]


@pytest.mark.parametrize(
    "how, signum",
    [
        *(("plain", signum) for signum in ALL),
        *OTHERS,
        *(pytest.param(*case, marks=pytest.mark.campaign) for case in MORE),
    ],
)
def test_a_signal_to_the_group_costs_no_batch_of_a_loop_with_workers(spawn, tmp_path, how, signum):
    """A loader's; with begin_worker, those not forked or older than the monitor; a pool's.

    Not where SIGTERM ends a pool's as terminate() does, or the server of a forkserver. All of it
    is started for real, and none is left.
    """
    (tmp_path / "mine.py").write_text(f"HOW = {how!r}" + OTHER_CHILDREN)
    child = spawn(command=[sys.executable, str(tmp_path / "mine.py"), str(tmp_path / "mine.pt")])
    child.expect("@training")
    os.killpg(child.pid, signum)
    child.expect("@more 20")
    text = finish(child)
    assert child.exitstatus == 128 + signum, text
    assert "Traceback" not in text and "Second" not in text
    assert (tmp_path / "mine.pt").exists()
    wait_until(lambda: not processes_in_session(child.pid))
