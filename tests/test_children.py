"""Signals and child processes: a signal to the whole group costs no batch, and a child is as if there were no monitor."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
import traceback
from pathlib import Path

import pexpect
import pytest
from helpers import ROOT, as_in_a_shell, end_groups, finish, wait_until
from pexpect.fdpexpect import fdspawn

LOOP = """
import multiprocessing, os, signal, subprocess, sys, threading, time
import torch
from train_graceful import ExitMonitor, save_checkpoint

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 10**6
    def __getitem__(self, index):
        time.sleep(0.001)
        return torch.ones(4)

def rest():
    time.sleep(1000)

fork = multiprocessing.get_context("fork")
"""


@pytest.fixture
def program():
    """program(code) runs a person's program in a fork of this process, in a session and on a terminal of its own."""
    started = []

    def start(code: str) -> fdspawn:
        pid, terminal = pty.fork()
        if pid == 0:
            try:
                as_in_a_shell()
                sys.stdin, sys.stdout, sys.stderr = (
                    open(0),
                    open(1, "w", buffering=1),
                    open(2, "w", buffering=1),
                )
                exec(compile(LOOP + code, "program", "exec"), {"__name__": "__main__"})
                os._exit(0)
            except SystemExit as end:
                os._exit(end.code or 0)
            except BaseException:
                traceback.print_exc()
            os._exit(99)
        child = fdspawn(terminal, encoding="utf-8", timeout=30)
        child.pid = pid
        started.append(child)
        return child

    yield start
    end_groups(started)


def ended(child) -> int:
    """The exit code, once the program has ended."""
    child.expect(pexpect.EOF)
    return os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])


TRAINING = """
step = 0
with ExitMonitor() as monitor:
    for batch in torch.utils.data.DataLoader(Data(), 4, num_workers=2):
        step += 1
        if step == 5:
            print("@training")
        if monitor.exit_requested:
            break
    save_checkpoint({"step": step}, PATH)
sys.exit(monitor.exit_code)
"""


@pytest.mark.parametrize(
    "signum",
    [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU],
)
def test_a_signal_to_the_group_costs_no_batch_of_a_loop_with_workers(program, tmp_path, signum):
    child = program(f"PATH = {str(tmp_path / 'mine.pt')!r}" + TRAINING)
    child.expect("@training")
    os.killpg(child.pid, signum)
    assert ended(child) == 128 + signum and (tmp_path / "mine.pt").exists()
    assert "Traceback" not in child.before and "Second" not in child.before


def test_one_ctrl_c_that_a_wrapper_delivers_twice_is_one(program, tmp_path):
    child = program(f"PATH = {str(tmp_path / 'mine.pt')!r}" + TRAINING)
    child.expect("@training")
    child.send("\x03")
    os.kill(child.pid, signal.SIGINT)
    assert ended(child) == 130 and (tmp_path / "mine.pt").exists()


STUCK = """
with ExitMonitor() as monitor:
    print("@stuck")
    time.sleep(1000)
"""


def test_ctrl_c_again_later_leaves_at_once(program):
    child = program(STUCK)
    child.expect("@stuck")
    os.kill(child.pid, signal.SIGINT)
    child.expect("Exit requested")
    heard = time.monotonic()
    wait_until(lambda: time.monotonic() - heard > 0.6)  # the promise is about the time between them
    os.kill(child.pid, signal.SIGINT)
    child.expect("Second Ctrl-C")
    assert ended(child) == 130


CHILDREN = """
def ready():
    print("@ready", os.getpid(), flush=True)
    rest()

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
    "how, code",
    [
        ("process.terminate()", -signal.SIGTERM),
        ("process.kill()", -signal.SIGKILL),
        ("os.kill(process.pid, signal.SIGUSR1)", -signal.SIGUSR1),
    ],
)
@pytest.mark.parametrize("group", [True, False])
def test_a_child_that_is_meant_ends_and_one_that_is_not_lives(program, how, code, group):
    """Also right after the parent has been asked to leave."""
    child = program(CHILDREN.replace("HOW", how))
    child.expect("@ready ([0-9]+)")
    worker = int(child.match[1])
    (os.killpg if group else os.kill)(child.pid, signal.SIGHUP)
    child.expect("@heard signal_SIGHUP")
    child.expect("@child (-?[0-9]+|None)")
    assert child.match[1] == str(code)
    assert ended(child) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_sigterm_to_the_group_ends_children_that_are_no_workers_of_a_loader(program):
    """As without a monitor: of a SIGTERM nobody can tell whether it is terminate()."""
    child = program(CHILDREN.replace("HOW", ""))
    child.expect("@ready")
    os.killpg(child.pid, signal.SIGTERM)
    child.expect("@heard signal_SIGTERM")
    child.expect(f"@child {-signal.SIGTERM}\r")
    assert ended(child) == 0


def test_a_child_that_is_ended_as_soon_as_it_is_started_ends(program):
    child = program("""
