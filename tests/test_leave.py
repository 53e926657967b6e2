"""Keys, signals, messages and exit codes: every way to stop, in a pseudo-terminal."""

import os
import signal
import subprocess
import sys
import termios
import time

import pytest
import torch
from helpers import (
    ENDLESS,
    MODES,
    ROOT,
    SCRIPT,
    finish,
    processes_in_session,
    run,
    saved_path,
    wait_until,
)

from train_graceful import load_checkpoint


def assert_messages(output: str, path, checkpoint: dict) -> None:
    lines = [line.strip("\r").rpartition("\r")[2].strip() for line in output.split("\n")]
    lines = [line for line in lines if line]
    start = lines.index("📝 Saving emergency checkpoint...")
    best = checkpoint["best"]["value"]
    assert lines[start:-1] == [
        "📝 Saving emergency checkpoint...",
        f"✅ Emergency checkpoint saved: {path}",
        "✨ Graceful exit completed!",
        "📊 Training Summary:",
        f"Completed Steps: {checkpoint['step']}",
        "Epoch: 0",
        f"Best Loss: {'none yet' if best is None else format(best, '.4f')}",
        f"Emergency checkpoint: {path}",
    ]
    assert f"--resume {path}" in lines[-1]


@pytest.mark.parametrize("mode", MODES)
def test_q_saves_prints_the_summary_and_restores_the_terminal(spawn, options, tmp_path, mode):
    child = spawn(*options, *ENDLESS, *MODES[mode])
    child.expect(
        "🧠 ByteLM, [0-9,]+ parameters, on (cpu|cuda|mps): [0-9,]+ samples, [0-9,]+ batches of [0-9]+ an epoch; saves in .*/ck"
    )
    child.expect("🔄 Training started. Press 'q' \\+ Enter to exit gracefully...")
    before = termios.tcgetattr(child.child_fd)
    child.expect("step [0-9]+/1000000")
    child.sendline("q")
    child.expect("🛑 Exit requested! Finishing current batch gracefully...")
    output = finish(child)
    assert child.exitstatus == 0
    assert termios.tcgetattr(child.child_fd) == before
    path = saved_path(output)
    checkpoint = load_checkpoint(path)
    assert path == tmp_path / "ck" / "emergency_exit" / f"emergency_step_{checkpoint['step']}.pt"
    assert checkpoint["exit_reason"] == "user_requested_graceful_exit"
    assert checkpoint["step"] > 0 and checkpoint["config"]["mode"] == (
        "geometric" if mode == "geometric" else "standard"
    )
    names = ["rotation", "expert", "embedding"] if mode == "geometric" else ["adamw"]
    assert (
        list(checkpoint["optimizer_state_dicts"])
        == list(checkpoint["scheduler_state_dicts"])
        == names
    )
    assert_messages(output, path, checkpoint)


def test_every_spelling_of_q_is_heard_and_a_failed_save_goes_on_training(spawn, options, tmp_path):
    (tmp_path / "ck").mkdir()
    blocker = tmp_path / "ck" / "emergency_exit"
    blocker.write_text("a file where the directory should be")
    child = spawn(*options, *ENDLESS)
    child.expect("step [0-9]+/")
    for line in ("Q", "  q ", "quit", "EXIT", "q"):
        child.sendline(line)
        child.expect("Exit requested!")
        child.expect("Emergency checkpoint not saved: .* Training goes on")
        child.expect("step [0-9]+/")
    blocker.unlink()
    child.sendline("q")
    child.expect("Exit requested!")
    output = finish(child)
    assert child.exitstatus == 0
    load_checkpoint(saved_path(output))


def test_other_lines_with_a_q_only_print_the_hint(spawn, options):
    child = spawn(*options, *ENDLESS)
    child.expect("step [0-9]+/")
    for line in ("xq", "query", "q q", "?", "", "é\x00q"):
        child.sendline(line)
        child.expect("Keys: q \\+ Enter")
        child.expect("step [0-9]+/")
        assert "Exit requested" not in child.before
    child.sendline("q")
    child.expect("Exit requested!")
    finish(child)
    assert child.exitstatus == 0


def test_s_saves_a_checkpoint_and_goes_on(spawn, options, tmp_path):
    child = spawn(*options, *ENDLESS)
    child.expect("step [0-9]+/")
    child.sendline("s")
    child.expect("Checkpoint saved: (\\S+\\.pt)")
    path = tmp_path / "ck" / f"step_{load_checkpoint(child.match[1])['step']}.pt"
    assert (
        child.match[1] == str(path)
        and load_checkpoint(path)["exit_reason"] == "user_requested_save"
    )
    child.expect("step [0-9]+/")
    child.sendline("q")
    finish(child)
    assert child.exitstatus == 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_and_sets_the_exit_code(spawn, options, name):
    child = spawn(*options, *ENDLESS)
    child.expect("step [0-9]+/")
    child.kill(signal.Signals[name])
    child.expect("Exit requested!")
    output = finish(child)
    assert child.exitstatus == 128 + signal.Signals[name]
    assert load_checkpoint(saved_path(output))["exit_reason"] == f"signal_{name}"


def test_ctrl_c_typed_in_the_terminal_leaves_with_130(spawn, options):
    child = spawn(*options, *ENDLESS)
    child.expect("step [0-9]+/")
    child.sendintr()
    output = finish(child)
    assert child.exitstatus == 130
    assert load_checkpoint(saved_path(output))["exit_reason"] == "signal_SIGINT"


STUCK_IN_THE_SAVE = """
import sys, threading, train_graceful as t
def stuck(state, path):
    path.parent.mkdir()
    path.with_name("." + path.name + ".tmp").write_bytes(b"half")
    t.Screen().say("stuck in the save")
    threading.Event().wait()
t.save_checkpoint = stuck
t.main(t.train, **t.OPTIONS)
"""


def test_second_ctrl_c_abandons_a_save_that_does_not_end(spawn, options, tmp_path):
    first = run(*options, "--steps", "2")
    assert first.returncode == 0
    child = spawn(*options, *ENDLESS, "--workers", "2", source=STUCK_IN_THE_SAVE)
    child.expect("step [0-9]+/")
    before = termios.tcgetattr(child.child_fd)
    child.sendintr()
    child.expect("stuck in the save")
    heard = time.monotonic()
    wait_until(lambda: time.monotonic() - heard > 0.6)  # two within half a second are one
    child.sendintr()
    child.expect("Second Ctrl-C")
    finish(child)
    assert child.exitstatus == 130
    assert termios.tcgetattr(child.child_fd) == before
    assert processes_in_session(child.pid) == []
    load_checkpoint(tmp_path / "ck" / "final.pt")
    assert run(*options, "--resume", "latest", "--steps", "3").returncode == 0
    assert not list((tmp_path / "ck").rglob(".*.tmp"))


def test_q_typed_twice_never_reaches_the_shell(spawn, options):
    shell = spawn(
        command=["bash", "--norc", "--noediting", "-i"], env={**os.environ, "PS1": "READY> "}
    )
    shell.expect("READY> ")
    shell.sendline(" ".join([sys.executable, str(SCRIPT), *options, *ENDLESS]))
    shell.expect("step [0-9]+/")
    shell.send("q\nq\nq\nq")
    shell.expect("Resume with")
    shell.expect("READY> ")
    shell.sendline("echo code $?")
    shell.expect("code ([0-9]+)")
    assert shell.match[1] == "0"
    assert "not found" not in shell.before


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_torch_is_imported_ends_it_without_a_traceback(options, name, tmp_path):
    """There is nothing to save yet."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", str(SCRIPT), *options, *ENDLESS],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    for line in process.stderr:  # importtime names each module as it is imported
        if "torch._" in line:
            break
    process.send_signal(signal.Signals[name])
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.Signals[name] and "Traceback" not in errors
    assert not (tmp_path / "ck").exists()


OUTSIDE = """
import sys, torch, train_graceful as tg

def wait(where):
    print("@" + where, flush=True)
    while where == WHERE:
        pass

def train(run):
    run.data(list(range(64)))
    run.model(torch.nn.Linear(1, 1))
    wait("before")
    for batch in run.batches():
        pass
    wait("after")