with ExitMonitor() as monitor:
    for _ in range(20):
        process = fork.Process(target=rest)
        process.start()
        process.terminate()
        process.join(5)
        if process.exitcode != -signal.SIGTERM:
            process.kill()
            break
    print("@ended", process.exitcode, monitor.reason)
""")
    child.expect("@ended -15 None")
    assert ended(child) == 0


def test_a_child_that_alone_is_signalled_does_what_it_would_without_a_monitor(program):
    child = program("""
begun = fork.Event()

def patient():
    signal.signal(signal.SIGUSR2, lambda *args: (print("@its own handler", flush=True), os._exit(7)))
    resting()

def resting():
    begun.set()
    # Python hears a signal that comes just before a sleep after it.
    while True:
        time.sleep(0.01)

with ExitMonitor() as monitor:
    for target, signum in [(patient, signal.SIGUSR2), (resting, signal.SIGHUP), (resting, signal.SIGINT)]:
        begun.clear()
        process = fork.Process(target=target)
        process.start()
        begun.wait()
        os.kill(process.pid, signum)
        process.join(10)
        print("@ended", process.exitcode)
    print("@requested", monitor.exit_requested)
""")
    child.expect("@its own handler")
    for code in (7, -signal.SIGHUP, 1):
        child.expect(f"@ended {code}\r")
    assert "KeyboardInterrupt" in child.before
    child.expect("@requested False")
    assert ended(child) == 0


SIGNALS_OF_A_PROGRAM = """
SHOW = "import re; print('@', *re.findall(r'Sig(?:Blk|Ign|Cgt):\\\\s*(\\\\w+)', open('/proc/self/status').read()))"

def executed(how):
    if how == "Popen":
        subprocess.run([sys.executable, "-Sc", SHOW])
    elif how == "preexec_fn":
        subprocess.run([sys.executable, "-Sc", SHOW], preexec_fn=lambda: None)
    elif how == "fork":
        pid = os.fork()
        if pid == 0:
            os.execv(sys.executable, [sys.executable, "-Sc", SHOW])
        os.waitpid(pid, 0)
    else:
        import pty
        pty.spawn([sys.executable, "-Sc", SHOW])

for how in ("Popen", "preexec_fn", "fork", "pty"):
    executed(how)
    with ExitMonitor() as monitor:
        executed(how)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_what_a_child_executes_finds_its_signals_as_without_a_monitor(program):
    """Nothing blocked, ignored or handled that would not be so anyway."""
    child = program(SIGNALS_OF_A_PROGRAM)
    assert ended(child) == 0, child.before
    shown = re.findall(r"@ (\w+) (\w+) (\w+)", child.before)
    assert len(shown) == 8 and len(set(shown)) == 1, shown


def test_a_group_signal_at_any_moment_of_starting_children_is_heard_once(program):
    """Children that come and go all the time, and one Ctrl-C.

    One thread forks, the others only execute: a fork of Python with several threads may inherit a lock that nobody opens.
    """
    for _ in range(5):
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


def test_a_forked_child_that_leaves_the_block_does_not_take_the_monitor_with_it(program):
    child = program("""
with ExitMonitor() as monitor:
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        print("@waiting")
        while not monitor.exit_requested:
            time.sleep(0.01)
sys.exit(monitor.exit_code if pid else 0)
""")
    child.expect("@waiting")
    child.send("q\n")
    child.expect("Exit requested")
    assert ended(child) == 0