tg.main(train, steps=3)
"""


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("means, code", [("q", 0), ("SIGINT", 130), ("SIGTERM", 143)])
def test_outside_of_the_loop_a_request_ends_the_process_at_once(
    spawn, tmp_path, where, means, code
):
    """Nothing can be lost there: all is saved, or nothing was trained."""
    source = OUTSIDE.replace("WHERE", repr(where))
    child = spawn("--checkpoint-dir", str(tmp_path), source=source)
    child.expect("@" + where)
    before = termios.tcgetattr(child.child_fd)
    child.sendline("q") if means == "q" else child.kill(signal.Signals[means])
    child.expect("Exit requested. (Training has not begun|Everything is saved already)")
    finish(child)
    assert child.exitstatus == code
    assert termios.tcgetattr(child.child_fd) == before
    assert (tmp_path / "final.pt").exists() == (where == "after")


def test_no_worker_process_is_left(spawn, options):
    child = spawn(*options, *ENDLESS, "--workers", "2")
    child.expect("step [0-9]+/")
    assert len(processes_in_session(child.pid)) >= 3
    child.sendintr()  # reaches the workers too: they must not die of it before the save
    output = finish(child)
    assert child.exitstatus == 130
    load_checkpoint(saved_path(output))
    assert processes_in_session(child.pid) == []


def test_a_sigterm_to_the_whole_group_counts_once_and_leaves_no_worker(spawn, options):
    child = spawn(*options, *ENDLESS, "--workers", "2")
    child.expect("step [0-9]+/")
    os.killpg(child.pid, signal.SIGTERM)
    output = finish(child)
    assert child.exitstatus == 143
    assert output.count("Saving emergency checkpoint") == 1 and "Traceback" not in output
    assert processes_in_session(child.pid) == []


def test_requests_do_not_pile_up_and_the_first_one_counts(spawn, options):
    child = spawn(*options, *ENDLESS)
    child.expect("step [0-9]+/")
    child.send("q\n")
    child.kill(signal.SIGTERM)
    output = finish(child)
    assert child.exitstatus in (0, 143)
    assert output.count("Exit requested!") == 1 and output.count("Saving emergency") == 1


HEARD_IN_A_LONG_OPERATION = """
import torch, train_graceful as t
a = torch.rand(4000, 4000)
with t.ExitMonitor() as monitor:
    t.Screen().say("@busy")
    torch.mm(a, a)
    t.Screen().say("@done")
"""


@pytest.mark.parametrize("how", ["key", "signal"])
def test_a_request_is_heard_inside_a_long_torch_operation(spawn, how):
    child = spawn(source=HEARD_IN_A_LONG_OPERATION)
    child.expect("@busy")
    child.sendline("q") if how == "key" else child.kill(signal.SIGTERM)
    child.expect("Exit requested!")
    assert "@done" not in child.before
    child.expect("@done")
    finish(child)


IDLE = """
import pathlib, threading, torch, train_graceful as t
def switches(thread):
    status = pathlib.Path(f"/proc/self/task/{thread}/status").read_text()
    return sum(int(line.split()[1]) for line in status.splitlines() if "ctxt_switches" in line)
with t.ExitMonitor() as monitor:
    thread = monitor._thread.native_id
    t.wait = threading.Event().wait
    while switches(thread) != (t.wait(0.2), switches(thread))[1]:
        pass
    before = switches(thread)
    t.wait(2.0)
    print("wake-ups", switches(thread) - before)
"""


def test_an_idle_monitor_never_wakes_up(spawn):
    child = spawn(source=IDLE)
    child.expect("wake-ups ([0-9]+)")
    assert child.match[1] == "0"


def test_monitor_gives_handlers_wakeup_and_descriptors_back():
    code = """
import os, signal, train_graceful as t
before = [signal.getsignal(s) for s in range(1, 32)], sorted(os.listdir("/proc/self/fd"))
for _ in range(3):
    with t.ExitMonitor() as monitor:
        assert signal.set_wakeup_fd(-1) >= 0
after = [signal.getsignal(s) for s in range(1, 32)], sorted(os.listdir("/proc/self/fd"))
assert before == after, (before, after)
assert signal.set_wakeup_fd(-1) == -1
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_cache_is_cleared_and_memory_returned(spawn, options):
    child = spawn(*options, *ENDLESS, "--device", "cuda")
    child.expect("step [0-9]+/")
    child.sendline("q")
    output = finish(child)
    assert child.exitstatus == 0
    assert "🧹 CUDA cache cleared" in output
    used = subprocess.run(
        ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    ).stdout
    assert str(child.pid) not in used.split()