ASYNCIO = """
import asyncio

async def report():
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGALRM, print)
    if FOREVER:
        print("@running")
        while not monitor.exit_requested:
            await asyncio.sleep(0.01)
    loop.remove_signal_handler(signal.SIGALRM)

with ExitMonitor() as monitor:
    for number in range(2):
        asyncio.run(report())
    if not FOREVER:
        print("@running")
    while not monitor.exit_requested:
        time.sleep(0.01)
print("@left", monitor.reason)
"""


@pytest.mark.parametrize("forever", [False, True])
def test_a_library_that_takes_the_wakeup_descriptor_makes_nobody_deaf(program, forever):
    child = program(ASYNCIO.replace("FOREVER", str(forever)))
    child.expect("@running")
    child.send("\x03")
    child.expect("@left signal_SIGINT\r")
    assert ended(child) == 0


OTHER_CHILDREN = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
{LOOP}
from train_graceful import begin_worker

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
    data = {{"sampler": numbers(), "num_workers": 2, "multiprocessing_context": context, "worker_init_fn": begin_worker}}
    return iter(torch.utils.data.DataLoader(Data(), 4, **data))

if __name__ == "__main__":
    if HOW == "older workers":
        batches = loaded("fork")
    with ExitMonitor() as monitor:
        if HOW == "pool":
            pool = fork.Pool(2)
            batches = pool.imap(slow, range(10**6))
        elif HOW in ("spawn", "forkserver"):
            batches = loaded(HOW)
        for step, batch in enumerate(batches):
            if step == 10:
                print("@training", flush=True)
            if monitor.exit_requested:
                break
        # These come from the children too.
        print("@more", sum(1 for _ in zip(range(20), batches)), flush=True)
        save_checkpoint({{"step": step}}, sys.argv[1])
    # As at the end of: for batch in loader. (PyTorch's spawned workers may abort when they are ended at work.)
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


@pytest.mark.parametrize(
    "how, signum",
    [
        ("spawn", signal.SIGTERM),
        ("forkserver", signal.SIGINT),
        ("older workers", signal.SIGTERM),
        ("pool", signal.SIGINT),
        pytest.param("spawn", signal.SIGINT, marks=pytest.mark.campaign),
        pytest.param("older workers", signal.SIGINT, marks=pytest.mark.campaign),
    ],
)
def test_workers_of_other_kinds_live_on_too(spawn, tmp_path, how, signum):
    """A loader's with begin_worker, which are not forked or older than the monitor; a pool's.

    Not where SIGTERM ends a pool's as terminate() does, or the server of a forkserver.
    """
    (tmp_path / "mine.py").write_text(f"HOW = {how!r}" + OTHER_CHILDREN)
    child = spawn(command=[sys.executable, str(tmp_path / "mine.py"), str(tmp_path / "mine.pt")])
    child.expect("@training")
    os.killpg(child.pid, signum)
    child.expect("@more 20")
    text = finish(child)
    assert child.exitstatus == 128 + signum and "Traceback" not in text, text
    assert (tmp_path / "mine.pt").exists()


def test_in_a_real_shell_a_second_program_is_no_part_of_it(tmp_path):
    """The whole way, without forks of this process: bash, a person's loop with workers, Ctrl-C."""
    (tmp_path / "mine.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})"
        + LOOP
        + f"PATH = {str(tmp_path / 'mine.pt')!r}"
        + TRAINING
    )
    shell = pexpect.spawn(
        "bash", ["--norc"], encoding="utf-8", timeout=60, env={**os.environ, "PS1": "READY> "}
    )
    shell.expect("READY> ")
    settings = termios.tcgetattr(shell.child_fd)
    shell.sendline(f"{sys.executable} {tmp_path}/mine.py")
    shell.expect("@training")
    shell.sendintr()
    shell.expect("READY> ")
    shell.sendline("echo code $?")
    shell.expect("code 130\r")
    shell.expect("READY> ")
    assert termios.tcgetattr(shell.child_fd) == settings and (tmp_path / "mine.pt").exists()
    left = subprocess.run(
        ["pgrep", "-f", str(tmp_path / "mine.py")], capture_output=True, text=True
    )
    assert left.stdout == ""
    shell.close(force=True)
